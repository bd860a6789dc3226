"""Folders with a `reference.json`: those of PEFT's own adapters, and of zero-shot and linear probes from 0.1.0."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..adapters.config import PromptConfig
from ..adapters.peft_towers import NOTE, PeftTowers
from ..adapters.tower_classifier import AdaptedModel
from ..utils.files import read_json
from ..utils.names import check_class_names

# In the folder of a linear probe from 0.1.0.
PROBE_WEIGHTS = "linear_probe.safetensors"
# The methods whose folders have had a note, and their weights beside what PEFT saves.
_NOTED = {"zero_shot": None, "linear_probe": PROBE_WEIGHTS, "lora": None, "two_stage": None}


def read_note(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`method`, `base_model`, `class_names` and `config` of such a folder. Raises ValueError if it is damaged."""
    from ..methods import method_name  # here, as this module is imported while the methods are (see `hf_tgpt`)

    path = Path(folder) / NOTE
    try:
        note = read_json(path)
        missing = {"method", "base_model", "class_names", "config"} - note.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        note["method"] = method_name(note["method"])
        if note["method"] not in _NOTED:
            raise ValueError(f"`method`={note['method']!r}; known here: {', '.join(_NOTED)}")
        if not isinstance(note["base_model"], str | None) or not isinstance(note["config"], dict):
            raise ValueError("`base_model` is not a name or `config` not an object")
        check_class_names(note["class_names"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}); train it again.") from error
    return note


def noted_config(note: dict[str, Any]) -> PromptConfig:
    """The method's config that a note describes. Raises ValueError or TypeError if it is invalid."""
    from ..methods import config_class

    config = config_class(note["method"])(class_names=note["class_names"], **note["config"])
    config.base_model_name_or_path = note["base_model"]
    return config


def load_noted(model: PreTrainedModel, folder: str | os.PathLike[str]) -> AdaptedModel:
    """What such a folder holds, on a fresh base model, in evaluation mode. Raises ValueError if it cannot be read."""
    note = read_note(folder)
    try:
        built = noted_config(note).build(model)
        if isinstance(built, PeftTowers):
            built.load_weights(folder)
        elif weights := _NOTED[note["method"]]:
            built.learner.head.load_state_dict(load_file(Path(folder) / weights))
    except Exception as error:  # an invalid config or weights may make PEFT, torch and safetensors raise any exception
        raise ValueError(
            f"The config or the weights in {str(folder)!r} cannot be used ({error}); train it again."
        ) from error
    return built.to(model.device).requires_grad_(False).eval()
