"""The Bonder of TGP-T: queries attend to themselves and to an image's tokens, and become prompts.

Source: Tan, Li, Zhou, Wan, Lei, Zhang: Compound Text-Guided Prompt Tuning via Image-Adaptive Cues, AAAI 2024,
arXiv 2312.06401, section 3.2, figure 3.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

NUM_HEADS = 8


class Bonder(nn.Module):
    """Q + self-attention, + cross-attention to the image tokens, + MLP.

    Raises ValueError for a width that is not a multiple of the number of heads.
    """

    # The release's names of its parts -> ours.
    original_names: ClassVar[dict[str, str]] = {
        "norm1": "norm_self",
        "self_attn_layer.qkv": "self_qkv",
        "self_attn_layer.proj": "self_out",
        "norm2_q": "norm_query",
        "norm2_kv": "norm_image",
        "cross_attn.q": "cross_query",
        "cross_attn.proj": "cross_out",
        "norm_mlp": "norm_mlp",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
    }

    def __init__(self, width: int):
        super().__init__()
        if width % NUM_HEADS:
            raise ValueError(f"The width of the text tower is {width}; TGP-T's Bonder needs a multiple of {NUM_HEADS}.")
        self.norm_self = nn.LayerNorm(width)
        self.self_qkv = nn.Linear(width, 3 * width, bias=False)
        self.self_out = nn.Linear(width, width)
        self.norm_query = nn.LayerNorm(width)
        self.norm_image = nn.LayerNorm(width)
        self.cross_query = nn.Linear(width, width, bias=False)
        self.cross_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, queries: torch.Tensor, image_tokens: torch.Tensor) -> torch.Tensor:
        """queries (1, n, d), image_tokens (b, p, d) -> prompts (b, n, d)."""
        queries = queries + self.self_attention(self.norm_self(queries))  # (1, n, d), once for all images
        keys = self.norm_image(image_tokens)  # (b, p, d), also the values
        looking = self.cross_query(self.norm_query(queries)).expand(keys.shape[0], -1, -1)  # (b, n, d)
        looking, keys = looking[:, None], keys[:, None]  # one head
        values = F.scaled_dot_product_attention(looking, keys, keys, scale=self.cross_scale())[:, 0]  # (b, n, d)
        queries = queries + self.cross_out(values)  # (b, n, d)
        return queries + self.mlp(self.norm_mlp(queries))  # (b, n, d)

    def attention(self, queries: torch.Tensor, image_tokens: torch.Tensor) -> torch.Tensor:
        """The weights of the cross-attention: queries (1, n, d), image_tokens (b, p, d) -> (b, n, p), rows of sum 1."""
        queries = queries + self.self_attention(self.norm_self(queries))
        keys = self.norm_image(image_tokens)
        return (self.cross_scale() * self.cross_query(self.norm_query(queries)) @ keys.transpose(1, 2)).softmax(-1)

    def cross_scale(self) -> float:
        """The release's: by the width of one of eight heads, though the cross-attention has a single head."""
        return (self.cross_query.in_features // NUM_HEADS) ** -0.5

    def self_attention(self, queries: torch.Tensor) -> torch.Tensor:
        """(1, n, d) -> (1, n, d) with eight heads."""
        heads = (
            self.self_qkv(queries).unflatten(-1, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)
        )  # (3, 1, heads, n, d/heads)
        return self.self_out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
