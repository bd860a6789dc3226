"""Base models by name, and their processors."""

from __future__ import annotations

import copy
import itertools
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from ..utils.compat import commit_of, pil_image_processor
from ..utils.names import name_here
from . import encoder_of, families, model_class_of, naflex_remedy
from .precision import cast_towers

# The config field for the commit of its repository that a model was loaded from.
REVISION = "_commit_hash"
_REMEDY = (
    "connect to the Hub (and unset HF_HUB_OFFLINE) to have it fetched, or name a folder with config, weights, "
    "tokenizer and preprocessor_config.json, such as one that `hf download` wrote."
)
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def load_clip(name_or_path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """A CLIP or another dual encoder in float32: `from_pretrained` for a Hub id or folder.

    Other dual encoders are those of `encoders.FAMILIES`, and for methods on frozen features every model that
    transformers lists for zero-shot image classification and that has `get_image_features` and `get_text_features`.

    A local folder with a config.json but no weights gives a model with random weights, for trying out real sizes. For a
    Hub id the commit is recorded, so that adapters trained on the model can name it. With `dtype`, a torch.dtype, the
    towers have that type; the scale and bias of the logits stay in float32.

    Raises ValueError if there is no model of this name, or if it is of another kind or lacks a tower's weights.

    Example:
        >>> clip = hf_tgpt.load_clip("openai/clip-vit-base-patch16")
    """
    if isinstance(dtype := kwargs.get("dtype"), torch.dtype) and dtype != torch.float32:
        return cast_towers(load_clip(name_or_path, **kwargs | {"dtype": torch.float32}), dtype)
    name = name_here(os.path.expanduser(name_or_path))
    folder = Path(name)
    if name.startswith((".", os.sep)) and not folder.is_dir():
        raise ValueError(f"`model`={name!r} is not a folder; correct the path, or name a CLIP on the Hub.")
    try:
        if not folder.is_dir():
            hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
            kwargs["revision"], commit = commit_of(name, **hub)
        config = AutoConfig.from_pretrained(name, revision=kwargs.get("revision"), token=kwargs.get("token"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`model`={name!r}: no model config could be loaded from it ({error}); {_REMEDY}") from error
    class_name = model_class_of(config.model_type)
    if class_name is None:
        raise ValueError(
            f"`model`={name!r} is a {config.model_type!r} model, not a CLIP with both towers; choose a model of one of "
            f"these classes: {families()}{naflex_remedy(config.model_type)}."
        )
    model_class = getattr(transformers, class_name)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        with torch.random.fork_rng(devices=[]):  # the same random weights each time, so that adapters still fit
            torch.manual_seed(0)
            model = model_class(config)
        model.name_or_path = name
        return model
    try:
        model, found = model_class.from_pretrained(
            name, output_loading_info=True, **({"dtype": torch.float32} | kwargs)
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"`model`={name!r}: its weights could not be loaded ({error}); {_REMEDY}") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"`model`={name!r} lacks {len(missing)} of the weights of a {class_name}, such as {missing[0]!r}, so it is "
            "only one tower or a model for another task; name the model with both towers that it was made from."
        )
    if not folder.is_dir():
        setattr(model.config, REVISION, commit)
    return model


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that has the same tensors: weights are in memory once, and its modules are its own.

    An adapter that is put on the copy, or a layer that is replaced there, leaves the first as it is. Training the
    weights themselves changes both.

    Example:
        >>> other = sharing_weights(clip)
        >>> other.logit_scale is clip.logit_scale, other.vision_model is clip.vision_model
        (True, False)
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def load_image_processor(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Any:
    """A base model's image processor. Raises ValueError if it has none."""
    name = name_here(os.fspath(name_or_path))
    at = {"revision": revision} if revision else {}
    try:
        settings, _ = pil_image_processor().get_image_processor_dict(name, **at)
        kind = str(settings.get("image_processor_type")).removesuffix("Fast").removesuffix("Pil")
        return pil_image_processor(kind).from_pretrained(name, **at)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The base model {name!r} has no image processor that could be loaded ({error}); name a copy with its "
            "preprocessor_config.json."
        ) from error


def check_picture_size(model: PreTrainedModel, size: int) -> None:
    """Raises ValueError if the processor makes pixel values of another size than the model's."""
    encoder = encoder_of(model)
    if encoder.takes_prompts and size != (own := encoder.shape()["image_size"]):
        raise ValueError(
            f"The base model {model.name_or_path!r} takes pictures of {own} x {own} pixels, but its "
            f"preprocessor_config.json makes pictures of {size} x {size}; replace it with the model's own."
        )


def check_device(device: str | torch.device) -> None:
    """Raises ValueError for a device that does not exist."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by its kind: torch may be built without it
        reason = str(error).partition("\n")[0]
        raise ValueError(f"`device`={str(device)!r} cannot be used here ({reason}); choose another.") from error
