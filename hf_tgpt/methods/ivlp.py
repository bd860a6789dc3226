"""IVLP: deep prompts in both towers, learned independently. Vision only is VPT, text only a deep CoOp.

Source: the independent V-L prompting that MaPLe is compared with in Khattak, Rasheed, Maaz, Khan, Khan: MaPLe:
Multi-modal Prompt Learning, CVPR 2023, arXiv 2210.03117, section 4.2, and in its release. Vision prompts: Jia, Tang,
Chen, Cardie, Belongie, Hariharan, Lim: Visual Prompt Tuning, ECCV 2022, arXiv 2203.12119 (VPT-Deep).
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
from ..texts.sentences import initial_prompts, word_ids, words_before
from ..utils.fields import at_least, checked, documented

_NONE = "choose 0 (no prompts in this tower) or more."


@checked
class IVLPConfig(TextPromptConfig):
    """Configuration of independent vision-language prompting.

    Example:
        >>> config = IVLPConfig(class_names=["cat", "dog"], text_prompt_length=0, vision_prompt_length=8)  # VPT
    """

    text_prompt_length: int = documented(
        2,
        "Learned tokens in the text tower (N_CTX_TEXT of the release). Default: as released. 0: none, only the class "
        "sentences; initial_text=None then means 'a photo of a'.",
        at_least(0, _NONE),
    )
    vision_prompt_length: int = documented(
        2,
        "Learned tokens in the vision tower (N_CTX_VISION of the release). Default: as released. 0: none.",
        at_least(0, _NONE),
    )
    text_prompt_depth: int = documented(
        9,
        "Number of first layers of the text tower with their own prompts, 0 (none) to all (PROMPT_DEPTH_TEXT of the "
        "release, 12 there). Default: MaPLe's. Ignored if text_prompt_length is 0.",
        at_least(0, _NONE),
    )
    vision_prompt_depth: int = documented(
        9,
        "Number of first layers of the vision tower with their own prompts, 0 (none) to all (PROMPT_DEPTH_VISION of "
        "the release, 12 there). Default: MaPLe's. Ignored if vision_prompt_length is 0.",
        at_least(0, _NONE),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.depth("text") and not self.depth("vision"):
            fields = [f"{tower}_prompt_{size}" for tower in ("text", "vision") for size in ("length", "depth")]
            values = ", ".join(f"`{name}`={getattr(self, name)}" for name in fields)
            raise ValueError(f"{values}: nothing would be learned; give one tower a length and a depth of 1 or more.")
        if not self.depth("text") and self.initial_text is None:
            self.initial_text = "a photo of a"

    def depth(self, tower: str) -> int:
        """Number of layers of the "text" or "vision" tower with prompts, 0 if switched off."""
        return getattr(self, f"{tower}_prompt_depth") if getattr(self, f"{tower}_prompt_length") else 0

    @property
    def prompt_length(self) -> int:
        """Learned tokens in a class sentence, under the name that the other methods use."""
        return self.text_prompt_length


class IVLP(OpenPromptLearner):
    """Text prompts, each (n, d_t), and vision prompts, each (n, d_v), one per layer; none in a tower that is off."""

    config: IVLPConfig
    citation = """@inproceedings{khattak2023maple,
  title = {MaPLe: Multi-modal Prompt Learning},
  author = {Khattak, Muhammad Uzair and Rasheed, Hanoona and Maaz, Muhammad and Khan, Salman and Khan, Fahad Shahbaz},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2023}
}

@inproceedings{jia2022visual,
  title = {Visual Prompt Tuning},
  author = {Jia, Menglin and Tang, Luming and Chen, Bor-Chun and Cardie, Claire and Belongie, Serge and
            Hariharan, Bharath and Lim, Ser-Nam},
  booktitle = {European Conference on Computer Vision},
  year = {2022}
}"""
    original_names: ClassVar = {
        "prompt_learner.ctx": "text_prompts.0",
        "image_encoder.VPT": "vision_prompts.0",
        **{
            f"{tower}_encoder.transformer.resblocks.{i}.VPT_shallow": f"{prompts}.{i}"
            for tower, prompts in (("text", "text_prompts"), ("image", "vision_prompts"))
            for i in range(1, 100)
        },
    }

    def __init__(self, config: IVLPConfig, encoder: DualEncoder):
        for tower in ("text", "vision"):
            layers = encoder.shape()[f"{tower}_layers"]
            remedy = f"the {tower} tower has {layers} layers; choose 0 to {layers}."
            config.require(f"{tower}_prompt_depth", config.depth(tower) <= layers, remedy)
        super().__init__(config, encoder)
        self.text_prompts = random_prompts(config, encoder, "text")
        self.vision_prompts = random_prompts(config, encoder, "vision")
        if len(self.text_prompts):
            tokenizer, text, length = self.tokenizer(encoder), config.initial_text, config.prompt_length
            available = length if text is None else len(word_ids(tokenizer, words_before(text)))
            remedy = f"`initial_text`={text!r} has {available} tokens to start from; use fewer, or initial_text=None."
            config.require("text_prompt_length", length <= available, remedy)
            self.text_prompts[0] = initial_prompts(tokenizer, encoder, text, length)

    @classmethod
    def fields_of_weights(cls, weights: dict[str, torch.Tensor], class_names: Sequence[str]) -> dict[str, Any]:
        sizes = {}
        for tower in ("text", "vision"):
            sizes[f"{tower}_prompt_length"] = prompts_in(weights, f"{tower}_prompts.0")
            sizes[f"{tower}_prompt_depth"] = sum(name.startswith(f"{tower}_prompts.") for name in weights)
        return sizes

    def text_weights(self) -> nn.ParameterList:
        return self.text_prompts

    def text_features(
        self, encoder: DualEncoder, input_ids: torch.Tensor, ends: torch.Tensor, packing: Packing | None = None
    ) -> torch.Tensor:
        packing = packing or self.pack(encoder, input_ids, ends)
        embeddings = nn.functional.embedding(input_ids, encoder.words())  # (s, t, d_t)
        return encode_text(encoder, embeddings, ends, dict(enumerate(self.text_prompts)), packing)  # (s, d)

    def image_features(self, encoder: DualEncoder, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return encode_image(encoder, pixel_values, dict(enumerate(self.vision_prompts)), **kwargs)  # (b, d)

    @property
    def vision_is_frozen(self) -> bool:
        return not len(self.vision_prompts)


def random_prompts(config: IVLPConfig, encoder: DualEncoder, tower: str) -> nn.ParameterList:
    """N(0, 0.02) for every layer of the "text" or "vision" tower with prompts."""
    size = getattr(config, f"{tower}_prompt_length"), encoder.shape()[f"{tower}_width"]
    device = encoder.model.device
    return nn.ParameterList(torch.empty(size, device=device).normal_(std=0.02) for _ in range(config.depth(tower)))


register("IVLP", IVLPConfig, IVLP)
