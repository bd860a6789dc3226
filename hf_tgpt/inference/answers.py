"""From logits to answers: a picture's likeliest classes, a set with a given coverage, or none."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from typing_extensions import NotRequired

from ..evaluation.calibration import Calibration

Scores = Literal["softmax", "sigmoid"]


class Guess(TypedDict):
    """A class and its probability; for a picture of none of the classes, no label but the `nearest` class."""

    label: str | None
    score: float
    nearest: NotRequired[str]


Answer = list[Guess]


@dataclass(frozen=True)
class Question:
    """A question about pictures: among which classes, and in which form the answer is (see `Classifier.__call__`)."""

    names: list[str]
    top_k: int | None
    scores: Scores
    coverage: float | None
    reject: bool
    calibration: Calibration | None  # of these classes


def answers(logits: torch.Tensor, question: Question) -> list[Answer]:
    """An answer for each row of logits (b, c). Classes are in the order of their logits, calibrated or not."""
    names, calibration = question.names, question.calibration
    if question.scores == "sigmoid":
        scores = logits.sigmoid()
    else:
        scores = (logits if calibration is None else calibration.scaled(logits)).softmax(-1)
    shown = len(names) if question.coverage is not None else min(question.top_k or len(names), len(names))
    order = logits.topk(shown).indices  # (b, shown)
    belongs = torch.ones_like(logits, dtype=torch.bool)
    strange = torch.zeros(len(logits), dtype=torch.bool)
    if calibration is not None and question.coverage is not None:
        belongs = calibration.answers(logits, names, question.coverage)
    if calibration is not None and question.reject:
        strange = calibration.rejected(logits)
    found: list[Answer] = []
    rows = (order, scores.gather(-1, order), belongs.gather(-1, order))
    for labels, values, chosen, is_strange in zip(*(part.tolist() for part in rows), strange.tolist(), strict=True):
        if is_strange:
            found.append([{"label": None, "nearest": names[labels[0]], "score": values[0]}])
            continue
        parts = zip(labels, values, chosen, strict=True)
        found.append([{"label": names[label], "score": value} for label, value, is_in in parts if is_in])
    return found


def row_of(image: str, answer: Answer | None, error: str, asked: Container[str]) -> dict[str, Any]:
    """A picture's answer as a row for other programs: the likeliest class and its score, and all under "top_k".

    Without an answer, it has the reason. If `asked` has "coverage", the answer's classes are also listed as "labels".

    Example:
        >>> row_of("cat.jpg", [{"label": "cat", "score": 0.9}], "", ())
        {'image': 'cat.jpg', 'label': 'cat', 'score': 0.9, 'top_k': [{'label': 'cat', 'score': 0.9}]}
    """
    if answer is None:
        return {"image": image, "error": error}
    labels = {"labels": labels_of(answer)} if "coverage" in asked else {}
    return {"image": image, **answer[0], **labels, "top_k": answer}


def labels_of(answer: Answer | None) -> list[str]:
    """The classes of an answer; that of a rejected picture has none."""
    return [guess["label"] for guess in answer or [] if guess["label"] is not None]
