"""The values that a head on frozen features leaves open, searched on pictures that it is not fitted to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from ..encoders import DualEncoder
from .fitting import Features, Steps, held_out

_CAUTION = 0.5  # standard errors
_MILESTONES = 20  # numbers of epochs that are tried
Choice = tuple[float, ...]  # a value for each name that is searched
Score = tuple[float, float]  # hits, and the sum of losses


def search(
    head: Any, encoder: DualEncoder, data: Features, validation: Features | None, steps: Steps
) -> tuple[dict[str, float], int | None, dict[str, Any]]:
    """The best values of the `grid` of a `FeatureHead`, or for an empty one the epoch to end with (None: the last), and
    what is to be told of it.

    They are tried on the validation pictures, without any by cross-validation on the training pictures, and where each
    class has one picture not at all. Few pictures tell little: the values given stay unless others are right more often
    by more than half a standard error.
    """
    given = tuple(getattr(head.config, name) for name in head.grid) or (steps.epochs,)
    if validation is not None and len(validation.labels):
        parts, tried_on = [(data, validation)], f"{len(validation.labels)} validation pictures"
    else:
        parts = held_out(data, steps.seed)
        tried_on = f"cross-validation on {sum(len(tried.labels) for _, tried in parts)} training pictures"
    best = given
    if parts:
        scores: dict[Choice, Score] = {}
        for train, tried in parts:
            for choice, (hits, loss) in _trials(head, encoder, train, tried, steps, given):
                before = scores.get(choice, (0.0, 0.0))
                scores[choice] = (before[0] + hits, before[1] + loss)
        count = sum(len(tried.labels) for _, tried in parts)
        best = max(scores, key=lambda choice: (scores[choice][0], -scores[choice][1]))  # by hits, then by loss
        hits = scores[best][0]
        if hits - scores[given][0] <= _CAUTION * math.sqrt(hits * (1 - hits / count)):
            best = given
    values = dict(zip(head.grid or ["epochs"], best, strict=True))
    told: dict[str, Any] = {"searched": values if parts else {}, "searched_on": tried_on if parts else None}
    return (values, None, told) if head.grid else ({}, int(best[0]), told)


def _trials(
    head: Any, encoder: DualEncoder, train: Features, tried: Features, steps: Steps, given: Choice
) -> Iterator[tuple[Choice, Score]]:
    """Fits to some pictures, and yields the score on others of each choice, the given one among them."""
    if not head.grid:
        every = max(1, steps.epochs // _MILESTONES)
        head.start(encoder, train)
        for number, _ in enumerate(head.epochs(encoder, train, steps), 1):
            if number % every == 0 and number < steps.epochs:
                yield (number,), head.score(encoder, tried)
        yield given, head.score(encoder, tried)
        return
    as_given = dict(zip(head.grid, given, strict=True))
    for number, choice in enumerate(dict.fromkeys([given, *itertools.product(*head.grid.values())])):
        values = dict(zip(head.grid, choice, strict=True))
        if number == 0 or head.grid_is_trained_with:
            head.fit_with(encoder, train, steps, values, as_given)
        else:
            head.settle(values)
        yield choice, head.score(encoder, tried)
