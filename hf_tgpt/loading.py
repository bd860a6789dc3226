"""Base models, and the adapters on them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, CLIPModel

from .registry import methods

# The toy CLIP made by examples/pretrain_tiny_clip.py; it knows the toy world and nothing else.
TOY_CLIP = Path(__file__).parent / "assets" / "tiny-clip"
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def load_clip(name_or_path: str | os.PathLike, **kwargs) -> CLIPModel:
    """`CLIPModel.from_pretrained` in float32, for a Hub id or folder.

    A local folder with a config.json but no weights gives a model with random weights, for trying out real sizes.
    Raises ValueError if the name leads to no model or to one that is not a CLIP.
    """
    name = os.path.expanduser(name_or_path)
    folder = Path(name)
    if name.startswith((".", os.sep)) and not folder.is_dir():
        raise ValueError(f"`model`={name!r} is not a folder; correct the path, or name a CLIP on the Hub.")
    try:
        config = AutoConfig.from_pretrained(name, revision=kwargs.get("revision"), token=kwargs.get("token"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`model`={name!r}: no model config could be loaded from it ({error}).") from error
    if config.model_type != "clip":
        raise ValueError(
            f"`model`={name!r} is a {config.model_type!r} model, not a CLIP with both towers; choose a CLIP."
        )
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        with torch.random.fork_rng(devices=[]):  # the same random weights each time, so that adapters can come back
            torch.manual_seed(0)
            model = CLIPModel(config)
        model.name_or_path = name
        return model
    return CLIPModel.from_pretrained(name, **({"dtype": torch.float32} | kwargs))


def load_adapter(clip: CLIPModel, name_or_path: str | os.PathLike, **kwargs) -> PeftModel:
    """`PeftModel.from_pretrained`, in evaluation mode, after a look at the folder that says what is wrong with it.

    Raises ValueError if a local folder is missing, incomplete or damaged, or holds an adapter of another kind.
    """
    name = os.path.expanduser(name_or_path)
    path = Path(name) / kwargs.get("subfolder", "") / "adapter_config.json"
    if name.startswith((".", os.sep)) or Path(name).is_dir():
        if not path.is_file():
            raise ValueError(f"There is no adapter in {name!r}: {path.name} is missing; correct the path.")
        try:
            method = json.loads(path.read_text())["peft_type"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r} is damaged ({error!r}); save or download the adapter again.") from error
        if str(method).lower() not in methods():
            raise ValueError(f"{name!r} holds an adapter of the method {method!r}; known here: {', '.join(methods())}.")
    return PeftModel.from_pretrained(clip, name, **kwargs)
