"""Finds labels that are probably wrong and pictures unlike all others, from a frozen image tower's features.

Letters as in `encoders/base.py`, and n pictures, c classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..adapters.feature_head import FeatureHead
from ..adapters.fitting import Features, Steps, folds
from ..encoders import DualEncoder

_REPEATS = 3  # of cross-validation, each with different folds
_NEIGHBOURS = 5
_FAR = 3.0  # interquartile ranges above the upper quartile: "far out" in Tukey's words
_ROUNDING = 1e-3  # of cosines, where nearly all pictures are alike
_BLOCK = 2048  # pictures that are compared with all others at a time


@dataclass(frozen=True)
class LabelError:
    """A picture that a head fitted without it assigns to another class; `score` is 1 - p(its label)."""

    row: int
    suggested: int
    score: float


def cross_validated(head: FeatureHead, encoder: DualEncoder, data: Features, steps: Steps) -> torch.Tensor | None:
    """Logits (n, c) of a head that is not fitted to the pictures it classifies, averaged over three repeats.

    The head's hyperparameters are searched once, on all pictures. The logits of a class's only picture are not finite,
    since without it the class is unknown; the result is None if every class has a single picture.

    Raises ValueError for features that are not finite and for classes without a picture.
    """
    if not folds(data.labels, steps.seed):
        return None
    logits = data.states.new_zeros(len(data.labels), len(head.config.class_names), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # warnings about few pictures
        head.fit(encoder, data, None, steps)
        head.config.search = False
        for repeat in range(_REPEATS):
            judged = torch.zeros_like(data.labels, dtype=torch.bool)
            for fitted, tried in folds(data.labels, steps.seed + repeat):
                head.fit(encoder, data.select(fitted), None, steps)
                with torch.no_grad():
                    answers = head.classify(encoder, data.states[0, tried].float(), head.texts(encoder))
                logits[tried] += answers.double() / _REPEATS
                judged[tried] = True
    logits[~judged] = torch.nan
    return logits


def label_errors(logits: torch.Tensor, labels: torch.Tensor) -> list[LabelError]:
    """The pictures whose cross-validated answer differs from their label, the least likely labels first.

    logits (n, c), labels (n,). Probabilities are calibrated by one temperature. Pictures whose logits are not finite
    are left out. Ranking by the probability of the given label is "self-confidence" in Northcutt, Jiang, Chuang:
    Confident Learning, JAIR 2021, arXiv 1911.00068; of the rankings tried here it found most swapped labels.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [1.0, 0.0], [9.0, 0.0]])
        >>> [error.row for error in label_errors(logits, torch.tensor([0, 1, 1, 1]))]
        [3, 2]
    """
    rows = logits.isfinite().all(-1).nonzero().squeeze(1)
    logits, labels = logits[rows].double(), labels[rows]
    if not len(rows):
        return []
    factors = [2.0 ** (power / 2) for power in range(-20, 11)]
    factor = min(factors, key=lambda factor: float(F.cross_entropy(factor * logits, labels)))
    log_odds = (factor * logits).log_softmax(-1)
    own, answers = log_odds.gather(1, labels[:, None]).squeeze(1), log_odds.argmax(-1)
    return [
        LabelError(int(rows[i]), int(answers[i]), 1 - float(own[i].exp()))
        for i in own.argsort().tolist()
        if answers[i] != labels[i]
    ]


def outliers(features: torch.Tensor) -> list[tuple[int, float]]:
    """Rows that are far from their nearest neighbours, and how far, the farthest first: unit features (n, d).

    The distance is 1 minus the mean cosine to the five nearest; far is more than three interquartile ranges above the
    upper quartile of all distances.

    Example:
        >>> features = torch.nn.functional.normalize(torch.tensor([[1.0, 0.01 * i] for i in range(20)] + [[0.0, 1.0]]))
        >>> [row for row, _ in outliers(features)]
        [20]
    """
    count = min(_NEIGHBOURS, len(features) - 1)
    if count < 1:
        return []
    parts = []
    for start in range(0, len(features), _BLOCK):
        cosines = features[start : start + _BLOCK].float() @ features.float().T
        itself = torch.arange(len(cosines), device=cosines.device)
        cosines[itself, start + itself] = -torch.inf
        parts.append(1 - cosines.topk(count).values.mean(-1))
    distance = torch.cat(parts).double()
    low, high = distance.quantile(torch.tensor([0.25, 0.75]).to(distance)).tolist()
    far = high + _FAR * (high - low) + _ROUNDING
    return [(i, float(distance[i])) for i in distance.argsort(descending=True).tolist() if distance[i] > far]
