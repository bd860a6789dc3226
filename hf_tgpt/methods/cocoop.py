"""CoCoOp: learned text tokens, all shifted by one function of the image.

Source: Zhou, Yang, Loy, Liu: Conditional Prompt Learning for Vision-Language Models, CVPR 2022, arXiv 2203.05557,
section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import CLIPModel

from ..classes import initial_prompts
from ..conditioned import ImageConditionedLearner
from ..config import PromptConfig, documented
from ..registry import register


@dataclass
class CoCoOpConfig(PromptConfig):
    """Configuration of CoCoOp.

    Example:
        >>> config = CoCoOpConfig(class_names=["cat", "dog"], prompt_length=4)
    """

    prompt_length: int = documented(4, "n, learned text tokens (N_CTX of the release). Default: the paper's.")
    reduction: int = documented(
        16, "The image feature's width d over that of the bottleneck it passes through. Default: the paper's."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("prompt_length", self.prompt_length >= 1, "learn at least 1 token.")
        self.require("reduction", self.reduction >= 1, "choose 1 or more.")


class CoCoOp(ImageConditionedLearner):
    """The tokens v (n, d_t) and h, from the image feature to a shift of all of them."""

    config: CoCoOpConfig
    citation = """@inproceedings{zhou2022conditional,
  title = {Conditional Prompt Learning for Vision-Language Models},
  author = {Zhou, Kaiyang and Yang, Jingkang and Loy, Chen Change and Liu, Ziwei},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2022}
}"""
    vision_is_frozen = True
    original_names: ClassVar = {
        "prompt_learner.ctx": "text_prompts",
        **{
            f"prompt_learner.meta_net.linear{i + 1}.{part}": f"shift.{2 * i}.{part}"
            for i in range(2)
            for part in ("weight", "bias")
        },
    }

    def __init__(self, config: CoCoOpConfig, clip: CLIPModel):
        super().__init__(config, clip)
        text_width, width = clip.config.text_config.hidden_size, clip.config.projection_dim
        narrow = max(1, width // config.reduction)
        self.text_prompts = nn.Parameter(
            initial_prompts(self.tokenizer(clip), clip, config.initial_text, config.prompt_length)
        )
        self.shift = nn.Sequential(nn.Linear(width, narrow), nn.ReLU(), nn.Linear(narrow, text_width))

    def prompts(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.text_prompts + self.shift(image_features)[:, None]  # v_m + h(x0): (b, n, d_t)


register("COCOOP", CoCoOpConfig, CoCoOp)
