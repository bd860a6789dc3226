"""A head on frozen features tried on pictures that it is not fitted to: its search, and its logits."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..encoders import DualEncoder
from .fitting import Features, Steps, held_out

# With more training pictures one fold in four is enough, and values are searched one field after the other.
_MANY = 2000
_CAUTION = 0.5  # standard errors
_MILESTONES = 20  # numbers of epochs that are tried
Choice = tuple[float, ...]  # a value for each name that is searched
Score = tuple[float, float]  # hits, and the sum of losses


def search(
    head: Any, encoder: DualEncoder, data: Features, validation: Features | None, steps: Steps
) -> tuple[dict[str, float], int | None, dict[str, Any]]:
    """The best values of the `grid` of a `FeatureHead`, or for an empty grid the epoch to end with (None: the last),
    and facts about the search.

    They are tried on the validation pictures; without any, by cross-validation on the training pictures; and not at all
    if each class has one picture. Few pictures say little, so the given values stay unless others are right more often
    by more than half a standard error.
    """
    given: Choice = tuple(getattr(head.config, name) for name in head.grid) or (steps.epochs,)
    many = len(data.labels) > _MANY
    if validation is not None and len(validation.labels):
        parts, tried_on = [(data, validation)], f"{len(validation.labels)} validation pictures"
    else:
        parts = held_out(data, steps.seed)[: 1 if many else None]
        tried_on = f"cross-validation on {sum(len(tried.labels) for _, tried in parts)} training pictures"
    best = given
    if parts:
        scores: dict[Choice, Score] = {}
        for asked in range(len(head.grid)) if many and head.grid else [None]:
            leading = max(scores, key=lambda choice: _rank(scores[choice]), default=given)
            choices, found = _choices(head, leading, asked), dict[Choice, Score]()
            for train, tried in parts:
                for choice, (hits, loss) in _trials(head, encoder, train, tried, steps, given, choices):
                    before = found.get(choice, (0.0, 0.0))
                    found[choice] = (before[0] + hits, before[1] + loss)
            scores |= found
        count = sum(len(tried.labels) for _, tried in parts)
        best = max(scores, key=lambda choice: _rank(scores[choice]))
        hits = scores[best][0]
        if hits - scores[given][0] <= _CAUTION * math.sqrt(hits * (1 - hits / count)):
            best = given
    values = dict(zip(head.grid or ["epochs"], best, strict=True))
    told: dict[str, Any] = {"searched": values if parts else {}, "searched_on": tried_on if parts else None}
    return (values, None, told) if head.grid else ({}, int(best[0]), told)


def _rank(score: Score) -> tuple[float, float]:
    """By hits, then by loss."""
    return score[0], -score[1]


def _choices(head: Any, leading: Choice, field: int | None) -> list[Choice]:
    """All combinations of values; with `field` all values of that field, with the other fields' leading values."""
    values = list(head.grid.values())
    if field is None:
        return list(itertools.product(*values))
    return [(*leading[:field], value, *leading[field + 1 :]) for value in values[field]]


def _trials(
    head: Any,
    encoder: DualEncoder,
    train: Features,
    tried: Features,
    steps: Steps,
    given: Choice,
    choices: Sequence[Choice],
) -> Iterator[tuple[Choice, Score]]:
    """Fits to some pictures, and yields each choice's score on others, including the given choice's."""
    if not head.grid:
        every = max(1, steps.epochs // _MILESTONES)
        head.start(encoder, train)
        for number, _ in enumerate(head.epochs(encoder, train, steps), 1):
            if number % every == 0 and number < steps.epochs:
                yield (number,), head.score(encoder, tried)
        yield given, head.score(encoder, tried)
        return
    as_given = dict(zip(head.grid, given, strict=True))
    for number, choice in enumerate(dict.fromkeys([given, *choices])):
        values = dict(zip(head.grid, choice, strict=True))
        if number == 0 or head.grid_is_trained_with:
            head.fit_with(encoder, train, steps, values, as_given)
        else:
            head.settle(values)
        yield choice, head.score(encoder, tried)


def out_of_fold_logits(
    head: Any, encoder: DualEncoder, data: Features, as_is: torch.Tensor, steps: Steps
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (m, c) of training pictures by heads that were fitted to the others, and their labels (m,).

    `head`, a fitted `FeatureHead`, does not change; its copies use the values that its search found. `data` are the
    views (v, n, d) that it was fitted to, `as_is` the pictures' features without augmentation (n, d). Classes with a
    single picture are left out. Raises ValueError if there are no others.
    """
    count = len(data.states)
    both = Features(torch.cat([data.states, as_is[None].to(data.states)]), data.labels)
    values = {name: getattr(head.config, name) for name in head.grid}
    last = None if head.grid else (head.noted("searched", {}) or {}).get("epochs")
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for train, tried in held_out(both, steps.seed):
        copied = copy.deepcopy(head, {id(weight): weight for weight in encoder.text_parameters()})  # these are shared
        copied.requires_grad_(True)._trying = True
        copied.fit_with(encoder, Features(train.states[:count], train.labels), steps, values, values, last)
        with torch.no_grad():
            logits = copied.eval().classify(encoder, tried.states[count].float(), copied.texts(encoder))
        found.append((logits.float(), tried.labels))
    if not found:
        raise ValueError("every class has a single training picture, so none can be held out; give other pictures.")
    return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])
