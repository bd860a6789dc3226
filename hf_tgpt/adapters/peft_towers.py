"""A dual encoder with an adapter of PEFT's own in its towers, and a learner that classifies with them."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..encoders import DualEncoder, encoder_of
from ..utils.files import write_json
from ..utils.names import name_in_files
from .config import PromptConfig
from .folder import HEAD_WEIGHTS, check_weights_file
from .learner import PromptLearner
from .peft_hooks import saved
from .tower_classifier import TowerClassifier

# Beside PEFT's own files: the method, its classes and fields.
NOTE = "reference.json"
_PER_LAYER_NORM = "LN_TUNING"


class PeftTowers(TowerClassifier):
    """A PeftModel of PEFT's own, and a learner that classifies with its towers.

    PEFT's adapter itself has no class names and does not classify, hence this module around it.
    """

    def __init__(self, model: PreTrainedModel, adapter: PeftConfig, learner: PromptLearner):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type .*LayerNorm")  # which LN_TUNING is made for
            try:
                adapted = get_peft_model(model.requires_grad_(False), adapter)
            except Exception as error:  # each kind refuses in its own way
                raise ValueError(f"PEFT refuses this {type(adapter).__name__}: {error}") from error
        super().__init__(adapted, learner)

    def get_base_model(self) -> Any:
        """The model with PEFT's adapter in its layers."""
        return self.model.get_base_model()

    def untuned_encoder(self) -> DualEncoder:
        """From a copy: PEFT's switch for an adapter would affect all other threads that use this model."""
        return encoder_of(copy.deepcopy(self.model).unload())

    def merged_encoder(self) -> DualEncoder:
        try:
            return encoder_of(copy.deepcopy(self.model).merge_and_unload())
        except NotImplementedError as error:
            raise ValueError(f"PEFT cannot merge this adapter into the model's weights: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """PEFT's own files, which PeftModel.from_pretrained reads, and beside them the classes and the learner."""
        self.model.save_pretrained(folder, save_embedding_layers=False)  # or PEFT contacts the Hub about the vocabulary
        config = self.learner.config
        content = {
            "method": config.method.lower(),
            "base_model": name_in_files(config.base_model_name_or_path),
            "class_names": config.class_names,
            "config": own_fields(config),
        }
        write_json(Path(folder) / NOTE, content)
        if weights := self.learner.state_dict():
            save_file(weights, Path(folder) / HEAD_WEIGHTS)
        self._is_in(folder)
        saved(folder, config)

    def load_weights(self, folder: str | os.PathLike[str]) -> None:
        """Loads what `save_pretrained` wrote. Raises ValueError if a file is missing or damaged."""
        check_weights_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))  # PEFT would take a pickle in its place
        self.model.load_adapter(folder, "default", torch_device=str(self.model.device))
        if self.learner.state_dict():
            head = os.path.join(folder, HEAD_WEIGHTS)
            check_weights_file(head)
            self.learner.load_state_dict(load_file(head))
        self._is_in(folder)

    def _is_in(self, folder: str | os.PathLike[str]) -> None:
        self.learner.config.folder = os.fspath(folder)  # type: ignore[misc]  # see PromptConfig


def own_fields(config: PromptConfig) -> dict[str, Any]:
    """The fields that are this method's, as `reference.json` keeps them."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: getattr(config, name) for name in sorted(names - {f.name for f in dataclasses.fields(PromptConfig)})}


def kinds_of_peft() -> dict[str, type[PeftConfig]]:
    """PEFT's own adapters that go into layers: {"LORA": LoraConfig, ...}."""
    known = {getattr(name, "value", name): kind for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return {
        name: kind for name, kind in sorted(known.items()) if not issubclass(kind, PromptLearningConfig | PromptConfig)
    }


def peft_config_of(fields: Mapping[str, Any], encoder: DualEncoder) -> PeftConfig:
    """PEFT's config with these fields. Without `target_modules` it adapts the layers for queries, keys and values in
    both towers; "LN_TUNING" all layer norms.

    `peft_type` is one of `kinds_of_peft`. Raises ValueError for what PEFT refuses.
    """
    kinds, name = kinds_of_peft(), str(fields["peft_type"]).upper()
    given = {key: value for key, value in fields.items() if key != "peft_type"}
    known = {field.name for field in dataclasses.fields(kinds[name]) if field.init}
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"`peft_config` has {unknown[0]!r}, which is not a field of {kinds[name].__name__}.")
    if "target_modules" in known and given.get("target_modules") is None:
        norms = [key for key, module in encoder.model.named_modules() if isinstance(module, torch.nn.LayerNorm)]
        given["target_modules"] = norms if name == _PER_LAYER_NORM else list(encoder.attention_inputs)
    if "feedforward_modules" in known:  # IA3 needs to know which of them are in MLPs
        given.setdefault("feedforward_modules", [])
    try:
        return kinds[name](**given)
    except Exception as error:  # likewise
        raise ValueError(f"PEFT refuses this {kinds[name].__name__}: {error}") from error
