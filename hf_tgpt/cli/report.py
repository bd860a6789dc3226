"""The report of a test: report.html, one page that needs no network and no script, and predictions.csv beside it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image

from ..data.looks import picture_names
from ..encoders import encoder_of
from ..evaluation.accuracy import measure
from ..evaluation.calibration import Calibration
from ..evaluation.error_analysis import ErrorAnalysis, accuracy_interval
from ..evaluation.plots import PLOTS_REMEDY, can_plot
from ..inference.classifier import Classifier
from ..inference.confusions import PREDICTIONS
from ..inference.explain import attention_pictures
from ..inference.pictures import small_address
from ..utils.files import put_in_place
from .page import thumbnail, write_page
from .spreadsheet import write_table
from .words import in_options

REPORT = "report.html"
# The most that the page shows; the table has all pictures.
_CLASSES = 100  # rows of the table of classes
_MATRIX = 20  # classes of the confusion matrix
_PAIRS, _OF_A_PAIR = 9, 3  # pairs of classes, and pictures of each
_WRONG, _RIGHT = 2, 1  # answers whose attention is shown
_TEXTS = 500  # pictures times classes, if each picture has its own texts


@dataclass(frozen=True)
class Tested:
    """A test and what a report shows of it; n pictures, c classes.

    `results` are those in results.json, `zero_shot` the metrics of zero-shot. `logits` (n, c) are the classifier's own,
    without a temperature; `labels` (n,) and `pictures` (n rows) are in the same order. `calibration` is the
    adapter's if it holds for these classes. `history` is that of the training, `command` the words after the
    program's name, `settings` the other settings that affect the outcome.
    """

    title: str
    results: dict[str, Any]
    zero_shot: dict[str, Any]
    logits: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    pictures: Dataset
    classifier: Classifier
    calibration: Calibration | None
    command: Sequence[str]
    settings: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list)


def write_report(folder: Path, tested: Tested) -> None:
    """Writes report.html and predictions.csv. Only the pictures that the page shows are read again."""
    temperature = 1.0 if tested.calibration is None else tested.calibration.temperature
    errors = ErrorAnalysis(tested.logits / temperature, tested.labels, tested.class_names)
    names = picture_names(tested.pictures)
    draft = folder / f"{PREDICTIONS}.tmp"
    write_table(draft, ("file", "label", "prediction", "score", "correct"), _rows(errors, names))
    put_in_place(draft, folder / PREDICTIONS)
    draft = folder / f"{REPORT}.tmp"
    write_page(draft, "report.html.jinja", **_facts(tested, errors, names), table=PREDICTIONS)
    put_in_place(draft, folder / REPORT)


def _rows(errors: ErrorAnalysis, names: list[str]) -> Iterator[dict[str, Any]]:
    for row in errors.worst_first().tolist():
        yield {
            "file": names[row],
            "label": errors.class_names[errors.labels[row]],
            "prediction": errors.class_names[errors.predictions[row]],
            "score": f"{errors.scores[row]:.4f}",
            "correct": str(bool(errors.right[row])).lower(),
        }


def _facts(tested: Tested, errors: ErrorAnalysis, names: list[str]) -> dict[str, Any]:
    """What the template fills in."""
    count = len(tested.labels)
    pairs = errors.confused_pairs()
    by_class = errors.by_class()
    for row in by_class:
        row["zero_shot_recall"] = tested.zero_shot["per_class_accuracy"][row["class"]]
    folder = _common_folder(names)
    names = [os.path.relpath(name, folder) for name in names] if folder else names
    undecoded = tested.pictures.select_columns("image").cast_column("image", Image(decode=False))
    attention, no_attention = _attention(tested, errors, names, undecoded)
    return {
        "title": tested.title,
        "results": tested.results,
        "folder": folder,
        "remarks": [in_options(remark) for remark in tested.results.get("remarks", [])],
        "count": count,
        "wrong": int((~errors.right).sum()),
        "class_count": len(tested.class_names),
        "accuracies": [
            ("adapter", _with_interval(tested.results, count)),
            ("zero-shot", _with_interval(tested.zero_shot, count)),
        ],
        "by_class": by_class[:_CLASSES],
        "tested_classes": len(by_class),
        "confusion": errors.confusion(_MATRIX),
        "pairs": _with_pictures(pairs[:_PAIRS], errors, names, undecoded),
        "all_pairs": len(pairs),
        "reliability": errors.reliability(),
        "calibration": _calibration(tested),
        "attention": attention,
        "no_attention": no_attention,
        "history": tested.history,
        "command": shlex.join(["hf-tgpt", *map(str, tested.command)]),
        "settings": {name: _in_words(value) for name, value in tested.settings.items() if value is not None},
    }


def _common_folder(names: list[str]) -> str:
    """The common folder of all files, which their short names omit; empty if there is none."""
    return os.path.commonpath(names) if len(names) > 1 and all(map(os.path.isabs, names)) else ""


def _with_interval(metrics: dict[str, Any], count: int) -> dict[str, Any]:
    return metrics | {"interval": accuracy_interval(metrics["accuracy"], count)}


def _with_pictures(
    pairs: list[dict[str, Any]], errors: ErrorAnalysis, names: list[str], undecoded: Dataset
) -> list[dict[str, Any]]:
    """The pairs with thumbnails of their first pictures; several are made in parallel."""
    shown = [row for pair in pairs for row in pair["rows"][:_OF_A_PAIR]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        addresses = dict(zip(shown, pool.map(_small, (undecoded[row]["image"] for row in shown)), strict=True))
    return [
        pair
        | {
            "pictures": [
                {
                    "address": addresses[row],
                    "name": names[row],
                    "score": errors.scores[row],
                    "own_score": errors.own_scores[row],
                }
                for row in pair["rows"][:_OF_A_PAIR]
            ]
        }
        for pair in pairs
    ]


def _small(record: dict[str, Any]) -> str | None:
    """A thumbnail; None for a picture that has become unreadable since the test."""
    try:
        return thumbnail(record)
    except ValueError:
        return None


def _calibration(tested: Tested) -> dict[str, Any]:
    """The calibration error of the logits as they are and, with a calibration, divided by its temperature."""
    facts: dict[str, Any] = {"before": _calibration_error(tested.logits, tested.labels)}
    if tested.calibration is not None:
        scaled = tested.logits / tested.calibration.temperature
        facts |= {"after": _calibration_error(scaled, tested.labels)}
        facts |= {"temperature": tested.calibration.temperature, "pictures": tested.calibration.pictures}
    return facts


def _calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    return measure({"logits": logits, "labels": labels})["expected_calibration_error"]


def _attention(
    tested: Tested, errors: ErrorAnalysis, names: list[str], undecoded: Dataset
) -> tuple[list[dict[str, Any]], str | None]:
    """Where the model looks for a few wrong and right answers with high scores; or why this is left out."""
    model, order = tested.classifier.model, errors.worst_first().tolist()
    wrong = int((~errors.right).sum())
    rows = [*order[: min(wrong, _WRONG)], *order[wrong:][::-1][:_RIGHT]]
    if not encoder_of(model.get_base_model()).takes_prompts:
        return [], "the layers of this base model are not known to hf-tgpt"
    if not can_plot():
        return [], f"it needs matplotlib ({PLOTS_REMEDY})"
    if model.learner.texts_per_image and len(rows) * len(tested.class_names) > _TEXTS:
        return [], "this method reads all class texts anew for each picture, which takes long for so many classes"
    found = []
    for row in rows:
        try:
            pictures = attention_pictures(tested.classifier, undecoded[row]["image"])
        except ValueError:  # it has become unreadable since the test
            continue
        found.append(
            {
                "right": bool(errors.right[row]),
                "name": names[row],
                "label": errors.class_names[errors.labels[row]],
                "prediction": errors.class_names[errors.predictions[row]],
                "score": errors.scores[row],
                "pictures": {title: small_address(picture) for title, picture in pictures.items()},
            }
        )
    return found, None if found else "the pictures cannot be read any more"


def _in_words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
