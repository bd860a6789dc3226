"""What an adapter notes of the CLIP it was trained on: a name that also means it elsewhere, and marks to know it by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import torch
from transformers import CLIPModel

# The toy CLIP made by examples/pretrain_tiny_clip.py; it knows the toy world and nothing else.
TOY_CLIP = Path(__file__).parent / "assets" / "tiny-clip"
# What files call it, because its folder is another one on every machine.
TOY_NAME = "hf-tgpt-toy-clip"
_MARKS = 8
_Name = TypeVar("_Name", str, str | None)


def name_in_files(name: str | None) -> str | None:
    return TOY_NAME if name and Path(name).resolve() == TOY_CLIP.resolve() else name


def name_here(name: _Name) -> _Name:
    return str(TOY_CLIP) if name == TOY_NAME else name


def public_name(name: str | None) -> str | None:
    """A Hub id; None for a path, which means nothing to anybody else, and for the toy CLIP."""
    return name if name and name.count("/") == 1 and not os.path.exists(name) and ":" not in name else None


def fingerprint(clip: CLIPModel) -> list[float] | None:
    """The first weights of both projections; None where they cannot be read (quantised, sharded, on meta)."""
    found = []
    for layer in (clip.text_projection, clip.visual_projection):
        weight = layer.weight
        if not weight.is_floating_point() or weight.is_meta or weight.dim() != 2 or weight.numel() < _MARKS:
            return None
        found += weight.detach().flatten()[:_MARKS].float().tolist()
    return [float(f"{value:.5g}") for value in found]


def same_weights(before: list[float] | None, here: list[float] | None) -> bool:
    """Whether two fingerprints are of one CLIP, up to the rounding of bf16; also where one is unknown."""
    if not before or not here or len(before) != len(here):
        return True
    a, b = torch.tensor(before), torch.tensor(here)
    return bool((a - b).norm() <= 0.02 * a.norm())
