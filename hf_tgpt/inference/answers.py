"""From logits to answers: a picture's likeliest classes, those that it may be of, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from typing_extensions import NotRequired

from ..evaluation.calibration import Calibration

Scores = Literal["softmax", "sigmoid"]


class Guess(TypedDict):
    """A class and its probability; of a picture of none of the classes no label, and the `nearest` class."""

    label: str | None
    score: float
    nearest: NotRequired[str]


Answer = list[Guess]


@dataclass(frozen=True)
class Question:
    """What is asked about pictures: among which classes, and which form the answer has (see `Classifier.__call__`)."""

    names: list[str]
    top_k: int | None
    scores: Scores
    coverage: float | None
    reject: bool
    calibration: Calibration | None  # of these classes


def answers(logits: torch.Tensor, question: Question) -> list[Answer]:
    """An answer for each row of logits (b, c). The order of the classes is that of their logits, calibrated or not."""
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
