"""Trained classifiers as modules that take only pixel values, as exporters need."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..encoders import DualEncoder
from ..encoders.walk import unit


class LinearClassifier(nn.Module):
    """An image tower and a linear layer on its unit features: weight (c, d), bias (c,)."""

    def __init__(
        self,
        image_states: Callable[[DualEncoder, torch.Tensor], torch.Tensor],
        encoder: DualEncoder,
        weight: torch.Tensor,
        bias: torch.Tensor,
    ):
        super().__init__()
        self.model, self.encoder, self.image_states = encoder.model, encoder, image_states
        self.weight, self.bias = nn.Buffer(weight), nn.Buffer(bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(b, 3, h, w) -> logits (b, c)."""
        return F.linear(unit(self.image_states(self.encoder, pixel_values)), self.weight, self.bias)


class WholeModel(nn.Module):
    """A learner with everything that it reads."""

    def __init__(self, learner: nn.Module, encoder: DualEncoder):
        super().__init__()
        self.learner, self.model, self.encoder = learner, encoder.model, encoder

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(b, 3, h, w) -> logits (b, c)."""
        return self.learner(self.encoder, pixel_values).logits
