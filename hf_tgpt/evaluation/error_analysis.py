"""Error analysis of a tested classifier: which classes and pictures it gets wrong, and how far to trust its scores.

Letters: n pictures, c classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

_QUANTILE = NormalDist().inv_cdf(0.975)  # of a 95 % interval


def accuracy_interval(accuracy: float, count: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy on `count` pictures, for chance in the choice of the pictures only.

    Source: the score interval of Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA
    1927, which is also valid for few pictures and near 0 and 1.

    Example:
        >>> [round(bound, 2) for bound in accuracy_interval(0.9, 10)]
        [0.6, 0.98]
    """
    z = _QUANTILE**2 / count
    middle, half = accuracy + z / 2, math.sqrt(z * (accuracy * (1 - accuracy) + z / 4))
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


@dataclass(frozen=True)
class Bin:
    """The pictures whose score is above `low` and up to `high`: their number, mean score and share of right answers."""

    low: float
    high: float
    pictures: int
    score: float
    accuracy: float


class ErrorAnalysis:
    """A classifier's answers to n labelled pictures of c classes; nothing here is of size c x c.

    Shapes: `labels` and `predictions` (n,), class numbers; `scores` and `own_scores` (n,), the softmax probabilities of
    the predicted and of the labelled class; `right` (n,), whether they are the same.

    Example:
        >>> logits = np.array([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 4.0]])
        >>> errors = ErrorAnalysis(logits, np.array([0, 1, 1, 0]), ["cat", "dog"])
        >>> errors.worst_first().tolist(), [(pair["label"], pair["taken_for"]) for pair in errors.confused_pairs()]
        ([3, 1, 2, 0], [('cat', 'dog'), ('dog', 'cat')])
    """

    def __init__(self, logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]):
        self.labels, self.class_names = labels, list(class_names)
        self.predictions = logits.argmax(-1)
        self.right = self.predictions == labels
        rows, highest = np.arange(len(labels)), logits.max(-1)
        total = np.exp(logits - highest[:, None]).sum(-1)
        self.scores = 1 / total
        self.own_scores = np.exp(logits[rows, labels] - highest) / total

    def worst_first(self) -> np.ndarray:
        """All rows (n,): wrong answers first, by falling score, then right answers, by rising score."""
        return np.argsort(np.where(self.right, self.scores, -self.scores - 1), kind="stable")

    def by_class(self) -> list[dict[str, Any]]:
        """`class`, `label`, `pictures`, `recall` and `precision` of each class that has a picture, the lowest recall
        first. The precision of a class that is never predicted is None.
        """
        count = len(self.class_names)
        pictures, answers = (np.bincount(numbers, minlength=count) for numbers in (self.labels, self.predictions))
        hits = np.bincount(self.labels[self.right], minlength=count)
        rows = [
            {
                "class": number,
                "label": name,
                "pictures": int(pictures[number]),
                "recall": float(hits[number] / pictures[number]),
                "precision": float(hits[number] / answers[number]) if answers[number] else None,
            }
            for number, name in enumerate(self.class_names)
            if pictures[number]
        ]
        return sorted(rows, key=lambda row: (row["recall"], row["precision"] or 0.0))

    def confused_pairs(self) -> list[dict[str, Any]]:
        """`label`, `taken_for` and the `rows` of the pictures of each pair of confused classes, the pair with the most
        pictures first; in each pair, the highest score first.
        """
        pairs: dict[tuple[int, int], list[int]] = {}
        for row in self.worst_first()[: int((~self.right).sum())].tolist():
            pairs.setdefault((int(self.labels[row]), int(self.predictions[row])), []).append(row)
        return [
            {"label": self.class_names[label], "taken_for": self.class_names[other], "rows": rows}
            for (label, other), rows in sorted(pairs.items(), key=lambda pair: -len(pair[1]))
        ]

    def confusion(self, most: int) -> dict[str, Any]:
        """The confusion matrix of the `most` classes that are confused most, in label order.

        `label` has their names, `counts` a row for each label with the number of pictures predicted as each class, and
        `elsewhere` the number of a label's pictures predicted as a class that is left out.
        """
        count, wrong = len(self.class_names), ~self.right
        mistakes = np.bincount(self.labels[wrong], minlength=count)
        mistakes += np.bincount(self.predictions[wrong], minlength=count)
        shown = np.sort(np.argsort(-mistakes, kind="stable")[:most])
        place = np.full(count, len(shown))
        place[shown] = np.arange(len(shown))
        counts = np.zeros((len(shown) + 1, len(shown) + 1), dtype=np.int64)
        np.add.at(counts, (place[self.labels], place[self.predictions]), 1)
        return {
            "label": [self.class_names[number] for number in shown],
            "counts": counts[:-1, :-1].tolist(),
            "elsewhere": counts[:-1, -1].tolist(),
        }

    def reliability(self, bins: int = 10) -> list[Bin]:
        """Scores and the share of right answers in bins of equal width; empty bins are left out. Source: Guo et al., On
        Calibration of Modern Neural Networks, ICML 2017, section 2.
        """
        edges = np.linspace(0, 1, bins + 1)
        number = np.digitize(self.scores, edges[1:-1], right=True)
        found = []
        for i in range(bins):
            own = number == i
            if own.any():
                score, accuracy = float(self.scores[own].mean()), float(self.right[own].mean())
                found.append(Bin(float(edges[i]), float(edges[i + 1]), int(own.sum()), score, accuracy))
        return found
