"""What a method is fitted with: features of the training images, and the steps that the training config defines.

Letters as in `encoders/base.py`, and v views of each of n pictures, c classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..encoders.walk import unit

_FOLDS = 4


@dataclass(frozen=True)
class Features:
    """Pictures as the frozen image tower encodes them, not normalised.

    Shapes: `states` (v, n, ...), the output of `PromptLearner.image_states` for each view, with most methods image
    features (v, n, d); `labels` (n,).
    """

    states: torch.Tensor
    labels: torch.Tensor

    def select(self, rows: torch.Tensor) -> Features:
        """All views of some of the pictures."""
        return Features(self.states[:, rows], self.labels[rows])

    def averaged(self) -> torch.Tensor:
        """The unit features of the pictures' mean views (n, d)."""
        return unit(self.states.float().mean(0))

    def every_view(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Each view as a picture of its own: states (v * n, ...), labels (v * n,)."""
        return self.states.flatten(0, 1), self.labels.repeat(len(self.states))


@dataclass(frozen=True)
class Steps:
    """How weights are trained: `rate(step, steps, steps_per_epoch)` is a share of the optimizer's learning rate."""

    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    rate: Callable[[int, int, int], float]
    epochs: int
    max_steps: int | None
    max_grad_norm: float | None
    batch_size: int
    seed: int


def by_steps(
    weights: Sequence[nn.Parameter],
    loss_and_logits: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    data: Features,
    steps: Steps,
) -> Iterator[dict[str, float]]:
    """Trains weights on batches of features (b, ...) and labels (b,), and yields a row of the history after each epoch.

    Epoch e uses view e of every picture, and starts again with the first after the last. As in training on pictures, an
    incomplete last batch is left out. Raises FloatingPointError for a loss that is not finite.
    """
    count, views = len(data.labels), len(data.states)
    size = min(steps.batch_size, count)
    per_epoch = count // size
    total = steps.epochs * per_epoch if steps.max_steps is None else steps.max_steps
    optimizer = steps.optimizer(weights)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for epoch in range(math.ceil(total / per_epoch)):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(steps.seed * 1_000_003 + epoch))
        losses, hits, done = 0.0, 0, min(per_epoch, total - epoch * per_epoch)
        for batch in range(done):
            share = steps.rate(epoch * per_epoch + batch, total, per_epoch)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
            rows = order[batch * size : (batch + 1) * size].to(data.labels.device)
            labels = data.labels[rows]
            loss, logits = loss_and_logits(data.states[epoch % views, rows], labels)
            if not loss.isfinite():
                raise FloatingPointError(f"The loss is not finite in epoch {epoch + 1}; lower `learning_rate`.")
            optimizer.zero_grad()
            loss.backward()
            if steps.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(weights, steps.max_grad_norm)
            optimizer.step()
            losses, hits = losses + loss.item(), hits + int((logits.argmax(-1) == labels).sum())
        yield {
            "step": epoch * per_epoch + done,
            "loss": losses / done,
            "train_accuracy": hits / (done * size),
            "learning_rate": optimizer.param_groups[0]["lr"],
        }


def held_out(data: Features, seed: int) -> list[tuple[Features, Features]]:
    """Cross-validation: the pictures to fit and to test on, for each fold; no folds if every class has one picture.

    All views of a picture stay together.
    """
    return [(data.select(fitted), data.select(tried)) for fitted, tried in folds(data.labels, seed)]


def folds(labels: torch.Tensor, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The rows to fit and to test on, for each fold of labels (n,); no folds if every class has one row.

    A class's rows are distributed over the folds. A single row is never held out, so every fit has every class.
    """
    generator = torch.Generator().manual_seed(seed)
    fold = torch.full((len(labels),), -1)
    for label in labels.unique():
        rows = (labels == label).nonzero().squeeze(1).cpu()
        if len(rows) > 1:
            fold[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % _FOLDS
    fold = fold.to(labels.device)
    numbers = [number for number in range(_FOLDS) if (fold == number).any()]
    return [((fold != number).nonzero().squeeze(1), (fold == number).nonzero().squeeze(1)) for number in numbers]
