"""The features of an adapter's classes on disk, beside its weights, so that a first answer does not wait for the text
tower.

The file names all that the features depend on, mostly as hashes. If anything differs, they are encoded as if there were
no file. Reading takes one pass over the text tower's weights, far less than encoding a thousand sentences.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..encoders import DualEncoder, encoder_of
from ..encoders.identity import hash_of_weights
from ..texts.sentences import PLACEHOLDER
from ..utils.files import put_in_place
from ..utils.names import composed
from .config import PromptConfig
from .folder import CLASS_FEATURES, digest_of_weights
from .learner import PromptLearner
from .peft_towers import own_fields
from .switches import switches_in
from .tower_classifier import AdaptedModel

# To be raised with every change to how a method computes text features, so that no file from before is used.
FORMAT = "1"
_TENSOR = "class_features"
_CONTENT = "content"  # in the file's metadata: the hash of the features themselves
_ELSEWHERE = {"tokenizer_name_or_path"}  # its tokens count, not its place


def save_class_features(model: AdaptedModel, folder: str | os.PathLike[str]) -> bool:
    """Writes the features of a trained adapter's own classes beside it, in `folder`, where it has been saved.

    `hf_tgpt.load_classifier`, and so every command, uses them while adapter and base model are as they were; `hf-tgpt
    train` writes them itself. Returns False, without a file, if there is nothing to store: the method's texts depend on
    the picture, or it needs none, or the base model is quantised.

    Raises ValueError if the folder contains no adapter or the model is in training mode.

    Example:
        >>> model.save_pretrained("runs/my-run")
        >>> hf_tgpt.save_class_features(model.eval(), "runs/my-run")
        True
    """
    learner, encoder = model.learner, encoder_of(model.get_base_model())
    if learner is None:
        raise ValueError("`model` has no active adapter, whose classes to store; enable one with set_adapter.")
    if learner.training or encoder.model.training:
        raise ValueError("`model` is in training mode; call eval() first.")
    if not os.path.isfile(os.path.join(folder, CONFIG_NAME)):
        raise ValueError(f"There is no adapter in {os.fspath(folder)!r}; save it there first.")
    if learner.class_features_shape(encoder) is None or not _can_be_hashed(encoder):
        return False
    with torch.no_grad(), torch.autocast(encoder.model.device.type, enabled=False):
        features = learner.fixed_class_features(encoder)
    if features.dtype != torch.float32:
        return False
    features = features.detach().cpu().contiguous()
    metadata = _config_facts(learner.config, folder) | _model_facts(model, learner, encoder)
    metadata |= {"towers": _hash_of_towers(model, encoder), _CONTENT: _hash_of(features)}
    path = Path(folder) / CLASS_FEATURES
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file({_TENSOR: features}, temporary, metadata)
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def use_class_features(
    model: AdaptedModel, folder: str | os.PathLike[str], known: dict[Any, str] | None = None
) -> bool:
    """Gives a model in evaluation mode the class features in its adapter's folder; returns whether they fit.

    They serve until something they depend on changes in memory. `known` keeps the hashes of towers, for several
    adapters with the same base model. Warns of a damaged file.
    """
    path, learner = Path(folder) / CLASS_FEATURES, model.learner
    if learner is None or not path.is_file():
        return False
    encoder = encoder_of(model.get_base_model())
    shape = learner.class_features_shape(encoder)
    if shape is None or not _can_be_hashed(encoder):
        return False
    facts = _config_facts(learner.config, folder) | _model_facts(model, learner, encoder)
    features, stored = _read(path, facts, shape)
    if features is None or stored["towers"] != _hash_of_towers(model, encoder, known):
        return False
    learner.take_class_features(encoder, features.to(encoder.model.device))
    return True


def are_valid(folder: str | os.PathLike[str], config: PromptConfig) -> bool:
    """Whether a folder has class features of this very adapter, as far as can be said without its base model."""
    path = Path(folder) / CLASS_FEATURES
    return path.is_file() and _read(path, _config_facts(config, folder), (len(config.class_names), None))[0] is not None


def _read(
    path: Path, facts: dict[str, str], shape: tuple[int, int | None]
) -> tuple[torch.Tensor | None, dict[str, str]]:
    """The features if the file was written with these facts, else None; and all that it says. None stands for any
    width.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            if any(stored.get(name) != fact for name, fact in facts.items()):
                return None, stored
            found = file.get_slice(_TENSOR)
            if found.get_dtype() != "F32" or len(found.get_shape()) != 2 or found.get_shape()[0] != shape[0]:
                raise ValueError(f"it has {found.get_dtype()} of shape {found.get_shape()}")
            if shape[1] not in (None, found.get_shape()[1]):
                raise ValueError(f"its features have width {found.get_shape()[1]}, not {shape[1]}")
            features = file.get_tensor(_TENSOR).clone()  # aligned in memory, so that torch multiplies as it would
        if not features.isfinite().all() or _hash_of(features) != stored.get(_CONTENT) or "towers" not in stored:
            raise ValueError("its content is not what was written")
        return features, stored
    except (SafetensorError, OSError, ValueError) as error:
        warnings.warn(
            f"{str(path)!r} is damaged ({error}) and is not used; remove it, or write it again with "
            "hf_tgpt.save_class_features.",
            stacklevel=3,
        )
        return None, {}


