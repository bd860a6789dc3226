"""What has been trained, by name: loaded onto its base model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from ..adapters.folder import read_method
from ..adapters.prompted import PromptedModel, undo
from ..adapters.registry import registered_methods
from ..adapters.tower_classifier import AdaptedModel
from ..encoders.loading import load_clip
from ..methods.lora import NOTE
from .old_formats import load_noted
from .run import base_and_revision, local_folder


def load_base_model(name_or_path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """The model that an adapter was trained on, at its revision; `kwargs` as in `load_clip`."""
    name, revision = base_and_revision(name_or_path)
    return load_clip(name, **({"revision": revision} if revision else {}), **kwargs)


def load_adapter(clip: PreTrainedModel, name_or_path: str | os.PathLike[str], **kwargs: Any) -> PeftModel:
    """Loads like `PeftModel.from_pretrained`, in evaluation mode, and explains what is wrong with a damaged folder.

    Of a repository on the Hub it fetches the adapter's own files and nothing else. Raises ValueError if the folder is
    missing, incomplete or damaged, or holds an adapter of another kind; HubError, an OSError, if the repository cannot
    be had. The base model is then as it was.
    """
    name, subfolder = os.path.expanduser(name_or_path), kwargs.get("subfolder") or ""
    hub = {key: kwargs.pop(key) for key in ("revision", "token", "cache_dir") if key in kwargs}
    folder = local_folder(name, subfolder=subfolder, **hub)
    method = read_method(Path(folder) / subfolder)
    if str(method).lower() not in registered_methods():
        known = ", ".join(sorted(registered_methods()))
        raise ValueError(f"{name!r} holds an adapter of the method {method!r}; known here: {known}.")
    plain = not isinstance(clip, PromptedModel)
    try:
        return PeftModel.from_pretrained(clip, folder, **kwargs)
    except Exception:
        if plain and isinstance(clip, PromptedModel):  # attached, before its weights turned out to be damaged
            undo(clip)
        raise


def load_trained(clip: PreTrainedModel, name_or_path: str | os.PathLike[str], **kwargs: Any) -> AdaptedModel:
    """What any method's `save_pretrained` wrote, on a fresh base model, in evaluation mode: a folder or Hub id.

    Raises ValueError if the folder is missing, incomplete or damaged, HubError if the repository cannot be had.
    """
    hub = {key: kwargs.pop(key) for key in ("revision", "token", "cache_dir") if key in kwargs}
    folder = local_folder(name_or_path, **hub)
    if os.path.isfile(os.path.join(folder, NOTE)):
        return load_noted(clip, folder)
    return load_adapter(clip, folder, torch_device=str(clip.device), **kwargs)
