"""How an adapter is trained: the fields of a recipe, and the optimizer and learning rate that they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

OPTIMIZERS = ("sgd", "adamw")
NON_FINITE = ("stop", "skip")


@dataclass
class TrainingConfig:
    """How an adapter is trained; the papers' recipes are files of these fields in `hf_tgpt/recipes`."""

    optimizer: str = field(default="adamw", metadata={"help": "'sgd' (momentum 0.9) or 'adamw'."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Of the optimizer, on all adapter weights."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon. Ignored with sgd."})
    batch_size: int = field(
        default=8, metadata={"help": "Images per optimizer step, over all processes and accumulated batches together."}
    )
    gradient_accumulation_steps: int = field(
        default=1,
        metadata={
            "help": "Parts that a process computes its images of a step in, for less memory. Each part computes the "
            "class texts anew where the method has any."
        },
    )
    epochs: int = field(default=10, metadata={"help": "Passes over the training images. Ignored with max_steps."})
    max_steps: int | None = field(default=None, metadata={"help": "Optimizer steps in all (the papers' iterations)."})
    warmup_steps: int = field(default=0, metadata={"help": "First steps, before the cosine starts."})
    warmup_epochs: int = field(default=0, metadata={"help": "The same in epochs; both add up."})
    warmup_learning_rate: float | None = field(
        default=None, metadata={"help": "Constant rate of the warm-up. Default: a linear rise to the peak."}
    )
    max_grad_norm: float | None = field(default=None, metadata={"help": "Clips the adapter's gradient. Default: off."})
    non_finite: str = field(
        default="stop",
        metadata={
            "help": "At a loss or gradient that is not finite: 'stop', or 'skip' the step, up to an epoch's in a row."
        },
    )
    evaluate_every: int = field(
        default=1, metadata={"help": "Epochs between validations, which choose the best adapter."}
    )
    save_every: int = field(default=1, metadata={"help": "Epochs between checkpoints to resume from; 0 for none."})
    keep_checkpoints: int = field(default=1, metadata={"help": "How many of the newest stay."})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode images, per training process."})
    seed: int = field(
        default=0, metadata={"help": "Of the draw of shots, the adapter's start, order and augmentation."}
    )

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"`optimizer`={self.optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}.")
        if self.non_finite not in NON_FINITE:
            raise ValueError(f"`non_finite`={self.non_finite!r} is unknown; choose one of {', '.join(NON_FINITE)}.")
        positive = ("learning_rate", "batch_size", "gradient_accumulation_steps", "epochs", "evaluate_every")
        for name in (*positive, "keep_checkpoints", "max_steps", "max_grad_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"`{name}`={getattr(self, name)} must be above 0.")
        for name in ("weight_decay", "warmup_steps", "warmup_epochs", "save_every", "num_workers", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}`={getattr(self, name)} must be 0 or more.")


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    peak, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=peak, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(weights, lr=peak, eps=config.adam_epsilon, weight_decay=decay)


def rate(step: int, steps: int, steps_per_epoch: int, config: TrainingConfig) -> float:
    """The learning rate at a step, as a share of the peak: warm-up, then half a cosine down to 0."""
    warmup = min(config.warmup_steps + config.warmup_epochs * steps_per_epoch, steps)
    if step < warmup:
        constant = config.warmup_learning_rate
        return (step + 1) / warmup if constant is None else constant / config.learning_rate
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
