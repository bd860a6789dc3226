"""The stages of a training, checked before its first step."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from ..adapters.learner import Stage
from ..adapters.prompted import SLOT
from .config import TrainingConfig

# What a stage may change: the settings of the optimizer, its schedule and the steps.
_OWN = {
    "optimizer", "learning_rate", "weight_decay", "adam_epsilon", "warmup_steps", "warmup_epochs",
    "warmup_learning_rate", "max_grad_norm", "non_finite",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Span:
    """A stage from after step `first` to step `last`, with the names of the weights that it trains."""

    first: int
    last: int
    trained: frozenset[str]
    config: TrainingConfig


def plan(stages: list[Stage], steps: int, weights: Iterable[str], config: TrainingConfig) -> list[Span]:
    """The stages of a training run of this many steps, for a model that trains these weights.

    Raises ValueError for shares that do not add up to 1 or leave a stage without a step, for a stage that trains
    nothing, and for changes that a stage cannot make.
    """
    shares, weights = [stage.share for stage in stages], list(weights)
    ends = [round(steps * sum(shares[: i + 1])) for i in range(len(stages))]
    firsts = [0, *ends[:-1]]
    if abs(sum(shares) - 1) > 1e-6 or any(first >= last for first, last in zip(firsts, ends, strict=True)):
        raise ValueError(
            f"`stages` have shares {shares} of {steps} steps; the shares must add up to 1 and give each stage a step."
        )
    spans = []
    for number, (stage, first, last) in enumerate(zip(stages, firsts, ends, strict=True)):
        trained = frozenset(name for name in weights if stage.trains is None or stage.trains(own_name(name)))
        if not trained:
            names = [own_name(name) for name in weights]
            raise ValueError(f"`stages[{number}].trains` accepts none of {names}; make it accept at least one.")
        if unknown := sorted(stage.changes.keys() - _OWN):
            raise ValueError(
                f"`stages[{number}].changes` has {unknown[0]!r}; what a stage may change is {', '.join(sorted(_OWN))}."
            )
        spans.append(Span(first, last, trained, dataclasses.replace(config, **stage.changes)))
    return spans


def own_name(name: str) -> str:
    """A weight's name within its learner, from its name in the whole model."""
    return re.sub(rf"^.*\b{re.escape(SLOT)}\.learners\.[^.]+\.", "", name)
