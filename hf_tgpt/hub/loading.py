"""Loads trained adapters, by name, onto their base models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from ..adapters.config import PromptConfig
from ..adapters.folder import read_config
from ..adapters.peft_towers import NOTE
from ..adapters.prompted import PromptedModel, undo
from ..adapters.tower_classifier import AdaptedModel
from ..encoders.loading import load_clip
from .old_formats import load_noted
from .run import base_and_revision, local_folder


def load_base_model(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The model that an adapter was trained on, at the commit that the adapter records.

    `revision`, `token` and `cache_dir` are for finding the adapter, `kwargs` for `load_clip`. Raises ValueError for a
    folder without an adapter, HubError if the repository cannot be downloaded.

    Example:
        >>> clip = hf_tgpt.load_base_model("me/my-pictures")
    """
    folder = local_folder(name_or_path, revision=revision, token=token, cache_dir=cache_dir)
    name, base_revision = base_and_revision(folder)
    hub = {"revision": base_revision, "token": token, "cache_dir": cache_dir}
    return load_clip(name, **{key: value for key, value in hub.items() if value is not None}, **kwargs)


def load_adapter(clip: PreTrainedModel, name_or_path: str | os.PathLike[str], **kwargs: Any) -> PeftModel:
    """Loads like `PeftModel.from_pretrained`, in evaluation mode, and explains what is wrong with a damaged folder.

    From a repository on the Hub it downloads only the adapter's own files. Raises ValueError if the folder is missing,
    incomplete or damaged, or contains an adapter of another kind; HubError, an OSError, if the repository cannot be
    downloaded. The base model is then unchanged.

    Example:
        >>> model = hf_tgpt.load_adapter(hf_tgpt.load_base_model("me/my-pictures"), "me/my-pictures")
    """
    name, subfolder = os.path.expanduser(name_or_path), kwargs.get("subfolder") or ""
    hub = {key: kwargs.pop(key) for key in ("revision", "token", "cache_dir") if key in kwargs}
    folder = local_folder(name, subfolder=subfolder, **hub)
    config = read_config(Path(folder) / subfolder)
    if not isinstance(config, PromptConfig):
        method = config.peft_type.value
        raise ValueError(f"{name!r} holds a plain PEFT adapter of the method {method!r}; load it with load_trained.")
    plain = not isinstance(clip, PromptedModel)
    try:
        return PeftModel.from_pretrained(clip, folder, **kwargs)
    except Exception:
        if plain and isinstance(clip, PromptedModel):  # attached before its weights proved to be damaged
            undo(clip)
        raise


def load_trained(clip: PreTrainedModel, name_or_path: str | os.PathLike[str], **kwargs: Any) -> AdaptedModel:
    """Loads what any method's `save_pretrained` wrote, a folder or Hub id, onto a fresh base model, in evaluation mode.

    `kwargs` are those of `PeftModel.from_pretrained`. Raises ValueError if the folder is missing, incomplete or
    damaged, HubError if the repository cannot be downloaded.

    Example:
        >>> model = hf_tgpt.load_trained(hf_tgpt.load_base_model("runs/my-run"), "runs/my-run")
    """
    subfolder = kwargs.get("subfolder") or ""
    hub = {key: kwargs.pop(key) for key in ("revision", "token", "cache_dir") if key in kwargs}
    folder = local_folder(name_or_path, subfolder=subfolder, **hub)
    if os.path.isfile(noted := os.path.join(folder, subfolder, NOTE)):
        if others := kwargs.keys() - {"subfolder"}:
            raise ValueError(f"`{min(others)}` is not an argument for the adapter in {folder!r}; leave it out.")
        return load_noted(clip, os.path.dirname(noted))
    return load_adapter(clip, folder, torch_device=str(clip.device), **kwargs)
