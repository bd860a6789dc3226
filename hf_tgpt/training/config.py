"""How an adapter is trained: a recipe's fields, and the optimizer and learning rate that they define."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from ..adapters.fitting import Steps
from ..utils.fields import above, at_least, at_most, checked, documented, one_of

_SEEDS = 2**32 - 1  # numpy's


@checked
class TrainingConfig:
    """How an adapter is trained; the papers' recipes are files of these fields in `hf_tgpt/recipes`.

    Example:
        >>> config = TrainingConfig(optimizer="sgd", learning_rate=0.0035, batch_size=4, epochs=5)
    """

    optimizer: str = documented("adamw", "'sgd' (momentum 0.9) or 'adamw'.", one_of("sgd", "adamw"))
    learning_rate: float = documented(2e-3, "Peak learning rate.", above(0))
    weight_decay: float = documented(5e-4, "Weight decay of the optimizer, for all adapter weights.", at_least(0))
    adam_epsilon: float = documented(1e-8, "AdamW's epsilon. Ignored with sgd.", at_least(0))
    crop_scale: float = documented(
        0.08,
        "Smallest share of a picture's area in a random training crop; 1 is the whole area. Default: as in CoOp; "
        "methods on frozen features use 0.5.",
        above(0),
        at_most(1),
    )
    batch_size: int = documented(
        8, "Images per optimizer step, summed over all processes and accumulated parts.", above(0)
    )
    gradient_accumulation_steps: int = documented(
        1,
        "Number of parts into which each process splits its images of a step, to save memory. Each part encodes the "
        "class texts again, if the method has any.",
        above(0),
    )
    epochs: int = documented(10, "Passes over the training images. Ignored with max_steps.", above(0))
    max_steps: int | None = documented(None, "Total number of optimizer steps (iterations in the papers).", above(0))
    warmup_steps: int = documented(
        0,
        "Steps before the cosine schedule starts; a tenth of all steps if the run has no more steps than that.",
        at_least(0),
    )
    warmup_epochs: int = documented(0, "Epochs of warm-up, in addition to warmup_steps.", at_least(0))
    warmup_learning_rate: float | None = documented(
        None, "Constant learning rate of the warm-up. Default: a linear rise to the peak.", at_least(0)
    )
    max_grad_norm: float | None = documented(
        None, "Norm to which the adapter's gradient is clipped. Default: off.", above(0)
    )
    non_finite: str = documented(
        "stop",
        "If a loss or gradient is not finite: 'stop', or 'skip' the step (at most an epoch's steps in a row).",
        one_of("stop", "skip"),
    )
    evaluate_every: int = documented(1, "Epochs between validations, which select the best adapter.", above(0))
    save_every: int = documented(1, "Epochs between checkpoints to resume from; 0 for none.", at_least(0))
    keep_checkpoints: int = documented(1, "Number of newest checkpoints to keep.", above(0))
    num_workers: int = documented(0, "Processes that decode images, per training process.", at_least(0))
    seed: int = documented(
        0,
        "Seed of the few-shot draw, the adapter's initial weights, the order of images and their augmentation.",
        at_least(0),
        at_most(_SEEDS),
    )


def make_optimizer(weights: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer for the weights that require a gradient."""
    weights = [weight for weight in weights if weight.requires_grad]
    peak, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=peak, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(weights, lr=peak, eps=config.adam_epsilon, weight_decay=decay)


def warmup_steps(steps: int, steps_per_epoch: int, config: TrainingConfig) -> int:
    """The number of warm-up steps: the config's or, if that would be all of `steps`, a tenth."""
    wanted = config.warmup_steps + config.warmup_epochs * steps_per_epoch
    return wanted if wanted < steps else steps // 10


def rate(step: int, steps: int, steps_per_epoch: int, config: TrainingConfig) -> float:
    """The learning rate at a step, as a share of the peak: warm-up, then half a cosine down to 0."""
    warmup = warmup_steps(steps, steps_per_epoch, config)
    if step < warmup:
        constant = config.warmup_learning_rate
        return (step + 1) / warmup if constant is None else constant / config.learning_rate
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def steps_of(config: TrainingConfig) -> Steps:
    """The config in the form for methods that are fitted to features."""
    return Steps(
        optimizer=lambda weights: make_optimizer(weights, config),
        rate=lambda step, steps, per_epoch: rate(step, steps, per_epoch, config),
        epochs=config.epochs,
        max_steps=config.max_steps,
        max_grad_norm=config.max_grad_norm,
        batch_size=config.batch_size,
        seed=config.seed,
    )
