"""A transformers model with one more child, a slot for adapters; the active one takes over the model's forward.

Nothing in the model is wrapped or replaced, so without an active adapter the forward is the model's own, bit for bit,
and unloading just removes the child. Only the model's class changes. (torch's `fully_shard` swaps classes in the same
way.)

Calls do not affect each other: any number of threads may use one model with different classes. They share PEFT's
switches: `set_adapter`, `disable_adapter` and `enable_adapter_layers` act on the model, and so change the answers in
all threads that use it at the time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import ModelOutput, can_return_tuple

from ..encoders import DualEncoder, encoder_of
from ..texts.class_texts import ClassTexts
from ..utils.compat import features_output
from .config import PROMPTED, PromptConfig
from .learner import PromptLearner

SLOT = PromptConfig.target_modules[0]
# Fields of a model's config that follow the active adapter.
_FOLLOWING = ("id2label", "label2id", "keys_to_ignore_at_inference")


class PromptSlot(nn.Module, BaseTunerLayer):
    """The adapters of one model by name; at most one is active."""

    adapter_layer_names = ("learners",)
    # BaseTunerLayer's; declared here because nn.Module would otherwise promise tensors of these names.
    active_adapters: list[str]
    disable_adapters: bool

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.learners = nn.ModuleDict({})
        self.place = nn.Buffer(torch.empty(0, device=model.device), persistent=False)  # its device is the model's
        self.others_are_there = False  # whether PEFT has ever switched another adapter, such as a LoRA
        # What it found: the weights that were trained, and the config's fields that follow the active adapter.
        self.trained_before = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.model_config: PretrainedConfig = model.config
        self.config_before = {name: value for name, value in vars(model.config).items() if name in _FOLLOWING}

    def active_learner(self) -> PromptLearner | None:
        names = self.active_names()
        if len(names) > 1:
            raise ValueError(
                f"Adapters {names} are active at once, but prompts cannot be combined; choose one with set_adapter."
            )
        learner = self.learners[names[0]] if names else None
        assert learner is None or isinstance(learner, PromptLearner)  # the tuner puts nothing else there
        return learner

    def active_names(self) -> list[str]:
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.learners]

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        self._switched()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._switched()

    def _switched(self) -> None:
        """Discards kept class features where other adapters are in the model's layers: switching a LoRA in the text
        tower changes them, but no weight. Among learners alone each keeps its own.

        PEFT notifies every layer of a switch, whichever adapter it belongs to, so foreign names are those of others.
        """
        self.others_are_there |= not self.learners.keys() >= set(self.active_adapters)
        learner: Any
        for learner in self.learners.values() if self.others_are_there else ():
            learner.forget()
        self.describe_active()

    def describe_active(self) -> None:
        """Keeps the model's config in line with the active adapter: its labels, which transformers' pipelines show, and
        the entries of its output that are not predictions, which the Trainer leaves out.
        """
        self.restore_config()
        if names := self.active_names():
            learner: Any = self.learners[names[0]]
            config = self.model_config
            classes = learner.config.class_names
            config.id2label, config.label2id = dict(enumerate(classes)), {c: i for i, c in enumerate(classes)}
            entries = {field.name for field in dataclasses.fields(learner.output_class)}
            config.keys_to_ignore_at_inference = sorted(entries - {"loss", "logits"})

    def restore_config(self) -> None:
        """Restores the model's config from before it had adapters."""
        for name in _FOLLOWING:
            vars(self.model_config).pop(name, None)
        for name, value in self.config_before.items():
            setattr(self.model_config, name, value)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT calls this after loading with low_cpu_mem_usage. A slot wraps no layer.
        place: Any = self.place
        self.learners[adapter_name].to(device or place.device)


