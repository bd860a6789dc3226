"""MaPLe: deep prompts in both towers, the vision prompts coupled to the text prompts.

Source: Khattak, Rasheed, Maaz, Khan, Khan: MaPLe: Multi-modal Prompt Learning, CVPR 2023, arXiv 2210.03117, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import CLIPModel

from ..classes import initial_prompts
from ..config import PromptConfig, documented
from ..learner import OpenPromptLearner
from ..packing import Packing
from ..registry import register
from ..towers import after_bos, encode_image, encode_text, token_embeddings


@dataclass
class MaPLeConfig(PromptConfig):
    """Configuration of MaPLe.

    Example:
        >>> config = MaPLeConfig(class_names=["cat", "dog"], prompt_length=2, prompt_depth=9)
    """

    prompt_length: int = documented(
        2, "n, learned tokens in each tower (N_CTX of the release). Default: the paper's, section 4.1."
    )
    prompt_depth: int = documented(
        9,
        "J, the first layers of each tower that get prompts of their own, 1 to the shallower tower's layers "
        "(PROMPT_DEPTH of the release). Default: the paper's for base to new; it takes 3 across data sets.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("prompt_length", self.prompt_length >= 1, "learn at least 1 token.")
        self.require("prompt_depth", self.prompt_depth >= 1, "give prompts to at least 1 layer.")


class MaPLe(OpenPromptLearner):
    """The text prompts P_0..P_{J-1}, each (n, d_t), and the couplings F_i: d_t -> d_v, one per depth."""

    config: MaPLeConfig
    citation = """@inproceedings{khattak2023maple,
  title = {MaPLe: Multi-modal Prompt Learning},
  author = {Khattak, Muhammad Uzair and Rasheed, Hanoona and Maaz, Muhammad and Khan, Salman and Khan, Fahad Shahbaz},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2023}
}"""
    original_names: ClassVar = {
        "prompt_learner.ctx": "text_prompts.0",
        **{f"prompt_learner.proj.{part}": f"couplings.0.{part}" for part in ("weight", "bias")},
        **{f"prompt_learner.compound_prompts_text.{i}": f"text_prompts.{i + 1}" for i in range(100)},
        **{
            f"prompt_learner.compound_prompt_projections.{i}.{part}": f"couplings.{i + 1}.{part}"
            for i in range(100)
            for part in ("weight", "bias")
        },
    }

    def __init__(self, config: MaPLeConfig, clip: CLIPModel):
        text, vision = clip.config.text_config, clip.config.vision_config
        for tower, layers in (("text", text.num_hidden_layers), ("vision", vision.num_hidden_layers)):
            config.require(
                "prompt_depth",
                config.prompt_depth <= layers,
                f"the {tower} tower has {layers} layers; choose 1 to {layers}.",
            )
        super().__init__(config, clip)
        first = initial_prompts(self.tokenizer(clip), clip, config.initial_text, config.prompt_length)
        deeper = [torch.empty_like(first).normal_(std=0.02) for _ in range(config.prompt_depth - 1)]
        self.text_prompts = nn.ParameterList([first, *deeper])
        self.couplings = nn.ModuleList(nn.Linear(text.hidden_size, vision.hidden_size) for _ in self.text_prompts)

    def text_features(
        self, clip: CLIPModel, input_ids: torch.Tensor, eos: torch.Tensor, packing: Packing | None = None
    ) -> torch.Tensor:
        packing = packing or self.pack(clip, input_ids, eos)
        words = nn.functional.embedding(input_ids, token_embeddings(clip))  # (s, t, d_t)
        embeddings = after_bos(words, self.text_prompts[0])  # (s, t, d_t)
        return encode_text(clip, embeddings, eos, list(self.text_prompts)[1:], packing)  # (s, d)

    def image_features(self, clip: CLIPModel, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        coupled = [
            couple(prompt) for couple, prompt in zip(self.couplings, self.text_prompts, strict=True)
        ]  # J (n, d_v)
        return encode_image(clip, pixel_values, coupled, **kwargs)  # (b, d)


register("MAPLE", MaPLeConfig, MaPLe)
