"""Any other model that transformers lists for zero-shot image classification: ALIGN, AltCLIP, BLIP, CLIPSeg, ...

Its towers are called through `get_image_features` and `get_text_features`, so it supports the methods that work on
features, but no prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES

from .base import DualEncoder

# SigLIP 2 for pictures of any shape: its pixel values are patches, which also need a mask and their number.
NAFLEX = "siglip2"
_FEATURES = ("get_image_features", "get_text_features")


def other_model_class(model_type: str) -> str | None:
    """The transformers class for a `config.model_type`, if it computes features of pixel values and of ids."""
    name: str = MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(model_type, "")
    kind = getattr(transformers, name, None)
    if model_type == NAFLEX or not all(hasattr(kind, function) for function in _FEATURES):
        return None
    return name


class FeaturesOnly(DualEncoder):
    """A model whose layers are not described here."""

    takes_prompts = False
    causal = False
    prefix = 0
    tokenizer_extras = frozenset({"token_type_ids"})
    attention_inputs = (*DualEncoder.attention_inputs, "query", "key", "value", "qkv")

    @property
    def model_class(self) -> str:  # type: ignore[override]  # of this model, not of a family
        name = other_model_class(self.model.config.model_type)
        assert name is not None  # `encoder_of` ensures it
        return name

    def shape(self) -> dict[str, int]:
        text, vision = self.model.config.text_config, self.model.config.vision_config
        # RoBERTa counts positions from its padding id + 1.
        embeddings: Any = next((part for part in self._modules("text") if hasattr(part, "position_embeddings")), None)
        first = getattr(embeddings, "padding_idx", -1) + 1
        return {
            "text_width": text.hidden_size,
            "text_layers": text.num_hidden_layers,
            "context_length": text.max_position_embeddings - first,
            "vocabulary": text.vocab_size,
            "image_size": vision.image_size,
            "projection_width": self.projection_width(),
        }

    def projection_width(self) -> int:
        config = self.model.config
        return getattr(config, "projection_dim", None) or config.text_config.hidden_size

    def logit_scale(self) -> torch.Tensor:
        """ALIGN and TIPS divide by a temperature."""
        model = self.model
        return 1 / model.temperature if hasattr(model, "temperature") else super().logit_scale()

    def projections(self) -> tuple[Any, Any]:
        """The last layers of both towers that have a matrix, or a filter."""

        def last(tower: str) -> nn.Module:
            return [m for m in self._modules(tower) if getattr(getattr(m, "weight", None), "ndim", 0) > 1][-1]

        return last("text"), last("vis")

    # Text -------------------------------------------------------------------------------------------------------------

    def ends(self, input_ids: torch.Tensor, end_token: int | None = None) -> torch.Tensor:
        """The tokenizer's first EOS; the last token that is not padding if a sentence has none."""
        last = self.last_words(input_ids)
        if end_token is None:
            return last
        is_end = input_ids == end_token
        return torch.where(is_end.any(dim=-1), is_end.int().argmax(dim=-1), last)

    def text_parameters(self) -> Iterator[nn.Parameter]:
        return self._parameters("text")

    def text_is_random(self) -> bool:
        settings = vars(self.model.config.text_config).items()
        return any("drop" in name and isinstance(value, int | float) and value > 0 for name, value in settings)

    def text_features(self, input_ids: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """The model's own: ids (s, t) that end at `ends` (s,) -> (s, d), not normalised."""
        is_word = torch.arange(input_ids.shape[1], device=input_ids.device) <= ends[:, None]  # (s, t)
        return self._features("get_text_features", input_ids, attention_mask=is_word.long())

    # Images -----------------------------------------------------------------------------------------------------------

    def vision_parameters(self) -> Iterator[nn.Parameter]:
        return self._parameters("vis")

    def image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The model's own: (b, 3, h, w) -> (b, d), not normalised."""
        return self._features("get_image_features", pixel_values, **kwargs)

    def vision_tower(self, class_names: Sequence[str]) -> transformers.PreTrainedModel:
        """There is none: raises ValueError."""
        raise ValueError(
            f"transformers has no class for the image tower of {self.model_class} alone; export the adapter to ONNX."
        )

    def _features(self, function: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output of the model's own class, since an adapted model's call would include the adapter."""
        if self.model.training:
            for part in self.model.modules():  # training would change their statistics, which adapters do not save
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()
        answer = getattr(getattr(transformers, self.model_class), function)(self.model, *args, **kwargs)
        return answer if isinstance(answer, torch.Tensor) else answer.pooler_output

    def _parameters(self, tower: str) -> Iterator[nn.Parameter]:
        """The modules with this prefix: `vision_model` and `visual_projection`, or `text_model` and the like."""
        return (weight for name, weight in self.model.named_parameters() if name.startswith(tower))

    def _modules(self, tower: str) -> Iterator[nn.Module]:
        return (module for name, module in self.model.named_modules() if name.startswith(tower))
