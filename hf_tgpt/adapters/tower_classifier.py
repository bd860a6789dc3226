"""A learner on a model that has no slot for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..encoders import DualEncoder, encoder_of
from ..texts.class_texts import ClassTexts
from ..utils.notebook import html_table
from .folder import read_results
from .learner import PromptLearner


class TowerClassifier(nn.Module):
    """A dual encoder and a learner that classifies with its towers; it is called like an adapted model.

    The model is used but not changed: for zero-shot classification beside an adapter on the same model, and for a
    learner on towers that PEFT's own adapters train.
    """

    model: Any
    learner: PromptLearner

    def __init__(self, model: nn.Module, learner: PromptLearner):
        super().__init__()
        self.model, self.learner = model, learner

    def get_base_model(self) -> Any:
        """The dual encoder."""
        return self.model

    def untuned_encoder(self) -> DualEncoder:
        """The base model's own towers, without what was trained."""
        return encoder_of(self.get_base_model())

    def merged_encoder(self) -> DualEncoder:
        """The towers with what was trained merged into their weights."""
        return encoder_of(self.get_base_model())

    @property
    def class_names(self) -> list[str]:
        """The classes in the order of the logits; a copy."""
        return list(self.learner.config.class_names)

    @property
    def uses_captions(self) -> bool:
        """Whether training uses `caption_ids`."""
        return self.learner.uses_captions

    @property
    def takes_new_classes(self) -> bool:
        """Whether it also classifies by names that it was not trained on."""
        return self.learner.takes_new_classes

    def texts_for(self, class_names: Sequence[str]) -> ClassTexts:
        """Any classes as `forward` takes them. Raises ValueError for bad names."""
        return self.learner.texts_for(encoder_of(self.get_base_model()), class_names)

    def set_class_names(self, class_names: Sequence[str]) -> None:
        """Makes other classes its own, without training; it is saved with them. Raises ValueError for bad names."""
        self.learner.set_class_names(encoder_of(self.get_base_model()), class_names)

    def _repr_html_(self) -> str:
        return html_of(self)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        class_texts: ClassTexts | None = None,
        image_states: torch.Tensor | None = None,
    ) -> ImageClassifierOutput:
        """pixel_values (b, 3, h, w), labels (b,) -> ImageClassifierOutput with logits (b, c).

        `image_states`, stored features of the frozen image tower, can be given instead of pixel_values.
        """
        encoder = encoder_of(self.get_base_model())
        return self.learner(encoder, pixel_values, labels, class_texts, image_states=image_states)


# What training, evaluation and inference work on: a PeftModel with an adapter of this package, or such a module.
AdaptedModel = PeftModel | TowerClassifier


def html_of(model: PeftModel | TowerClassifier) -> str:
    """What a notebook shows of an adapted model: its method, classes, size and, if known, results."""
    config = model.learner.config
    names = model.class_names
    more = ", ..." if len(names) > 10 else ""
    rows = {
        "base model": config.base_model_name_or_path or "",
        "classes": f"{len(names)}: {', '.join(names[:10])}{more}",
    }
    rows["new classes"] = "yes" if model.takes_new_classes else "no"
    weights = [*model.learner.parameters()]
    if isinstance(model, TowerClassifier) and isinstance(model.model, PeftModel):  # LoRA
        weights += get_peft_model_state_dict(model.model).values()
    rows["trained parameters"] = f"{sum(weight.numel() for weight in weights):,}"
    try:
        results = read_results(config.folder) if config.folder else {}
    except ValueError:  # damaged
        results = {}
    for key, title in {
        "dataset": "tested on",
        "accuracy": "accuracy",
        "zero_shot_accuracy": "zero-shot accuracy",
    }.items():
        if key in results:
            rows[title] = f"{results[key]:.3f}" if key != "dataset" else str(results[key])
    return html_table(f"{config.method} adapter", rows)
