"""TGP-T: a Bonder turns each image's features into two text prompts, supervised by category and content sentences.

Source: Tan, Li, Zhou, Wan, Lei, Zhang: Compound Text-Guided Prompt Tuning via Image-Adaptive Cues, AAAI 2024,
arXiv 2312.06401, section 3.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import CLIPModel
from transformers.modeling_outputs import ImageClassifierOutput

from ..bonder import Bonder
from ..classes import PLACEHOLDER, tokenize, words
from ..config import PromptConfig, check_templates, documented
from ..learner import PromptLearner, classification_loss
from ..registry import register
from ..spelling import Sentences, check_captions, sentence_loss, spelled_tokens
from ..towers import (
    encode_text,
    encode_tokens,
    eos_positions,
    pool_image,
    project_image,
    token_embeddings,
    unit,
    vision_tokens,
)

LOGIT_SCALE = 100.0
SUPERVISION = {"none": (), "category": ("category",), "content": ("content",), "both": ("category", "content")}


@dataclass
class TGPTConfig(PromptConfig):
    """Configuration of TGP-T.

    The prompts have the width of the text tower. Where a CLIP's joint space is of another width, a trained linear map,
    which starts as the transpose of CLIP's text projection, brings the image tokens to it.

    Example:
        >>> config = TGPTConfig(class_names=["cat", "dog"], templates=["a photo of a {}.", "a drawing of a {}."])
    """

    initial_text: str | None = documented(
        "a photo of a",
        "The category sentence is '{initial_text} {name}.', and the first category queries start from its words. None: "
        "the first of templates, and a random start. Default: as released.",
    )
    num_category_queries: int = documented(32, "Tokens of the category prompt, Q_category. Default: as released.")
    num_content_queries: int = documented(64, "Tokens of the content prompt, Q_content. Default: as released.")
    templates: list[str] = documented(
        ["a photo of a {}."],
        "Sentences with {} for the class name; their mean text feature is the zero-shot head, from which the "
        "classifier W starts. The first also describes a picture that has no description. Default: CLIP's plainest.",
    )
    supervision: str = documented(
        "both",
        "Which sentences supervise the prompts: 'category', 'content', 'both' or, for an ablation, 'none'. Default: as "
        "released.",
    )
    label_smoothing: float = documented(
        0.1, "Of the two sentence losses, 0 to below 1; the classification loss has none. Default: as released."
    )
    wise_ft: float = documented(
        0.0,
        "Share of the zero-shot head in the classifier's weights outside training, 0 (trained head alone) to 1. "
        "The paper reports 0 and 0.5. Ignored in training.",
    )
    changeable: ClassVar = ("wise_ft",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_category_queries", "num_content_queries"):
            self.require(name, getattr(self, name) >= 1, "learn at least 1 query.")
        self.require("supervision", self.supervision in SUPERVISION, f"choose one of {', '.join(SUPERVISION)}.")
        self.require("label_smoothing", 0 <= self.label_smoothing < 1, "choose 0 to below 1.")
        self.require("wise_ft", 0 <= self.wise_ft <= 1, "choose 0 to 1.")
        check_templates(self.templates)


@dataclass
class TGPTOutput(ImageClassifierOutput):
    """ImageClassifierOutput with TGP-T's parts.

    `head_logits` and `zero_shot_logits` (b, c) are those of the trained and of the zero-shot head alone, on the same
    features. WiSE-FT at any share a is (1 - a) * head_logits + a * zero_shot_logits; `logits` have a = `wise_ft`.
    """

    loss_classification: torch.Tensor | None = None
    loss_category: torch.Tensor | None = None
    loss_content: torch.Tensor | None = None
    head_logits: torch.Tensor | None = None
    zero_shot_logits: torch.Tensor | None = None


class TGPT(PromptLearner):
    """Queries, Bonders and the classifier W (c, 2d)."""

    config: TGPTConfig
    citation = """@inproceedings{tan2024compound,
  title = {Compound Text-Guided Prompt Tuning via Image-Adaptive Cues},
  author = {Tan, Hao and Li, Jun and Zhou, Yizhuang and Wan, Jun and Lei, Zhen and Zhang, Xiangyu},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year = {2024}
}"""
    vision_is_frozen = counts_tokens = True
    original_names: ClassVar = {
        "cls_head.fc.weight": "head",
        **{f"prompt_learner.query_{prompt}": f"{prompt}_queries" for prompt in ("category", "content")},
        **{
            f"prompt_learner.bonder_{prompt}.{theirs}.{part}": f"{prompt}_bonder.{ours}.{part}"
            for prompt in ("category", "content")
            for theirs, ours in Bonder.original_names.items()
            for part in ("weight", "bias")
        },
    }

    def __init__(self, config: TGPTConfig, clip: CLIPModel):
        super().__init__(config, clip)
        self.uses_captions = "content" in SUPERVISION[config.supervision]
        text, width = clip.config.text_config, clip.config.projection_dim
        text_width, room = text.hidden_size, text.max_position_embeddings - 3  # BOS, "." and EOS
        for name in ("num_category_queries", "num_content_queries"):
            config.require(name, getattr(config, name) <= room, f"the context of {room + 3} leaves room for {room}.")

        tokenizer = self.tokenizer(clip)
        names, templates = config.class_names, config.templates
        start = templates[0] if config.initial_text is None else config.initial_text + " {}."

        def sentences(template: str) -> Sentences:
            return tokenize(tokenizer, [template.replace("{}", name) for name in names], clip, names)

        category = (nn.Buffer(part, persistent=False) for part in sentences(start))
        self.category_ids, self.category_eos = category  # (c, t), (c,)
        self.default_caption_ids = nn.Buffer(sentences(templates[0])[0], persistent=False)  # (c, t)
        # BOS, full stop and EOS, (1, 3). The full stop as it follows a word; alone it may be another token.
        self.frame_ids = nn.Buffer(tokenize(tokenizer, [f"{PLACEHOLDER}."], clip)[0][:, [0, -2, -1]], persistent=False)
        self._warned = False

        def queries(count: int) -> torch.Tensor:
            return torch.empty(1, count, text_width, device=clip.device).normal_(std=0.02)

        category_queries = queries(config.num_category_queries)
        if config.initial_text is not None:
            first = words(tokenizer, config.initial_text)[: config.num_category_queries]
            category_queries[0, : len(first)] = token_embeddings(clip)[first].detach()
        self.category_queries = nn.Parameter(category_queries)  # (1, 32, d_t)
        self.content_queries = nn.Parameter(queries(config.num_content_queries))  # (1, 64, d_t)
        self.category_bonder = Bonder(text_width)
        self.content_bonder = Bonder(text_width)
        # Departs from the release, which takes both widths to be the same: where they differ, a trained map brings the
        # image tokens to the text width. It starts as the transpose of CLIP's own text projection.
        self.image_to_text: nn.Module = nn.Identity()
        if width != text_width:
            self.image_to_text = nn.Linear(width, text_width, bias=False)
            self.image_to_text.weight = nn.Parameter(clip.text_projection.weight.detach().float().T.clone())

        heads = [encode_tokens(clip, *sentences(template), chunk=config.text_chunk_size) for template in templates]
        head = torch.stack(heads).mean(0)  # (c, d)
        self.zero_shot_head = nn.Buffer(unit(torch.cat([head, head], dim=-1)), persistent=False)  # (c, 2d)
        self.head = nn.Parameter(self.zero_shot_head.clone())  # W (c, 2d)

    def forward(
        self,
        clip: CLIPModel,
        pixel_values: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        caption_ids: torch.Tensor | None = None,
        image_states: torch.Tensor | None = None,
        tokens_per_image: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> TGPTOutput:
        """pixel_values (b, 3, h, w), labels (b,), caption_ids (b, t): one tokenised description per picture.

        `loss` is that of classification and, in training or with caption_ids, of the sentences, added up. Raises
        ValueError for a description without EOS.
        """
        if image_states is None:
            assert pixel_values is not None  # PromptedCLIPModel sees to it that there is one of the two
            image_states = self.image_states(clip, pixel_values, **kwargs)  # (b, p, d_v)
        image_tokens = project_image(clip, image_states)  # X (b, p, d)
        image_tokens = self.image_to_text(image_tokens.to(self.head.dtype))  # (b, p, d_t)
        image_features = pool_image(clip, image_states)  # v (b, d)

        category = self.category_bonder(self.category_queries, image_tokens)  # P_category (b, 32, d_t)
        content = self.content_bonder(self.content_queries, image_tokens)  # P_content (b, 64, d_t)
        text_features = (self.read(clip, category) + self.read(clip, content)) / 2  # t (b, d)
        features = unit(torch.cat([image_features, text_features], dim=-1))  # (b, 2d)
        zero_shot_logits = LOGIT_SCALE * features @ self.zero_shot_head.to(features.dtype).T  # (b, c)
        logits = head_logits = LOGIT_SCALE * features @ self.head.to(features.dtype).T  # (b, c)
        if not self.training:  # linear in the weights, so mixing logits is mixing heads
            logits = torch.lerp(logits, zero_shot_logits, self.config.wise_ft)
        output = TGPTOutput(logits=logits, head_logits=head_logits, zero_shot_logits=zero_shot_logits)
        output.loss = output.loss_classification = classification_loss(logits, labels)
        if labels is None or not (self.training or caption_ids is not None):
            return output
        for name, told in self.sentences(clip, labels, caption_ids).items():
            prompts, of_all = category if name == "category" else content, (tokens_per_image or {}).get(name)
            loss = sentence_loss(prompts, *told, token_embeddings(clip), self.config.label_smoothing, of_all)
            output[f"loss_{name}"], output.loss = loss, output.loss + loss
        return output

    def tokens_per_image(
        self, clip: CLIPModel, labels: torch.Tensor, caption_ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        told = self.sentences(clip, labels, caption_ids).items()
        return {name: spelled_tokens(eos, getattr(self.config, f"num_{name}_queries")) for name, (_, eos) in told}

    def sentences(self, clip: CLIPModel, labels: torch.Tensor, captions: torch.Tensor | None) -> dict[str, Sentences]:
        """What each of the prompts for pictures is to spell."""
        told = {"content": self.descriptions(clip, captions, labels)} if self.uses_captions else {}
        told["category"] = self.category_ids[labels], self.category_eos[labels]
        return {name: told[name] for name in SUPERVISION[self.config.supervision]}

    def image_states(self, clip: CLIPModel, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The vision tower's last hidden states: the Bonder reads all tokens. (b, 3, h, w) -> (b, p, d_v)."""
        return vision_tokens(clip, pixel_values, **kwargs)

    def read(self, clip: CLIPModel, prompts: torch.Tensor) -> torch.Tensor:
        """T of "[BOS] P . [EOS]", n + 3 tokens: prompts (b, n, d_t) -> (b, d), not normalised."""
        bos, stop, eos = token_embeddings(clip)[self.frame_ids[0]].to(prompts.dtype)  # (d_t,) each
        count, length, _ = prompts.shape
        frame = [part.expand(count, 1, -1) for part in (bos, stop, eos)]
        embeddings = torch.cat([frame[0], prompts, *frame[1:]], dim=1)  # (b, n + 3, d_t)
        return encode_text(clip, embeddings, torch.full((count,), length + 2, device=prompts.device))

    @torch.compiler.disable  # it looks at values
    def descriptions(self, clip: CLIPModel, ids: torch.Tensor | None, labels: torch.Tensor) -> Sentences:
        """One sentence for each picture, ids (b, t) and EOS positions (b,); None stands for the template's."""
        if ids is None:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "TGP-T is trained without descriptions (`caption_ids` is None): the content prompt is supervised "
                    f"by {self.config.templates[0]!r} with the class name instead.",
                    stacklevel=2,
                )
            ids = self.default_caption_ids[labels]
        eos = eos_positions(clip, ids)
        check_captions(ids, eos, self.frame_ids[0, -1], len(labels))
        return ids, eos


register("TGPT", TGPTConfig, TGPT)
