"""A CLIPModel with one child more, a slot for adapters, of which the active one takes over the model's forward.

Nothing of CLIP is wrapped or replaced, so without an active adapter the forward is CLIP's own, bit for bit, and
unloading is taking the child away. The model changes its class alone. (torch's `fully_shard` swaps classes so.)
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import CLIPModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.utils import can_return_tuple

from .config import PromptConfig
from .learner import PromptLearner

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
