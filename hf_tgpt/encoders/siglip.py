"""SigLIP: Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023, arXiv 2303.15343, and SigLIP 2 of fixed
resolution: Tschannen et al., arXiv 2502.14786.

Its text tower reads everything, including padding, and uses the last position of a filled context; its image tower has
attention pooling instead of a class token. Checkpoints name no EOS, so sentences end at the tokenizer's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from .base import DualEncoder


class SigLIP(DualEncoder):
    """transformers' SiglipModel.

    Vision prompts take part only in the layers: the pooling reads the patches, since Jia et al. (ECCV 2022, section
    4.3) found lower accuracy if the prompts' outputs are pooled.
    """

    model_type = "siglip"
    model_class = "SiglipModel"
    vision_class = "SiglipVisionModel"
    vision_output = "pooler_output"
    image_processor = "SiglipImageProcessor"
    prefix = 0
    sigmoid = True
    causal = False
    fills_context = True
    class_tokens = 0

    def projection_width(self) -> int:
        return self.model.config.text_config.projection_size

    def logit_scale(self) -> torch.Tensor:
        return super().logit_scale().squeeze()

    def scale(self, cosines: torch.Tensor) -> torch.Tensor:
        return super().scale(cosines) + self.model.logit_bias

    def projections(self) -> tuple[Any, Any]:
        return self.model.text_model.head, self.model.vision_model.head.mlp.fc2

    def contrastive_loss(self, logits: torch.Tensor) -> torch.Tensor:
        """The sigmoid loss: each pair is independently a match or not."""
        signs = 2 * torch.eye(len(logits), device=logits.device) - torch.ones_like(logits)
        return -F.logsigmoid(signs * logits.T).sum(dim=-1).mean()

    # Text -------------------------------------------------------------------------------------------------------------

    def ends(self, input_ids: torch.Tensor, end_token: int | None = None) -> torch.Tensor:
        """The tokenizer's EOS; the last position, where the sentence is read, if EOS is not given."""
        if end_token is None:
            return torch.full_like(input_ids[:, 0], input_ids.shape[1] - 1)
        return (input_ids == end_token).int().argmax(dim=-1)

    def reading_places(self, ends: torch.Tensor, length: int) -> torch.Tensor:
        return torch.full_like(ends, length - 1)

    def text_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.model.text_model.parameters()

    def text_mask(self, hidden: torch.Tensor, ends: torch.Tensor) -> None:
        """There is none."""

    def leave_text(self, hidden: torch.Tensor) -> torch.Tensor:
        tower = self.model.text_model
        return tower.head(tower.final_layer_norm(hidden))

    # Images -----------------------------------------------------------------------------------------------------------

    def vision_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.model.vision_model.parameters()

    def after_prompts(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def project_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """They are as wide as the joint space."""
        return tokens

    def leave_image(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.vision_model.head(self.normalize_tokens(tokens))

    def vision_tower(self, class_names: Sequence[str]) -> transformers.PreTrainedModel:
        """A copy of only the image tower, with its pooling: a plain transformers model with these labels."""
        tower = transformers.SiglipVisionModel(self.labelled(class_names)).to(self.dtype)
        weights = self.model.vision_model.state_dict().values()
        # In the same order; names differ by the tower's place in the model.
        tower.load_state_dict(dict(zip(tower.state_dict(), weights, strict=True)))
        return tower

    def feature_attention(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The pooling's attention after the last layer; in an earlier layer, the patches' mean attention."""
        patches, layers = self.patch_rows() ** 2, self.image_layers()
        if layer < len(layers) - 1:
            return self.image_attention(layer, hidden)[:, :, :patches].mean(2)
        tokens = self.normalize_tokens(layers[layer](hidden, None)[:, :patches])  # (b, p, d_v)
        pooling = self.model.vision_model.head
        probe = pooling.probe.expand(len(tokens), -1, -1)
        return pooling.attention(probe, tokens, tokens, average_attn_weights=False)[1][:, :, 0].float()
