"""Problems with the user's data that do not stop the work."""

from __future__ import annotations

import warnings


class DataWarning(UserWarning):
    """A problem with pictures, classes or tables: what was found, how it is handled, and the remedy.

    It has its own category, so that a program can list all of them before the work starts, or stop:

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", DataWarning)
    """


def count(number: int, thing: str) -> str:
    """ "1 image is", "3 images are", "2 classes are"."""
    many = thing + ("es" if thing.endswith("s") else "s")
    return f"1 {thing} is" if number == 1 else f"{number} {many} are"


def remark(text: str) -> None:
    """Warns of a problem with the data, in one or two sentences; `text` names the place and the remedy."""
    warnings.warn(text, DataWarning, stacklevel=3)
