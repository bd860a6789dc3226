"""Base models, and the adapters on them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoConfig, CLIPModel

# The toy CLIP made by examples/pretrain_tiny_clip.py; it knows the toy world and nothing else.
TOY_CLIP = Path(__file__).parent / "assets" / "tiny-clip"
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def load_clip(name_or_path: str | os.PathLike, **kwargs) -> CLIPModel:
    """`CLIPModel.from_pretrained` in float32, for a Hub id or folder.

    A local folder with a config.json but no weights gives a model with random weights, for trying out real sizes.
    Raises ValueError if the name leads to no model or to one that is not a CLIP.
    """
    name = os.fspath(name_or_path)
    folder = Path(name).expanduser()
    if name.startswith((".", "~", os.sep)) and not folder.is_dir():
        raise ValueError(f"`model`={name!r} is not a folder; correct the path, or name a CLIP on the Hub.")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"`model`={name!r}: no model config could be loaded from it ({error}).") from error
    if config.model_type != "clip":
        raise ValueError(
            f"`model`={name!r} is a {config.model_type!r} model, not a CLIP with both towers; choose a CLIP."
        )
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        model = CLIPModel(config)
        model.name_or_path = name
        return model
    return CLIPModel.from_pretrained(name, **({"dtype": torch.float32} | kwargs))
