"""The output of the commands."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import transformers

from ..data import DataWarning
from ..training.run_folder import check_output_dir
from .words import in_options


def tidy_output() -> None:
    """Hides the libraries' progress bars if there is no terminal, and a warning that only PEFT can fix."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


@contextmanager
def list_remarks(strict: bool = False, silent: bool = False) -> Iterator[None]:
    """Collects problems with the data and lists them on stderr at the end, also after an error.

    With `strict`, raises ValueError with that list unless it is empty. `silent`: prints nothing, for all but one
    process of a training run.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        try:
            yield
        finally:
            remarks = [str(each.message) for each in caught if issubclass(each.category, DataWarning)]
            remarks = [f"  - {in_options(text)}" for text in dict.fromkeys(remarks)]
            about = f"{len(remarks)} remark{'s' * (len(remarks) != 1)}:"
            if remarks and not silent and not strict:
                print("\n".join([about, *remarks]), file=sys.stderr)
    for other in caught:
        if not issubclass(other.category, DataWarning):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    if strict and remarks:
        raise ValueError("\n".join([f"`strict`, and there are {about}", *remarks]))


def make_room_for(output: str | os.PathLike[str]) -> None:
    """Makes the folder of an output file before the work starts. Raises ValueError if the file cannot be written."""
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`output`={str(output)!r}: its folder cannot be made ({error.strerror}).") from None
    if path.is_dir():
        raise ValueError(f"`output`={str(output)!r} is a folder; name a file.")


def check_own_folder(output_dir: Path, note: str, what: str) -> None:
    """Raises ValueError for an unsuitable folder. One with this note is from an earlier call; its files are replaced.

    `what` is the command's product, such as a "check".
    """
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        check_output_dir(output_dir, resume=False)
    elif not (output_dir / note).is_file():
        raise ValueError(f"`output_dir`={str(output_dir)!r} holds other files; choose a new folder, or that of an "
                         f"earlier {what}.")  # fmt: skip


def markdown_table(header: list[str], rows: list[list]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


def accuracies(results: dict[str, Any]) -> str:
    """Lines for the terminal."""
    names = {"zero_shot_accuracy": "zero-shot accuracy", "accuracy": "adapted accuracy"}
    names["wise_ft_accuracy"] = "with WiSE-FT at 0.5"
    return "\n".join(f"{words:20} {results[name]:.3f}" for name, words in names.items() if name in results)
