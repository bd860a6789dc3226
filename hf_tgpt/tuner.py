"""How a prompt learner gets onto a plain `CLIPModel` and off again, in PEFT's terms."""

from __future__ import annotations

import copy
import warnings
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import CLIPModel

from .base_model import fingerprint, same_weights
from .config import PromptConfig
from .prompted import SLOT, PromptedCLIPModel, PromptSlot, detach, undo
from .towers import dimensions

# `load_clip` notes there which commit of the base model's repository it has loaded.
REVISION = "_commit_hash"


class PromptTuner(BaseTuner):
    """PEFT's view of all prompt methods; the config says which learner to make."""

    prefix = "learners"
    tuner_layer_cls = PromptSlot
    target_module_mapping: ClassVar[dict[str, Any]] = {}

    def _prepare_adapter_config(self, peft_config: PromptConfig, model_config: dict) -> PromptConfig:
        return peft_config

    def _prepare_model(self, peft_config: PromptConfig, model: nn.Module) -> None:
        if type(model) not in (CLIPModel, PromptedCLIPModel):
            raise ValueError(
                f"The base model is a {type(model).__name__}; prompt learning needs a transformers CLIPModel with both "
                "towers: CLIPModel.from_pretrained(...)."
            )
        _check_base_model(peft_config, model)
        if SLOT not in model._modules:
            slot = PromptSlot()
            slot.before = dict(
                trained=[parameter for parameter in model.parameters() if parameter.requires_grad],
                labels={name: getattr(model.config, name) for name in ("id2label", "label2id")},
            )
            # PEFT freezes the base model at a first injection, which it tells by there being no tuner layer yet.
            model.requires_grad_(False)
            model.add_module(SLOT, slot)
            model.__class__ = PromptedCLIPModel

    @staticmethod
    def _check_target_module_exists(peft_config: PromptConfig, key: str) -> bool:
        return key == SLOT

    def _create_and_replace(
        self,
        peft_config: PromptConfig,
        adapter_name: str,
        target: PromptSlot,
        target_name: str,
        parent: PromptedCLIPModel,
        current_key: str,
    ) -> None:
        for other in target.learners.values():
            _check_adapter_name(adapter_name, other)
        # A copy, because it will hold what this adapter learns of this model; the user's config may serve again.
        config = copy.deepcopy(peft_config)
        config.base_model_dimensions = dimensions(parent)
        config.base_model_fingerprint = config.base_model_fingerprint or fingerprint(parent)
        config.revision = config.revision or getattr(parent.config, REVISION, None)
        try:
            learner = config.learner_class(config, parent)
            _check_adapter_name(adapter_name, learner)
        except Exception:
            if not target.learners:
                undo(parent)
            raise
        if not any(parameter.is_meta for parameter in learner.parameters()):  # low_cpu_mem_usage: weights are to come
            learner.to(parent.device)
        learner.train(parent.training)
        target.learners[adapter_name] = learner
        self.peft_config[adapter_name] = config

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            f"{self.peft_config[self.active_adapters[0]].method} cannot be merged: prompts are extra tokens that the "
            "towers read, not a change of their weights. Keep the adapter, or unload() it to get the base model back."
        )

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> CLIPModel:
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
        """PEFT's, after a check that the file holds exactly this adapter: PEFT itself only warns of missing weights."""
        slot = next(module for module in model.modules() if isinstance(module, PromptSlot))
        expected = {name: tuple(value.shape) for name, value in slot.learners[adapter_name].state_dict().items()}
        found = {key.split(f"{SLOT}.{cls.prefix}.")[-1]: tuple(value.shape) for key, value in state_dict.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(
                    f"The adapter's weights do not fit {config.method} on this CLIP: {name!r} has shape "
                    f"{found.get(name, 'none (missing)')} in the file and {expected.get(name, 'none (unknown)')} in "
                    "the model. Load it on the base model it was trained on, or save it again if the file is damaged."
                )
        for key, value in state_dict.items():
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"The adapter's weights hold NaN or infinity ({key.split(f'{SLOT}.{cls.prefix}.')[-1]!r}): its "
                    "training diverged or the file is damaged; train or download it again."
                )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _check_adapter_name(adapter_name: str, learner: nn.Module) -> None:
    """PEFT drops a key from a file if any part of it is another adapter's name, so names must not look like parts."""
    parts = {part for key in learner.state_dict() for part in key.split(".")}
    if adapter_name in parts | {SLOT, PromptTuner.prefix, "base_model", "model"}:
        raise ValueError(
            f"`adapter_name`={adapter_name!r} is also the name of a part of the model, which PEFT would mix up when it "
            "saves; choose another one."
        )


def _check_base_model(config: PromptConfig, clip: CLIPModel) -> None:
    trained_on = config.base_model_dimensions or {}
    for name, here in dimensions(clip).items():
        if trained_on.get(name, here) != here:
            raise ValueError(
                f"The adapter was made for another CLIP: its base model ({config.base_model_name_or_path}) has {name} "
                f"{trained_on[name]}, this one {here}. Load the adapter on the base model it was trained on."
            )
    if not same_weights(config.base_model_fingerprint, fingerprint(clip)):
        revision = f" at {config.revision}" if config.revision else ""
        warnings.warn(
            f"The adapter was trained on a CLIP with other weights, {config.base_model_name_or_path}{revision}; on "
            f"this one ({clip.name_or_path}) it will not answer as it was trained to. Load it on that one.",
            stacklevel=2,
        )
