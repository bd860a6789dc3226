"""CoOp: learned tokens in the class sentence, shared by all classes or one set for each.

Source: Zhou, Yang, Loy, Liu: Learning to Prompt for Vision-Language Models, IJCV 2022, arXiv 2109.01134, section 3.2.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..adapters.config import TextPromptConfig
from ..adapters.learner import check_rows
from ..adapters.open_learner import Forward, OpenPromptLearner, prompts_in
from ..adapters.registry import register
from ..encoders import DualEncoder
from ..encoders.packing import Packing, common_length
from ..encoders.walk import encode_text, replace_words
from ..texts.class_texts import ClassTexts
from ..texts.sentences import full_stop, initial_prompts
from ..utils.fields import at_least, checked, documented, one_of
from ..utils.names import check_templates

POSITIONS = ("end", "front", "middle")


@checked
class CoOpConfig(TextPromptConfig):
    """Configuration of CoOp.

    Example:
        >>> config = CoOpConfig(class_names=["cat", "dog"], prompt_length=4, initial_text="a photo of a")
    """

    initial_text: str | None = documented(
        None,
        "The class sentence is '{initial_text} {name}.', or this text if it contains {} for the name; "
        "its words before the name initialise the learned tokens (CTX_INIT of the release). None, the paper's main "
        "setting: as many 'X' as learned tokens, initialised at random.",
    )
    prompt_length: int = documented(
        16,
        "M, learned tokens in a class sentence (N_CTX of the release). Default: the paper's.",
        at_least(1, "learn at least 1 token."),
    )
    class_specific: bool = documented(
        False,
        "Whether each class learns its own tokens (CSC of the release); the class list is then fixed. "
        "Default: the paper's unified context.",
    )
    class_position: str = documented(
        "end",
        "Position of the class name: 'end' after the learned tokens, 'front' before them, 'middle' with half of them "
        "on each side (CLASS_TOKEN_POSITION of the release).",
        one_of(*POSITIONS),
    )

    anchor_weight: float = documented(
        0.0,
        "Weight of a term that keeps the class features near the base model's own for `anchor_templates`, as in "
        "KgCoOp. Default: none, as in CoOp.",
        at_least(0, "choose 0 (without this term) or more."),
    )
    anchor_templates: list[str] = documented(
        ["a photo of a {}."], "Sentences with {} for the class name, averaged after encoding.", check_templates
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        has_place = "{}" in (self.initial_text or "")
        remedy = "`initial_text` already places the class name by {}; leave this out, or remove {} from the text."
        self.require("class_position", self.class_position == "end" or not has_place, remedy)

    @property
    def takes_new_classes(self) -> bool:
        return not self.class_specific


class CoOp(OpenPromptLearner):
    """The text prompts, (n, d_t), or (c, n, d_t) if they are class-specific."""

    config: CoOpConfig
    citation = """@article{zhou2022learning,
  title = {Learning to Prompt for Vision-Language Models},
  author = {Zhou, Kaiyang and Yang, Jingkang and Loy, Chen Change and Liu, Ziwei},
  journal = {International Journal of Computer Vision},
  year = {2022}
}"""
    vision_is_frozen = True
    # The release saves only its prompt learner, so in its files the name has no prefix.
    original_names: ClassVar = {"ctx": "text_prompts", "prompt_learner.ctx": "text_prompts"}

    def __init__(self, config: CoOpConfig, encoder: DualEncoder):
        super().__init__(config, encoder)
        tokenizer = self.tokenizer(encoder)
        self.full_stop = (*full_stop(tokenizer), -1)[0]  # -1, which is no token's id, if there is none
        # Departs from the release, which ignores the request for class-specific prompts if there is initial text.
        sets = [
            initial_prompts(tokenizer, encoder, config.initial_text, config.prompt_length)
            for _ in (config.class_names if config.class_specific else [None])
        ]
        self.text_prompts = nn.Parameter(torch.stack(sets) if config.class_specific else sets[0])

    @classmethod
    def fields_of_weights(cls, weights: dict[str, torch.Tensor], class_names: Sequence[str]) -> dict[str, Any]:
        sizes: dict[str, Any] = {"prompt_length": prompts_in(weights, "text_prompts")}
        if sizes["prompt_length"]:
            sizes["class_specific"] = weights["text_prompts"].ndim == 3
        if sizes.get("class_specific"):
            check_rows(weights["text_prompts"], class_names)
        return sizes

    def texts_for(self, encoder: DualEncoder, class_names: Sequence[str]) -> ClassTexts:
        """Also raises ValueError for other classes if the prompts are class-specific."""
        if not self.takes_new_classes and list(class_names) != self.config.class_names:
            raise ValueError(f"`class_specific`=True: {self._closed()}")
        return super().texts_for(encoder, class_names)

    def encode_part(
        self, encoder: DualEncoder, class_texts: ClassTexts, part: slice, packing: Packing | None
    ) -> torch.Tensor:
        prompts = self.text_prompts[part] if self.config.class_specific else self.text_prompts
        return self.text_features(encoder, class_texts.ids[part], class_texts.ends[part], packing, prompts)

    def text_features(
        self,
        encoder: DualEncoder,
        input_ids: torch.Tensor,
        ends: torch.Tensor,
        packing: Packing | None = None,
        prompts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Class sentences "{initial_text} {name}.", ids (s, t), ends (s,) -> (s, d), not normalised.

        `prompts` are the prompts of the sentences' classes, by default the shared ones.
        """
        prompts = self.text_prompts if prompts is None else prompts
        packing = packing or self.pack(encoder, input_ids, ends)
        embeddings = nn.functional.embedding(input_ids, encoder.words())  # (s, t, d_t)
        sentences = replace_words(
            embeddings, prompts, encoder.prefix
        )  # (s, t, d_t): BOS, prompts, name, full stop, EOS
        order = self.order(encoder, input_ids, ends)  # (s, t)
        return encode_text(encoder, sentences.take_along_dim(order[..., None], dim=1), ends, packing=packing)  # (s, d)

    def shared_length(self, encoder: DualEncoder, input_ids: torch.Tensor, ends: torch.Tensor) -> int:
        order = self.order(encoder, input_ids, ends)  # (s, t)
        learned = (order >= encoder.prefix) & (order < encoder.prefix + self.config.prompt_length)
        # Negative numbers stand for the prompts; if each class has its own, only BOS is shared.
        common = input_ids.take_along_dim(order, dim=1).where(~learned, -1 - order)  # (s, t)
        length = common_length(common, ends)
        return min(encoder.prefix, length) if self.config.class_specific else length

    def extra_losses(self, encoder: DualEncoder, computed: Forward) -> dict[str, torch.Tensor]:
        """The distance to the anchors. Source: KgCoOp (Yao et al., CVPR 2023), section 3.2, with unit features."""
        if not self.config.anchor_weight:
            return {}
        anchors = self.frozen_class_features(encoder, self.config.anchor_templates, computed.class_texts)  # (c, d)
        cosines = (computed.class_features * anchors).sum(-1)  # (c,)
        return {"loss_anchor": self.config.anchor_weight * (1 - cosines.mean())}

    def order(self, encoder: DualEncoder, input_ids: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """The token that belongs at each place: ids (s, t), ends (s,) -> (s, t).

        The name is what stands between the learned tokens and the full stop, or EOS if there is none.
        """
        n = self.config.prompt_length
        before = {"end": n, "middle": n // 2, "front": 0}[self.config.class_position]  # prompts before the name
        last = ends[:, None] - 1  # (s, 1)
        stops = (input_ids.gather(1, last) == self.full_stop).long()  # (s, 1)
        start = encoder.prefix
        length = (last + 1 - start - stops - n).clamp(min=0)  # (s, 1), tokens of the name
        place = torch.arange(input_ids.shape[1], device=input_ids.device)  # (t,)
        name = (place >= start + before) & (place < start + before + length)  # (s, t)
        prompts_after = (place >= start + before + length) & (place < start + n + length)  # (s, t)
        return place + name * (n - before) - prompts_after * length  # (s, t)

    def read_texts(self, encoder: DualEncoder, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.takes_new_classes:
            raise ValueError(f"`class_specific`=True: {self._closed()}")
        return super().read_texts(encoder, input_ids)


register("COOP", CoOpConfig, CoOp)
