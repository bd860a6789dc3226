"""CoOp: learned tokens in the class sentence, shared by all classes or one set for each.

Source: Zhou, Yang, Loy, Liu: Learning to Prompt for Vision-Language Models, IJCV 2022, arXiv 2109.01134, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import CLIPModel

from ..classes import PLACEHOLDER, initial_prompts, words
from ..config import PromptConfig, documented
from ..learner import OpenPromptLearner
from ..packing import Packing, common_length
from ..registry import register
from ..towers import after_bos, encode_image, encode_text, token_embeddings

POSITIONS = ("end", "front", "middle")


@dataclass
class CoOpConfig(PromptConfig):
    """Configuration of CoOp.

    Example:
        >>> config = CoOpConfig(class_names=["cat", "dog"], prompt_length=4, initial_text="a photo of a")
    """

    initial_text: str | None = documented(
        None,
        "The class sentence is '{initial_text} {name}.'; learned tokens start from its words (CTX_INIT of the "
        "release). None, the paper's main setting: as many 'X' as learned tokens, and a random start.",
    )
    prompt_length: int = documented(16, "M, learned tokens in a class sentence (N_CTX of the release). Default: paper.")
    class_specific: bool = documented(
        False,
        "Whether each class learns tokens of its own (CSC of the release); the class list is then fixed. "
        "Default: the paper's unified context.",
    )
    class_position: str = documented(
        "end",
        "Where the class name stands: 'end' behind the learned tokens, 'front' before them, 'middle' with half of them "
        "on each side (CLASS_TOKEN_POSITION of the release).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("prompt_length", self.prompt_length >= 1, "learn at least 1 token.")
        self.require("class_position", self.class_position in POSITIONS, f"choose one of {', '.join(POSITIONS)}.")


class CoOp(OpenPromptLearner):
    """The text prompts, (n, d_t), or (c, n, d_t) where they are class-specific."""

    config: CoOpConfig
    citation = """@article{zhou2022learning,
  title = {Learning to Prompt for Vision-Language Models},
  author = {Zhou, Kaiyang and Yang, Jingkang and Loy, Chen Change and Liu, Ziwei},
  journal = {International Journal of Computer Vision},
  year = {2022}
}"""
    vision_is_frozen = True
    # The release saves its prompt learner alone, so in its files the name has no prefix.
    original_names: ClassVar = {"ctx": "text_prompts", "prompt_learner.ctx": "text_prompts"}

    def __init__(self, config: CoOpConfig, clip: CLIPModel):
        super().__init__(config, clip)
        tokenizer = self.tokenizer(clip)
        # The full stop as it follows a word; alone it may be another token.
        self.full_stop = words(tokenizer, f"{PLACEHOLDER}.")[-1]
        # Departs from the release: with initial text, it ignores that prompts are to be class-specific.
        sets = [
            initial_prompts(tokenizer, clip, config.initial_text, config.prompt_length)
            for _ in (config.class_names if config.class_specific else [None])
        ]
        self.text_prompts = nn.Parameter(torch.stack(sets) if config.class_specific else sets[0])

    @property
    def takes_new_classes(self) -> bool:
        return not self.config.class_specific

    def set_class_names(self, clip: CLIPModel, class_names: list[str]) -> None:
        """Other classes from now on. Raises ValueError where the prompts belong to the present ones."""
        if not self.takes_new_classes and class_names != self.config.class_names:
            raise ValueError(f"`class_specific`=True: {self._closed()}")
        super().set_class_names(clip, class_names)

    def class_chunk(self, clip: CLIPModel, part: slice, packing: Packing | None) -> torch.Tensor:
        prompts = self.text_prompts[part] if self.config.class_specific else self.text_prompts
        return self.text_features(clip, self.class_ids[part], self.class_eos[part], packing, prompts)

    def text_features(
        self,
        clip: CLIPModel,
        input_ids: torch.Tensor,
        eos: torch.Tensor,
        packing: Packing | None = None,
        prompts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Class sentences "{initial_text} {name}.", ids (s, t), EOS positions (s,) -> (s, d), not normalised.

        `prompts` are those of the sentences' classes; the shared ones unless given.
        """
        prompts = self.text_prompts if prompts is None else prompts
        packing = packing or self.pack(clip, input_ids, eos)
        embeddings = nn.functional.embedding(input_ids, token_embeddings(clip))  # (s, t, d_t)
        sentences = after_bos(embeddings, prompts)  # (s, t, d_t): BOS, prompts, name, full stop, EOS
        order = self.order(input_ids, eos)  # (s, t)
        return encode_text(clip, sentences.take_along_dim(order[..., None], dim=1), eos, packing=packing)  # (s, d)

    def shared_length(self, input_ids: torch.Tensor, eos: torch.Tensor) -> int:
        order = self.order(input_ids, eos)  # (s, t)
        learned = (order > 0) & (order <= self.config.prompt_length)
        # Prompts go by their number, which no word has; where each class has its own, nothing but BOS is shared.
        words = input_ids.take_along_dim(order, dim=1).where(~learned, -order)  # (s, t)
        return min(1, common_length(words, eos)) if self.config.class_specific else common_length(words, eos)

    def image_features(self, clip: CLIPModel, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return encode_image(clip, pixel_values, **kwargs)  # (b, d), plain CLIP

    def order(self, input_ids: torch.Tensor, eos: torch.Tensor) -> torch.Tensor:
        """The token that belongs at each place: ids (s, t), EOS positions (s,) -> (s, t).

        The name is what stands between the learned tokens and the full stop, or EOS where there is none.
        """
        n = self.config.prompt_length
        before = {"end": n, "middle": n // 2, "front": 0}[self.config.class_position]  # prompts before the name
        last = eos[:, None] - 1  # (s, 1)
        stops = (input_ids.gather(1, last) == self.full_stop).long()  # (s, 1)
        length = (last - stops - n).clamp(min=0)  # (s, 1), tokens of the name
        place = torch.arange(input_ids.shape[1], device=input_ids.device)  # (t,)
        name = (place > before) & (place <= before + length)  # (s, t)
        prompts_after = (place > before + length) & (place <= n + length)  # (s, t)
        return place + name * (n - before) - prompts_after * length  # (s, t)

    def read_texts(self, clip: CLIPModel, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.takes_new_classes:
            raise ValueError(f"`class_specific`=True: {self._closed()}")
        return super().read_texts(clip, input_ids)


register("COOP", CoOpConfig, CoOp)
