"""How a prompt learner sits on a plain `CLIPModel`, in PEFT's terms.

`PromptTuner` adds one child, a `PromptSlot`, to the model and makes the model a `PromptedCLIPModel`, whose forward
hands over to the slot's active learner. Nothing of CLIP is wrapped or replaced, so without an active adapter the
forward is CLIP's own, bit for bit, and unloading is taking the child away. (torch's `fully_shard` swaps classes so.)
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import CLIPModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.utils import can_return_tuple

from .base_model import fingerprint, same_weights
from .config import PromptConfig
from .learner import PromptLearner
from .towers import dimensions

# `load_clip` notes there which commit of the base model's repository it has loaded.
REVISION = "_commit_hash"
SLOT = PromptConfig.target_modules[0]


class PromptSlot(nn.Module, BaseTunerLayer):
    """The adapters of one model by name, of which at most one is active."""

    adapter_layer_names = ("learners",)
    # What BaseTunerLayer gives; here because nn.Module would otherwise promise tensors of these names.
    active_adapters: list[str]
    disable_adapters: bool
    # What it found: the config's labels, which unloading puts back, and the weights that were trained.
    before: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.learners = nn.ModuleDict({})

    def active_learner(self) -> PromptLearner | None:
        names = [name for name in self.active_adapters if name in self.learners]
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise ValueError(f"Adapters {names} are active at once; prompts do not add up, choose one by set_adapter.")
        learner = self.learners[names[0]]
        assert isinstance(learner, PromptLearner)  # the tuner puts nothing else there
        return learner

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        self._forget()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._forget()

    def _forget(self) -> None:
        """Drops class features that are kept: a LoRA in the text tower that is switched changes them, but no weight.

        PEFT tells every layer of a switch, whichever adapter it is of.
        """
        for learner in self.learners.values():
            learner.train(learner.training)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT asks this after loading with low_cpu_mem_usage. A slot wraps no layer; a learner's ids tell the device.
        learner = self.learners[adapter_name]
        learner.to(device or next(learner.buffers()).device)


class PromptedCLIPModel(CLIPModel):
    """A `CLIPModel` with a prompt slot. Also CLIP itself wherever no adapter is active."""

    # Tells transformers' Trainer to leave its own arguments out of the forward.
    accepts_loss_kwargs = False

    @property
    def learner(self) -> PromptLearner | None:
        """The active adapter's learner, or None."""
        slot = self._modules.get(SLOT)
        return None if slot is None else slot.active_learner()

    @property
    def class_names(self) -> list[str]:
        """The active adapter's classes in the order of the logits."""
        return self._answering().config.class_names

    @property
    def uses_captions(self) -> bool:
        """Whether training the active adapter profits from `caption_ids`."""
        return self._answering().uses_captions

    def tokens_per_image(
        self, labels: torch.Tensor, caption_ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """What the forward is to know of the whole batch where it gets a part of it; empty for most methods."""
        return self._answering().tokens_per_image(self, labels, caption_ids)

    @property
    def takes_new_classes(self) -> bool:
        """Whether the active adapter also classifies by names that it was not trained on."""
        return self._answering().takes_new_classes

    def _answering(self) -> PromptLearner:
        learner = self.learner
        if learner is None:  # a CLIP has no such attribute, as nn.Module then says in its own words
            raise AttributeError
        return learner

    def set_class_names(self, class_names: list[str]) -> None:
        """Gives the active adapter other classes, without training. Raises ValueError where that cannot be."""
        if self.learner is None:
            raise ValueError("`set_class_names` needs an active adapter; enable one by set_adapter.")
        self.learner.set_class_names(self, class_names)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | CLIPOutput:
        """`model(pixel_values, labels)` classifies -> ImageClassifierOutput; with `input_ids` it is CLIP's own call.

        Shapes: pixel_values (b, 3, h, w), labels (b,), input_ids (s, t); logits (b, c). `attention_mask` is not needed:
        attention is causal and a sentence is read at its EOS, which sees no padding. Other arguments go to the method,
        for example TGP-T's `caption_ids`. `image_states`, what the learner's `image_states` gave of the pictures, may
        stand in place of pixel_values where the vision tower has no learned prompts.
        """
        if input_ids is not None and input_ids.is_floating_point():  # model(pixel_values, labels), by position
            input_ids, pixel_values, labels = None, input_ids, pixel_values if labels is None else labels
        learner = self.learner
        if learner is None:
            if input_ids is None:
                raise ValueError(
                    "`input_ids` is missing: no adapter is active, so this is plain CLIP, which compares pictures with "
                    "texts. Pass input_ids, or enable an adapter."
                )
            given = {"labels": labels} if labels is not None else {}
            return super().forward(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                return_loss=return_loss,
                interpolate_pos_encoding=interpolate_pos_encoding,
                **given,
                **kwargs,
            )
        kwargs = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        allowed: set[str] = set()
        if input_ids is None:
            allowed = {"image_states", "caption_ids"} if learner.uses_captions else {"image_states"}
            allowed |= {"tokens_per_image"} if learner.counts_tokens else set()
        for name in kwargs.keys() - allowed:
            raise ValueError(f"`{name}`={kwargs[name]!r} is no argument of {learner.config.method}; leave it out.")
        if "image_states" in kwargs:
            learner.check_vision_is_frozen()
            if pixel_values is not None:
                raise ValueError("`image_states` stand in place of `pixel_values`; pass one of the two.")
            kwargs["image_states"] = kwargs["image_states"].to(self.dtype)
        elif pixel_values is None:
            raise ValueError("`pixel_values` is missing; pass pictures (b, 3, h, w).")
        if interpolate_pos_encoding:
            kwargs["interpolate_pos_encoding"] = True
        if input_ids is not None:
            if labels is not None:
                raise ValueError("`labels` belong to model(pixel_values, labels); with `input_ids` pass return_loss.")
            assert pixel_values is not None  # no image states went with input_ids
            return learner.compare(self, input_ids, pixel_values, return_loss=bool(return_loss), **kwargs)
        self._name_labels(learner)
        return learner(self, pixel_values, labels=labels, **kwargs)

    def _name_labels(self, learner: PromptLearner) -> None:
        """Keeps the config's id2label, which transformers' pipelines show, those of the adapter that answers."""
        names = learner.config.class_names
        if not torch.compiler.is_compiling() and getattr(self, "_named", None) is not names:
            self._named = names
            self.config.id2label = dict(enumerate(names))
            self.config.label2id = {name: label for label, name in enumerate(names)}

    @can_return_tuple
    def get_text_features(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """CLIP's, with the active adapter's prompts: input_ids (s, t) -> output with `pooler_output` (s, d)."""
        if self.learner is None:
            return super().get_text_features(input_ids, *args, **kwargs)
        texts = self.learner.read_texts(self, input_ids)
        return BaseModelOutputWithPooling(pooler_output=self.learner.text_features(self, *texts))

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """CLIP's, with the active adapter's prompts: (b, 3, h, w) -> output with `pooler_output` (b, d)."""
        if self.learner is None:
            return super().get_image_features(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        more = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
        return BaseModelOutputWithPooling(pooler_output=self.learner.image_features(self, pixel_values, **more))


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


def detach(model: PromptedCLIPModel) -> None:
    """Makes it a plain CLIPModel again."""
    slot = model._modules.pop(SLOT)
    model.__class__ = CLIPModel
    for name, value in slot.before["labels"].items():
        setattr(model.config, name, value)
    for leftover in ("peft_config", "_named", "_hf_peft_config_loaded"):  # the last is transformers' load_adapter's
        model.__dict__.pop(leftover, None)


def undo(model: PromptedCLIPModel) -> None:
    """`detach`, with the weights trained that were before; for an adapter that could not be attached or loaded."""
    for parameter in model._modules[SLOT].before["trained"]:
        parameter.requires_grad_(True)
    detach(model)


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
