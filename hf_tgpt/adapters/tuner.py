"""How a prompt learner gets onto a plain transformers model and off again, in PEFT's terms."""

from __future__ import annotations

import copy
import warnings
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..encoders import DualEncoder, check_takes_prompts, encoder_of
from ..encoders.identity import fingerprint, same_weights
from ..encoders.loading import REVISION
from .config import PromptConfig
from .prompted import SLOT, PromptedModel, PromptSlot, attach, detach, undo


class PromptTuner(BaseTuner):
    """PEFT's tuner for all prompt methods; the config determines which learner to make."""

    prefix = "learners"
    tuner_layer_cls = PromptSlot
    target_module_mapping: ClassVar[dict[str, Any]] = {}

    def _prepare_adapter_config(self, peft_config: PromptConfig, model_config: dict) -> PromptConfig:
        return peft_config

    def _prepare_model(self, peft_config: PromptConfig, model: nn.Module) -> None:
        encoder = encoder_of(model)
        if peft_config.learns_prompts:
            check_takes_prompts(encoder, peft_config.method)
        _check_base_model(peft_config, encoder)
        if SLOT not in model._modules:
            attach(encoder)

    @staticmethod
    def _check_target_module_exists(peft_config: PromptConfig, key: str) -> bool:
        return key == SLOT

    def _create_and_replace(
        self,
        peft_config: PromptConfig,
        adapter_name: str,
        target: PromptSlot,
        target_name: str,
        parent: PromptedModel,
        current_key: str,
    ) -> None:
        for other in target.learners.values():
            _check_adapter_name(adapter_name, other)
        encoder = encoder_of(parent)
        # A config may be used for several models, and each adapter records its own facts in a copy; a config that PEFT
        # has filled in for loading is already the adapter's own.
        config = peft_config if peft_config.inference_mode else copy.deepcopy(peft_config)
        config.base_model_dimensions = encoder.shape()
        config.base_model_fingerprint = config.base_model_fingerprint or fingerprint(encoder)
        config.revision = config.revision or getattr(encoder.model.config, REVISION, None)
        try:
            learner = config.learner_class(config, encoder)
            _check_adapter_name(adapter_name, learner)
        except Exception:
            if not target.learners:
                undo(parent)
            raise
        if not any(parameter.is_meta for parameter in learner.parameters()):  # low_cpu_mem_usage: weights come later
            learner.to(encoder.model.device)
        learner.train(encoder.model.training)
        target.learners[adapter_name] = learner
        self.peft_config[adapter_name] = config

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            f"{self.peft_config[self.active_adapters[0]].method} cannot be merged: it does not change "
            "the base model's weights. Keep the adapter, or unload() it to get the base model back."
        )

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        detach(self.model)
        return self.model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT strips the name only next to the parameter; a learner's parameters lie deeper.
        return key.replace(f"{SLOT}.{cls.prefix}.{adapter_name}.", f"{SLOT}.{cls.prefix}.", 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PromptConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT's, after checking that the file contains exactly this adapter."""
        cls.check_state(model, config, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @classmethod
    def check_state(
        cls, model: nn.Module, config: PromptConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> None:
        """Raises ValueError unless a state contains exactly this adapter. PEFT itself only warns of missing weights."""
        slot = next(module for module in model.modules() if isinstance(module, PromptSlot))
        learner: Any = slot.learners[adapter_name]
        saved = {key.split(f"{SLOT}.{cls.prefix}.")[-1]: tuple(value.shape) for key, value in state_dict.items()}
        learner.make_room(saved)
        expected = {name: tuple(value.shape) for name, value in learner.state_dict().items()}
        for name in sorted(expected.keys() | saved.keys()):
            if expected.get(name) != saved.get(name):
                raise ValueError(
                    f"The adapter's weights do not fit {config.method} on this CLIP: {name!r} has shape "
                    f"{saved.get(name, 'none (missing)')} in the file and {expected.get(name, 'none (unknown)')} in "
                    "the model. Load it on the base model it was trained on, or save it again if the file is damaged."
                )
        for key, value in state_dict.items():
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"The adapter's weights contain NaN or infinity ({key.split(f'{SLOT}.{cls.prefix}.')[-1]!r}): its "
                    "training diverged or the file is damaged; train or download it again."
                )


def _check_adapter_name(adapter_name: str, learner: nn.Module) -> None:
    """PEFT drops a key from a file if any part of it is another adapter's name, so names must not equal parts."""
    parts = {part for key in learner.state_dict() for part in key.split(".")}
    if adapter_name in parts | {SLOT, PromptTuner.prefix, "base_model", "model"}:
        raise ValueError(
            f"`adapter_name`={adapter_name!r} is also the name of a part of the model, and PEFT would confuse the two "
            "on saving; choose another one."
        )


def _check_base_model(config: PromptConfig, encoder: DualEncoder) -> None:
    for name, layer in encoder.model.named_modules():
        # Their weights are methods and they pass no gradients on; nor can PEFT load what is beside them.
        if type(layer).__module__.startswith("torch.ao.nn."):
            raise ValueError(
                f"`model`: its layer {name!r} is quantised by torch.ao ({type(layer).__name__}), which takes no "
                "adapter; quantise by torchao or bitsandbytes, or export the adapted model to ONNX in int8."
            )
    trained_on = config.base_model_dimensions or {}
    for name, here in encoder.shape().items():
        if trained_on.get(name, here) != here:
            raise ValueError(
                f"The adapter was made for another CLIP: its base model ({config.base_model_name_or_path}) has {name} "
                f"{trained_on[name]}, this one {here}. Load the adapter on the base model it was trained on."
            )
    if not same_weights(config.base_model_fingerprint, fingerprint(encoder)):
        revision = f" at {config.revision}" if config.revision else ""
        warnings.warn(
            f"The adapter was trained on a CLIP with other weights, {config.base_model_name_or_path}{revision}; on "
            f"this one ({encoder.model.name_or_path}) it will not answer as it was trained to. Load it on that one.",
            stacklevel=2,
        )
