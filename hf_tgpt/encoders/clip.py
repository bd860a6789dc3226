"""CLIP: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021."""

from __future__ import annotations

import torch

from .base import DualEncoder

# OpenAI's first configs have this `eos_token_id` by mistake; with them CLIP reads at the highest id, which is EOS.
_LEGACY_EOS = 2


class CLIP(DualEncoder):
    """transformers' CLIPModel."""

    model_type = "clip"
    model_class = "CLIPModel"
    vision_class = "CLIPVisionModelWithProjection"

    def ends(self, input_ids: torch.Tensor, end_token: int | None = None) -> torch.Tensor:
        """The first EOS, or the highest id if the config's EOS is the legacy one."""
        if self.model.config.text_config.eos_token_id == _LEGACY_EOS:
            return input_ids.argmax(dim=-1)
        return super().ends(input_ids)
