"""Fingerprints by which an adapter recognises the model it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from .base import DualEncoder

_MARKS = 8


def fingerprint(encoder: DualEncoder) -> list[float] | None:
    """The first weights of both projections; None if they cannot be read (quantised, sharded, on meta)."""
    marks: list[float] = []
    for layer in encoder.projections():
        weight = layer.weight
        if not isinstance(weight, torch.Tensor) or type(weight.data) is not torch.Tensor:
            return None
        if not weight.is_floating_point() or weight.is_meta or weight.dim() < 2 or weight.numel() < _MARKS:
            return None
        marks += weight.detach().flatten()[:_MARKS].float().tolist()
    return [float(f"{value:.5g}") for value in marks]


def hash_of_weights(settings: Any, weights: Iterable[torch.Tensor]) -> str:
    """The SHA-256, in hexadecimal, of settings as Python writes them and of the bytes of tensors, in order."""
    digest = hashlib.sha256(repr(settings).encode("utf-8", "surrogatepass"))
    for weight in weights:
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def same_weights(before: list[float] | None, here: list[float] | None) -> bool:
    """Whether two fingerprints are of one model, up to rounding in bf16; true if one is unknown."""
    if not before or not here or len(before) != len(here):
        return True
    a, b = torch.tensor(before), torch.tensor(here)
    return bool((a - b).norm() <= 0.02 * a.norm())
