"""Base models, and what is trained on them, by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import resolve_revision
from huggingface_hub.errors import RevisionResolutionError
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, CLIPModel

from .base_model import TOY_CLIP as TOY_CLIP
from .base_model import name_here
from .config import read_config, read_method
from .hub import download
from .prompted import undo
from .reading import read_json
from .references import NOTE, REFERENCES, Reference, load_reference, read_note
from .registry import config_class, methods
from .tuner import REVISION

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def load_clip(name_or_path: str | os.PathLike[str], **kwargs: Any) -> CLIPModel:
    """`CLIPModel.from_pretrained` in float32, for a Hub id or folder.

    A local folder with a config.json but no weights gives a model with random weights, for trying out real sizes. Of a
    Hub id the commit is noted, so that adapters trained on the model can name it.

    Raises ValueError if the name leads to no model or to one that is not a CLIP.
    """
    name = name_here(os.path.expanduser(name_or_path))
    folder = Path(name)
    if name.startswith((".", os.sep)) and not folder.is_dir():
        raise ValueError(f"`model`={name!r} is not a folder; correct the path, or name a CLIP on the Hub.")
    try:
        if not folder.is_dir():
            hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
            kwargs["revision"] = resolve_revision(name, **hub)
        config = AutoConfig.from_pretrained(name, revision=kwargs.get("revision"), token=kwargs.get("token"))
    except (OSError, ValueError, RevisionResolutionError) as error:
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
    model = CLIPModel.from_pretrained(name, **({"dtype": torch.float32} | kwargs))
    if not folder.is_dir():
        setattr(model.config, REVISION, kwargs["revision"].resolved)
    return model


def load_adapter(clip: CLIPModel, name_or_path: str | os.PathLike[str], **kwargs: Any) -> PeftModel:
    """`PeftModel.from_pretrained`, in evaluation mode, after a look at the files that says what is wrong with them.

    Of a repository on the Hub it fetches the adapter's own files and nothing else. Raises ValueError if the folder is
    missing, incomplete or damaged, or holds an adapter of another kind; HubError, an OSError, if the repository cannot
    be had. The CLIP is then as it was.
    """
    name, subfolder = os.path.expanduser(name_or_path), kwargs.get("subfolder") or ""
    hub = {key: kwargs.pop(key) for key in ("revision", "token", "cache_dir") if key in kwargs}
    folder = local_folder(name, subfolder=subfolder, **hub)
    method = read_method(Path(folder) / subfolder)
    if str(method).lower() not in methods():
        raise ValueError(f"{name!r} holds an adapter of the method {method!r}; known here: {', '.join(methods())}.")
    plain = type(clip) is CLIPModel
    try:
        return PeftModel.from_pretrained(clip, folder, **kwargs)
    except Exception:
        if plain and type(clip) is not CLIPModel:  # attached, before its weights turned out to be damaged
            undo(clip)
        raise


def method_configs() -> dict[str, type]:
    """The configs of all methods, the references too, by the names they have on the command line."""
    return methods() | {name: kind.config_class for name, kind in REFERENCES.items()}


def make_classifier(method: str, clip: CLIPModel, class_names: list[str], **fields: Any) -> PeftModel | Reference:
    """The model of any method, to be trained: a PeftModel for a prompt method, else a module of `references.py`.

    `fields` are those of the method's config. Raises ValueError for an unknown method or bad fields.
    """
    if method in REFERENCES:
        kind = REFERENCES[method]
        return kind(clip, class_names, kind.config_class(**fields))
    return get_peft_model(clip, config_class(method)(class_names=class_names, **fields))


def load_trained(clip: CLIPModel, name_or_path: str | os.PathLike[str], **kwargs: Any) -> PeftModel | Reference:
    """What any method's `save_pretrained` wrote, on a fresh CLIP, in evaluation mode: a folder or Hub id.

    Raises ValueError if the folder is missing, incomplete or damaged, HubError if the repository cannot be had.
    """
    hub = {key: kwargs.pop(key) for key in ("revision", "token", "cache_dir") if key in kwargs}
    folder = local_folder(name_or_path, **hub)
    if os.path.isfile(os.path.join(folder, NOTE)):
        return load_reference(clip, folder)
    return load_adapter(clip, folder, torch_device=str(clip.device), **kwargs)


def results_of(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """What training measured of an adapter or a reference, its results.json; empty where there is none.

    Raises ValueError if it is damaged.
    """
    file = Path(local_folder(name_or_path)) / "results.json"
    results = read_json(file) if file.is_file() else {}
    if not isinstance(results, dict):
        raise ValueError(f"{str(file)!r} holds no JSON object; train again, or remove it.")
    return results


def load_base_model(name_or_path: str | os.PathLike[str], **kwargs: Any) -> CLIPModel:
    """The CLIP that an adapter was trained on, at its revision; `kwargs` as in `load_clip`."""
    name, revision = base_and_revision(name_or_path)
    return load_clip(name, **({"revision": revision} if revision else {}), **kwargs)


def base_and_revision(name_or_path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """The base model that an adapter or a reference was trained on, a Hub id or folder, and its revision where known.

    Raises ValueError if its config does not tell.
    """
    folder = local_folder(name_or_path)
    if os.path.isfile(os.path.join(folder, NOTE)):
        base, revision = name_here(read_note(folder)["base_model"]), None
    else:
        config = read_config(folder)
        base, revision = config.base_model_name_or_path, config.revision
    if not base:
        raise ValueError(f"{os.fspath(name_or_path)!r} does not tell its base model; name it by `model`.")
    return base, revision


def local_folder(name_or_path: str | os.PathLike[str], **hub: Any) -> str:
    """The folder itself, or that in the cache with the files of a repository; `hub` goes to `hub.download`."""
    name = os.path.expanduser(name_or_path)
    return name if name.startswith((".", os.sep)) or os.path.isdir(name) else download(name, **hub)


def check_device(device: str | torch.device) -> None:
    """Raises ValueError for a device that there is not."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by its kind, as torch was built
        reason = str(error).partition("\n")[0]
        raise ValueError(f"`device`={str(device)!r} cannot be used here ({reason}); choose another.") from error


def change_config(model: PeftModel | Reference, fields: dict[str, str]) -> dict[str, str]:
    """Sets fields of the active adapter's config, written as JSON or as bare words, such as {"wise_ft": "0.5"}.

    Returns what they were, written the same way. Raises ValueError for a model without such a config, a field that
    may not change and a value that it cannot have.
    """
    if not isinstance(model, PeftModel):
        raise ValueError("`change`: only a prompt method's adapter has a config to change.")
    config = model.peft_config[model.active_adapter]
    before = {}
    for name, text in fields.items():
        if name not in config.changeable:
            known = ", ".join(config.changeable) or "none"
            raise ValueError(
                f"`change`: {name!r} is no field of {type(config).__name__} that may change after training; those "
                f"that may: {known}."
            )
        before[name] = json.dumps(getattr(config, name))
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        setattr(config, name, value)
    config.__post_init__()
    return before
