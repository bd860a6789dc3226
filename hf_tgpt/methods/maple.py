"""MaPLe: deep prompts in both towers, the vision prompts coupled to the text prompts.

Source: Khattak, Rasheed, Maaz, Khan, Khan: MaPLe: Multi-modal Prompt Learning, CVPR 2023, arXiv 2210.03117, section 3.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..adapters.config import TextPromptConfig
from ..adapters.open_learner import OpenPromptLearner, prompts_in
from ..adapters.registry import register
from ..encoders import DualEncoder
from ..encoders.packing import Packing
from ..encoders.walk import encode_image, encode_text
from ..texts.sentences import initial_prompts
from ..utils.fields import at_least, checked, documented


@checked
class MaPLeConfig(TextPromptConfig):
    """Configuration of MaPLe.

    Example:
        >>> config = MaPLeConfig(class_names=["cat", "dog"], prompt_length=2, prompt_depth=9)
    """

    prompt_length: int = documented(
        2,
        "n, learned tokens in each tower (N_CTX of the release). Default: the paper's, section 4.1.",
        at_least(1, "learn at least 1 token."),
    )
    prompt_depth: int = documented(
        9,
        "J, number of first layers of each tower with their own prompts, 1 to the layers of the shallower tower "
        "(PROMPT_DEPTH of the release). Default: the paper's for base to new; it uses 3 across data sets.",
        at_least(1, "give prompts to at least 1 layer."),
    )


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

    def __init__(self, config: MaPLeConfig, encoder: DualEncoder):
        shape = encoder.shape()
        for tower in ("text", "vision"):
            layers = shape[f"{tower}_layers"]
            remedy = f"the {tower} tower has {layers} layers; choose 1 to {layers}."
            config.require("prompt_depth", config.prompt_depth <= layers, remedy)
        super().__init__(config, encoder)
        first = initial_prompts(self.tokenizer(encoder), encoder, config.initial_text, config.prompt_length)
        deeper = [torch.empty_like(first).normal_(std=0.02) for _ in range(config.prompt_depth - 1)]
        self.text_prompts = nn.ParameterList([first, *deeper])
        self.couplings = nn.ModuleList(nn.Linear(shape["text_width"], shape["vision_width"]) for _ in self.text_prompts)

    @classmethod
    def fields_of_weights(cls, weights: dict[str, torch.Tensor], class_names: Sequence[str]) -> dict[str, Any]:
        depth = sum(name.startswith("text_prompts.") for name in weights)
        return {"prompt_length": prompts_in(weights, "text_prompts.0"), "prompt_depth": depth}

    def text_features(
        self, encoder: DualEncoder, input_ids: torch.Tensor, ends: torch.Tensor, packing: Packing | None = None
    ) -> torch.Tensor:
        packing = packing or self.pack(encoder, input_ids, ends)
        embeddings = nn.functional.embedding(input_ids, encoder.words())  # (s, t, d_t)
        return encode_text(encoder, embeddings, ends, dict(enumerate(self.text_prompts)), packing)  # (s, d)

    def image_features(self, encoder: DualEncoder, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        pairs = zip(self.couplings, self.text_prompts, strict=True)
        prompts = {layer: couple(prompt) for layer, (couple, prompt) in enumerate(pairs)}  # J of (n, d_v)
        return encode_image(encoder, pixel_values, prompts, **kwargs)  # (b, d)


register("MAPLE", MaPLeConfig, MaPLe)
