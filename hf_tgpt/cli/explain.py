"""`hf-tgpt explain`: a plot of where an adapter looks in a few pictures."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..data.fewshot import read_labels, rows_of_classes
from ..data.readers.captions import undecoded_images
from ..evaluation.plots import require_matplotlib, save_figure
from ..inference.explain import attention_rows, mean_attention
from ..inference.pictures import load_image
from .loaded import classifier_of
from .output import make_room_for, tidy_output
from .pictures import read_splits_or_files
from .predict import SOME_SKIPPED


def main(args: argparse.Namespace) -> int:
    """Writes the plot: a row for each picture with its label, the adapter's answer and what it looks at."""
    tidy_output()
    require_matplotlib()
    output = Path(args.output)
    if output.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"`output`={args.output!r} ends with none of .png, .svg and .pdf; name such a file.")
    make_room_for(output)
    splits, labelled = read_splits_or_files(args)
    pictures = splits["test"] if "test" in splits else next(iter(splits.values()))
    records, labels = undecoded_images(pictures), read_labels(pictures)
    classifier = classifier_of(args)
    rows: dict[str, tuple[Any, dict]] = {}
    facts, skipped = [], []
    for row in in_turns(labels):
        if len(rows) == args.count:
            break
        record = records[row]
        name = Path(record["path"]).name if record["path"] else f"row {row}"
        try:
            image = load_image(record)
        except ValueError as error:
            skipped.append(f"{name}: {error}")
            continue
        ((_, (answer, *_)),) = classifier.stream([image], 1)
        label = pictures.features["label"].names[labels[row]] if labelled else None
        beside = "" if label in (None, answer["label"]) else f" (not {label})"
        rows[f"{name}: {answer['label']}{beside}, {answer['score']:.2f}"] = image, mean_attention(classifier, image)
        facts.append({"image": record["path"] or row, "class": label, **answer})
    if not rows:
        raise ValueError(f"`pictures`={args.pictures!r}: none of {len(pictures)} can be read; name others.")
    save_figure(attention_rows(classifier, rows), output)
    for reason in skipped:
        print(f"Skipped: {reason}", file=sys.stderr)
    if args.json:
        print(json.dumps({"output": args.output, "pictures": facts, "skipped": skipped}, indent=2, ensure_ascii=False))
    else:
        print(f"{len(rows)} of {len(pictures)} pictures are in {args.output}")
    return SOME_SKIPPED if skipped else 0


def in_turns(labels: np.ndarray) -> list[int]:
    """The rows of pictures, first the first one of each class, then the second ones, and so on.

    Example:
        >>> in_turns(np.array([0, 0, 0, 1, 1]))
        [0, 3, 1, 4, 2]
    """
    classes = rows_of_classes(labels, labels.max() + 1)
    return [int(row) for turn in itertools.zip_longest(*classes) for row in turn if row is not None]
