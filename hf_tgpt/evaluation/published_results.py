"""Published accuracies, for comparison with measured ones: a CSV file with one published number per line."""

from __future__ import annotations

import csv
import io
import os
from typing import Any

from ..data import find_benchmark
from ..utils.files import read_text

FIELDS = ("method", "trained_on", "dataset", "classes", "shots", "accuracy", "source")
# All of them are of this model.
BACKBONE = "CLIP ViT-B/16"


def read_published(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of the file, with `shots` as a number and `accuracy` in percent.

    Raises ValueError if the file is damaged or lacks one of FIELDS.
    """
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
        missing = [name for name in FIELDS if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"there is no column {missing[0]!r}")
        return [row | {"shots": int(row["shots"]), "accuracy": float(row["accuracy"])} for row in reader]
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({error}); it needs {', '.join(FIELDS)} in each row."
        ) from error


def published_beside(
    rows: list[dict[str, Any]], run: dict[str, Any], dataset: str, classes: str
) -> list[dict[str, Any]]:
    """The `rows` with the same training and test as a run.

    `run` is the content of its results.json, `dataset` and `classes` are what it is tested on. Raises ValueError, which
    lists what there are numbers for, if nothing is published for that.
    """
    if not run:
        raise ValueError(
            "`compare_with_published`: the adapter has no results.json, so it is unknown what it was trained on; give "
            "the folder that training wrote."
        )
    trained_on, tested = (_name(name) for name in (run["dataset"], dataset))
    # "base" and "new" are numbers of a training on the base classes, all others of one on all classes.
    same_half = (run["classes"] == "base") == (classes in ("base", "new"))
    matches = [
        row
        for row in rows
        if same_half
        and (row["trained_on"], row["dataset"], row["classes"]) == (trained_on, tested, classes)
        and row["shots"] == run["shots"]
    ]
    if not matches:
        near = {(row["trained_on"], row["dataset"]): f"{row['dataset']} after {row['trained_on']}" for row in rows}
        known = [text for pair, text in near.items() if tested in pair or trained_on in pair] or list(near.values())
        raise ValueError(
            f"`compare_with_published`: there is no published number for {tested}, {classes} classes, after a training "
            f"on {trained_on}, {run['classes']} classes, with {run['shots']} shots; there are some for "
            f"{', '.join(known[:12])}."
        )
    return matches


def _name(dataset: str) -> str:
    """The data set's name in the catalogue."""
    benchmark, _ = find_benchmark(dataset)
    return dataset if benchmark is None else benchmark.name