class PromptedModel:
    """The forward of a model with a prompt slot, mixed in before its own class; without an adapter the model's own."""

    peft_config: dict[str, PromptConfig]  # PEFT's
    # Tells transformers' Trainer to leave its own arguments out of the forward.
    accepts_loss_kwargs = False

    @property
    def learner(self) -> PromptLearner | None:
        """The active adapter's learner, or None."""
        slot = self._modules.get(SLOT)  # type: ignore[attr-defined]
        return None if slot is None else slot.active_learner()

    @property
    def class_names(self) -> list[str]:
        """The active adapter's classes in the order of the logits; a copy."""
        return list(self._answering().config.class_names)

    @property
    def uses_captions(self) -> bool:
        """Whether training the active adapter uses `caption_ids`."""
        return self._answering().uses_captions

    @property
    def takes_new_classes(self) -> bool:
        """Whether the active adapter also classifies by names that it was not trained on."""
        return self._answering().takes_new_classes

    def tokens_per_image(
        self, labels: torch.Tensor, caption_ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """What the forward needs to know about the whole batch if it receives a part; empty for most methods."""
        return self._answering().tokens_per_image(encoder_of(self), labels, caption_ids)

    def texts_for(self, class_names: Sequence[str]) -> ClassTexts:
        """Any classes as `model(pixel_values, class_texts=...)` takes them, for a method with an open class list.

        Raises ValueError for bad names, or if the classes are fixed.

        Example:
            >>> logits = model(pixel_values, class_texts=model.texts_for(["newt", "toad"])).logits
        """
        return self._answering().texts_for(encoder_of(self), class_names)

    def untuned_encoder(self) -> DualEncoder:
        """The model's own towers; without prompts they compute what they did before the adapter, in any thread."""
        return encoder_of(self)

    def merged_encoder(self) -> DualEncoder:
        """The towers with what was trained merged into their weights; prompts never are."""
        return encoder_of(self)

    def _answering(self) -> PromptLearner:
        learner = self.learner
        if learner is None:  # a plain model has no such attribute; nn.Module raises the error
            raise AttributeError
        return learner

    def set_class_names(self, class_names: Sequence[str]) -> None:
        """Makes other classes the active adapter's own, without training; it is saved with them.

        To classify other classes and change nothing, see `texts_for`. Raises ValueError if the classes are fixed.
        """
        if self.learner is None:
            raise ValueError("`set_class_names` needs an active adapter; enable one with set_adapter.")
        self._answering().set_class_names(encoder_of(self), class_names)
        self.classes_changed()

    def classes_changed(self) -> None:
        """Call it after the active adapter's own classes have changed."""
        learner, slot = self._answering(), self._modules[SLOT]  # type: ignore[attr-defined]
        self.peft_config[slot.active_names()[0]] = learner.config
        learner.forget()
        slot.describe_active()

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
        class_texts: ClassTexts | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | ModelOutput:
        """`model(pixel_values, labels)` classifies; with `input_ids` it is the model's own call.

        Shapes: pixel_values (b, 3, h, w), labels (b,), input_ids (s, t); logits (b, c). `attention_mask` is not needed:
        the family determines whether padding is attended to. `class_texts` are classes other than the adapter's own,
        from `texts_for`. Other arguments go to the method, for example TGP-T's `caption_ids`. If the image tower has no
        learned prompts, `image_states`, the learner's output of that name for the pictures, may replace pixel_values.
        """
        if input_ids is not None and input_ids.is_floating_point():  # model(pixel_values, labels), by position
            input_ids, pixel_values, labels = None, input_ids, pixel_values if labels is None else labels
        learner, encoder = self.learner, encoder_of(self)
        kwargs = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        if interpolate_pos_encoding:
            kwargs["interpolate_pos_encoding"] = True
        if learner is None:
            if input_ids is None:
                raise ValueError(
                    "`input_ids` is missing: no adapter is active, so this is plain CLIP, which compares pictures with "
                    "texts. Pass input_ids, or enable an adapter."
                )
            own = dict(attention_mask=attention_mask, position_ids=position_ids, return_loss=return_loss, labels=labels)
            own = {name: value for name, value in own.items() if value is not None}
            return super().forward(input_ids=input_ids, pixel_values=pixel_values, **own, **kwargs)  # type: ignore[misc]
        if learner.awaits_weights:
            learner.check_weights()
        allowed = {"interpolate_pos_encoding"}
        if input_ids is not None:
            kwargs = {name: value for name, value in kwargs.items() if name not in encoder.tokenizer_extras}
        else:
            allowed |= {"image_states", "caption_ids"} if learner.uses_captions else {"image_states"}
            allowed |= {"tokens_per_image"} if learner.counts_tokens else set()
        for name in kwargs.keys() - allowed:
            raise ValueError(f"`{name}` is not an argument of {learner.config.method}; leave it out.")
        if "image_states" in kwargs:
            learner.check_vision_is_frozen()
            if pixel_values is not None:
                raise ValueError("`image_states` replace `pixel_values`; pass one of the two.")
            kwargs["image_states"] = kwargs["image_states"].to(encoder.dtype)
        elif pixel_values is None:
            raise ValueError("`pixel_values` is missing; pass pictures (b, 3, h, w).")
        if input_ids is not None:
            for name, value in (("labels", labels), ("class_texts", class_texts)):
                if value is not None:
                    raise ValueError(
                        f"`{name}` belong to model(pixel_values, {name}=...); with `input_ids` pass return_loss."
                    )
            assert pixel_values is not None  # no image states went with input_ids
            return learner.compare(encoder, input_ids, pixel_values, return_loss=bool(return_loss), **kwargs)
        if class_texts is not None:
            if not learner.takes_new_classes:
                learner.texts_for(encoder, class_texts.names)  # which refuses, with the reason
            kwargs["class_texts"] = class_texts
        return learner(encoder, pixel_values, labels=labels, **kwargs)

    @can_return_tuple
    def get_text_features(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's, with the active adapter's prompts: input_ids (s, t) -> output with `pooler_output` (s, d)."""
        if self.learner is None:
            return super().get_text_features(input_ids, *args, **kwargs)  # type: ignore[misc]
        encoder = encoder_of(self)
        texts = self.learner.read_texts(encoder, input_ids)
        return features_output(self.learner.text_features(encoder, *texts))

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> Any:
        """The model's, with the active adapter's prompts: (b, 3, h, w) -> output with `pooler_output` (b, d)."""
        options = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
        if self.learner is None:
            return super().get_image_features(pixel_values, **options, **kwargs)  # type: ignore[misc]
        features = self.learner.image_features(encoder_of(self), pixel_values, **options)
        return features_output(features)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class is made on demand, so a copy or a pickle stores the plain class it was made from.
        return _empty, (type(self).__bases__[1],), super().__reduce_ex__(protocol)[2]


@cache
def prompted_class(plain: Any) -> Any:
    """The class of a model of class `plain` that has a prompt slot."""
    # Of the plain class's module, which is what a saved adapter names to find its base model.
    return type(PROMPTED + plain.__name__, (PromptedModel, plain), {"__module__": plain.__module__})


def _empty(plain: Any) -> Any:
    prompted = prompted_class(plain)
    return prompted.__new__(prompted)


def attach(encoder: DualEncoder) -> None:
    """Gives a plain model its slot, and freezes it."""
    model = encoder.model
    slot = PromptSlot(model)
    # PEFT freezes the base model at the first injection, which it recognises by the absence of tuner layers.
    model.requires_grad_(False)
    model.add_module(SLOT, slot)
    plain: Any = type(model)
    model.__class__ = prompted_class(plain)


def detach(model: Any) -> None:
    """Turns it back into a plain model."""
    slot = model._modules.pop(SLOT)
    model.__class__ = type(model).__bases__[1]
    slot.restore_config()
    for leftover in ("peft_config", "_hf_peft_config_loaded"):  # the last is transformers' load_adapter's
        model.__dict__.pop(leftover, None)


def undo(model: Any) -> None:
    """`detach`, and restores which weights are trained; for an adapter that could not be attached or loaded."""
    for parameter in model._modules[SLOT].trained_before:
        parameter.requires_grad_(True)
    detach(model)
