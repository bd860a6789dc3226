"""CoCoOp: learned text tokens, all shifted by one function of the image.

Source: Zhou, Yang, Loy, Liu: Conditional Prompt Learning for Vision-Language Models, CVPR 2022, arXiv 2203.05557,
section 3.2.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..adapters.config import TextPromptConfig
from ..adapters.image_conditioned import ImageConditionedLearner
from ..adapters.open_learner import prompts_in
from ..adapters.registry import register
from ..encoders import DualEncoder
from ..texts.sentences import initial_prompts
from ..utils.fields import at_least, checked, documented


@checked
class CoCoOpConfig(TextPromptConfig):
    """Configuration of CoCoOp.

    Example:
        >>> config = CoCoOpConfig(class_names=["cat", "dog"], prompt_length=4)
    """

    prompt_length: int = documented(
        4,
        "n, learned text tokens (N_CTX of the release). Default: the paper's.",
        at_least(1, "learn at least 1 token."),
    )
    reduction: int = documented(
        16,
        "Ratio of the image feature's width d to the bottleneck's. Default: the paper's.",
        at_least(1),
    )


class CoCoOp(ImageConditionedLearner):
    """The tokens v (n, d_t) and h, which maps the image feature to a shift of all of them."""

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

    def __init__(self, config: CoCoOpConfig, encoder: DualEncoder):
        super().__init__(config, encoder)
        shape = encoder.shape()
        width = shape["projection_width"]
        narrow = max(1, width // config.reduction)
        self.text_prompts = nn.Parameter(
            initial_prompts(self.tokenizer(encoder), encoder, config.initial_text, config.prompt_length)
        )
        self.shift = nn.Sequential(nn.Linear(width, narrow), nn.ReLU(), nn.Linear(narrow, shape["text_width"]))

    @classmethod
    def fields_of_weights(cls, weights: dict[str, torch.Tensor], class_names: Sequence[str]) -> dict[str, Any]:
        sizes = {"prompt_length": prompts_in(weights, "text_prompts")}
        if "shift.0.weight" in weights:
            narrow, width = weights["shift.0.weight"].shape
            sizes["reduction"] = width // narrow
        return sizes

    def prompts(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.text_prompts + self.shift(image_features)[:, None]  # v_m + h(x0): (b, n, d_t)


register("COCOOP", CoCoOpConfig, CoCoOp)
