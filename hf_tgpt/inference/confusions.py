"""How an adapter classified its run's test pictures, from the table that `hf-tgpt train` writes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.readers.text_tables import read_delimited
from ..data.remarks import remark
from ..utils.names import composed

PREDICTIONS = "predictions.csv"  # in a run's folder: a row for each test picture, with its label and prediction


@dataclass(frozen=True)
class PredictedAs:
    """The test pictures that were predicted as one class: their number, how many belong to it (`right`), and the
    classes of the others, those with the most pictures first. `tested` is the number of all test pictures.

    Example:
        >>> predicted = PredictedAs(pictures=4, right=3, others=[("dog", 1)], tested=9)
        >>> predicted.precision
        0.75
    """

    pictures: int
    right: int
    others: list[tuple[str, int]]
    tested: int

    @property
    def precision(self) -> float | None:
        """The share of the predictions that are right; None for a class that was never predicted."""
        return self.right / self.pictures if self.pictures else None


def read_predictions(folder: str | os.PathLike[str], class_names: Sequence[str]) -> dict[str, PredictedAs]:
    """The test pictures of a run by the class that was predicted for them, from `predictions.csv` in its folder.

    Empty without such a table; also, with a remark, if it cannot be read or has other classes.

    Example:
        >>> read_predictions("runs/my-run", ["cat", "dog"])
        {}
    """
    file = Path(folder) / PREDICTIONS
    if not file.is_file():
        return {}
    try:
        table = read_delimited(file)
        pairs = list(zip(table["label"][:], table["prediction"][:], strict=True))
    except (ValueError, KeyError) as error:
        remark(f"{file} is not used, since it cannot be read as a table of predictions ({error}).")
        return {}
    # For spreadsheets, the table has an apostrophe before a name that begins like a formula.
    known = {prefix + composed(name): name for prefix in ("'", "") for name in class_names}
    counts = Counter((known.get(composed(str(label)), ""), known.get(composed(str(as_)), "")) for label, as_ in pairs)
    if any("" in pair for pair in counts):
        remark(f"{file} is not used, since it has classes that are not the adapter's.")
        return {}
    found = {}
    for name in class_names:
        labels = Counter({label: count for (label, predicted), count in counts.items() if predicted == name})
        others = [(label, count) for label, count in labels.most_common() if label != name]
        found[name] = PredictedAs(labels.total(), labels[name], others, len(pairs))
    return found
