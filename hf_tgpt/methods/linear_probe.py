"""A linear probe: one linear layer on the frozen image tower's unit features.

Source: Radford et al.: Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, arXiv
2103.00020, section 3.2. There the probe starts from random weights and is fitted with L-BFGS; here it starts from the
class texts and is trained like the other methods.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..adapters.config import PromptConfig
from ..adapters.learner import PromptLearner, classification_loss
from ..adapters.registry import register
from ..encoders import DualEncoder
from ..encoders.walk import encode_image, unit
from ..texts.class_texts import ClassTexts
from ..texts.zero_shot_head import zero_shot_head
from ..utils.fields import checked, documented
from ..utils.names import check_templates
from .zero_shot import ZeroShot


@checked
class LinearProbeConfig(PromptConfig):
    """Configuration of a linear probe.

    Example:
        >>> config = LinearProbeConfig(class_names=["cat", "dog"], initial_weights="random")
    """

    kind: ClassVar = "linear-probe"
    learns_prompts: ClassVar = False
    initial_weights: Literal["class_texts", "random"] = documented(
        "class_texts",
        "Initial weights: the class texts, which give zero-shot classification, or random.",
    )
    templates: list[str] = documented(
        ["a photo of a {}."],
        "Sentences with {} for the class name, averaged after encoding, for the initial weights.",
        check_templates,
    )
    tokenizer_name_or_path: str | None = documented(
        None, "Tokenizer of the sentences; a Hub id or folder. Default: the base model's own."
    )

    @property
    def takes_new_classes(self) -> bool:
        return False


class LinearProbe(PromptLearner):
    """The layer: weight (c, d), bias (c,)."""

    config: LinearProbeConfig
    citation = ZeroShot.citation
    vision_is_frozen = True

    def __init__(self, config: LinearProbeConfig, encoder: DualEncoder):
        super().__init__(config, encoder)
        device = encoder.model.device
        self.head = nn.Linear(encoder.shape()["projection_width"], len(config.class_names), device=device)
        self.awaits_weights = config.inference_mode
        if self.awaits_weights:
            nn.init.constant_(self.head.weight, math.nan)
        elif config.initial_weights == "class_texts":
            with torch.no_grad():
                texts = zero_shot_head(encoder, config.class_names, config.templates, self.tokenizer(encoder))
                self.head.weight.copy_(texts)
                self.head.bias.zero_()

    def forward(
        self,
        encoder: DualEncoder,
        pixel_values: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        class_texts: ClassTexts | None = None,
        image_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        if image_states is None:
            assert pixel_values is not None  # PromptedModel sees to it that there is one of the two
            image_states = self.image_states(encoder, pixel_values, **kwargs)
        features = unit(image_states).to(self.head.weight.dtype)  # (b, d)
        # The model's own scale, since unit features alone learn too slowly at the learning rates of prompts.
        logits = self.head(encoder.logit_scale().to(features.dtype) * features)  # (b, c)
        return ImageClassifierOutput(loss=classification_loss(logits, labels), logits=logits)

    @torch.no_grad()
    def image_states(self, encoder: DualEncoder, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The image features: (b, 3, h, w) -> (b, d)."""
        return encode_image(encoder, pixel_values, **kwargs)

    def linear_head(
        self, encoder: DualEncoder, class_texts: ClassTexts | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (encoder.logit_scale() * self.head.weight).detach(), self.head.bias.detach()


register("LINEAR_PROBE", LinearProbeConfig, LinearProbe)
