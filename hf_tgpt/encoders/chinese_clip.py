"""Chinese-CLIP: Yang et al., Chinese CLIP: Contrastive Vision-Language Pretraining in Chinese, 2022, arXiv 2211.01335.

CLIP's image tower and a BERT, whose tokens attend to each other but not to padding; the first token, CLS, is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from ..utils.compat import encoder_layer, padding_mask
from .base import DualEncoder, Layer


class ChineseCLIP(DualEncoder):
    """transformers' ChineseCLIPModel. CLIP's own class serves as its image tower with the projection."""

    model_type = "chinese_clip"
    model_class = "ChineseCLIPModel"
    vision_class = "CLIPVisionModelWithProjection"
    image_processor = "ChineseCLIPImageProcessor"
    tokenizer_extras = frozenset({"token_type_ids"})
    attention_inputs = (*DualEncoder.attention_inputs, "query", "key", "value")
    causal = False

    def words(self) -> torch.Tensor:
        return self.model.text_model.embeddings.word_embeddings.weight

    def ends(self, input_ids: torch.Tensor, end_token: int | None = None) -> torch.Tensor:
        return self.last_words(input_ids)

    def reading_places(self, ends: torch.Tensor, length: int) -> torch.Tensor:
        return torch.zeros_like(ends)

    def text_is_random(self) -> bool:
        config = self.model.config.text_config
        return max(config.hidden_dropout_prob, config.attention_probs_dropout_prob) > 0

    def text_mask(self, hidden: torch.Tensor, ends: torch.Tensor) -> torch.Tensor | None:
        is_word = torch.arange(hidden.shape[1], device=hidden.device) <= ends[:, None]  # (s, t)
        return padding_mask(self.model.text_model.config, hidden, is_word)

    def text_layers(self) -> list[Layer]:
        return [encoder_layer(layer, causal=False) for layer in self.model.text_model.encoder.layer]

    def leave_text(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.text_projection(hidden)

    def labelled(self, class_names: Sequence[str]) -> Any:
        settings = super().labelled(class_names).to_dict()
        del settings["model_type"]
        return transformers.CLIPVisionConfig(**settings)