# What the features depend on ------------------------------------------------------------------------------------------


def _config_facts(config: PromptConfig, folder: str | os.PathLike[str]) -> dict[str, str]:
    """What a folder tells without its base model."""
    fields = {name: value for name, value in own_fields(config).items() if name not in _ELSEWHERE}
    content = {"method": config.method, "class_names": config.class_names, "fields": fields}
    text = json.dumps(content, sort_keys=True, default=str)
    return {
        "format": FORMAT,
        "config": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        "weights": digest_of_weights(folder),
    }


def _model_facts(model: AdaptedModel, learner: PromptLearner, encoder: DualEncoder) -> dict[str, str]:
    """What the model in memory tells, but for the towers' weights."""
    own = dict(sorted(learner.state_dict().items()))
    named = [(name, str(value.dtype), tuple(value.shape)) for name, value in own.items()]
    return {
        "dtype": str(encoder.dtype),
        "adapter": hash_of_weights(named, own.values()),
        "tokens": _hash_of_tokens(learner, encoder),
    }


def _hash_of_tokens(learner: PromptLearner, encoder: DualEncoder) -> str:
    """A hash of the ids of all sentences that the classes may be in, whatever the tokenizer's name."""
    own: Any = getattr(learner, "class_texts", None)
    names, templates = learner.config.class_names, getattr(learner.config, "templates", [])
    if isinstance(templates, dict):
        texts = [text for name in names for text in templates.get(name, [])]
    else:
        texts = [template.replace("{}", name) for template in templates for name in names]
    tokenizer = learner.tokenizer(encoder)
    ids = tokenizer([composed(text) for text in [*texts, f"{PLACEHOLDER}."]], verbose=False)["input_ids"]
    return hash_of_weights(ids, [] if own is None else [own.ids, own.ends])


def _hash_of_towers(model: AdaptedModel, encoder: DualEncoder, known: dict[Any, str] | None = None) -> str:
    """A hash of the text tower, with its settings and with the adapters in its layers."""
    weights = list(encoder.text_parameters())
    switches = switches_in(encoder.model)
    known = {} if known is None else known
    key = (*map(id, weights), repr(switches))
    if key not in known:
        shapes = [(str(weight.dtype), tuple(weight.shape)) for weight in weights]
        known[key] = hash_of_weights([encoder.text_settings(), switches, shapes], weights)
    return known[key]


def _can_be_hashed(encoder: DualEncoder) -> bool:
    """Whether its text tower's weights are plain tensors: not quantised, not sharded, not on meta."""
    return all(
        type(weight) is nn.Parameter
        and type(weight.data) is torch.Tensor
        and weight.is_floating_point()
        and not weight.is_meta
        for weight in encoder.text_parameters()
    )


def _hash_of(features: torch.Tensor) -> str:
    return hash_of_weights(tuple(features.shape), [features])
