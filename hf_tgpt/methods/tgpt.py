"""TGP-T: a Bonder turns each image's features into two text prompts, supervised by category and content sentences.

Source: Tan, Li, Zhou, Wan, Lei, Zhang: Compound Text-Guided Prompt Tuning via Image-Adaptive Cues, AAAI 2024,
arXiv 2312.06401, section 3.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..adapters.config import TextPromptConfig
from ..adapters.learner import PromptLearner, check_rows, classification_loss
from ..adapters.open_learner import prompts_in
from ..adapters.registry import register
from ..encoders import DualEncoder
from ..encoders.walk import encode_text, image_tokens, unit
from ..texts.class_texts import ClassTexts
from ..texts.kept import Kept, kept
from ..texts.sentences import PLACEHOLDER, Sentences, class_template, full_stop, tokenize, word_ids, words_before
from ..texts.zero_shot_head import mean_features
from ..utils.fields import at_least, below, between, checked, documented, one_of
from ..utils.names import check_templates
from .bonder import Bonder
from .sentence_loss import check_captions, sentence_loss, target_tokens

LOGIT_SCALE = 100.0
SUPERVISION = {"none": (), "category": ("category",), "content": ("content",), "both": ("category", "content")}


@checked
class TGPTConfig(TextPromptConfig):
    """Configuration of TGP-T.

    The prompts have the width of the text tower. If a CLIP's joint space has another width, a trained linear map,
    initialised as the transpose of CLIP's text projection, maps the image tokens to it.

    Example:
        >>> config = TGPTConfig(class_names=["cat", "dog"], templates=["a photo of a {}.", "a drawing of a {}."])
    """

    initial_text: str | None = documented(
        "a photo of a",
        "The category sentence is '{initial_text} {name}.', or this text if it contains {} for the name; the first "
        "category queries start from its words before the name. None: the first of templates, initialised at random. "
        "Default: as released.",
    )
    num_category_queries: int = documented(
        32, "Tokens of the category prompt, Q_category. Default: as released.", at_least(1, "learn at least 1 query.")
    )
    num_content_queries: int = documented(
        64, "Tokens of the content prompt, Q_content. Default: as released.", at_least(1, "learn at least 1 query.")
    )
    templates: list[str] = documented(
        ["a photo of a {}."],
        "Sentences with {} for the class name; their mean text feature is the zero-shot head, which initialises the "
        "classifier W. The first also describes pictures without a description. Default: CLIP's simplest.",
        check_templates,
    )
    supervision: str = documented(
        "both",
        "Sentences that supervise the prompts: 'category', 'content', 'both' or, for an ablation, 'none'. Default: as "
        "released.",
        one_of(*SUPERVISION),
    )
    label_smoothing: float = documented(
        0.1,
        "Label smoothing of the two sentence losses, 0 to below 1; not used in classification. Default: as released.",
        at_least(0, "choose 0 to below 1."),
        below(1, "choose 0 to below 1."),
    )
    wise_ft: float = documented(
        0.0,
        "Weight of the zero-shot head in the classifier outside training, 0 (only the trained head) to 1. "
        "The paper reports 0 and 0.5. Ignored in training.",
        between(0, 1),
    )
    changeable: ClassVar = ("wise_ft",)

    @property
    def takes_new_classes(self) -> bool:
        return False


@dataclass
class TGPTOutput(ImageClassifierOutput):
    """ImageClassifierOutput with TGP-T's parts.

    `head_logits` and, outside training, `zero_shot_logits` (b, c) are the logits of the trained and the zero-shot head
    alone, on the same features. WiSE-FT with any share a is (1 - a) * head_logits + a * zero_shot_logits; `logits` have
    a = `wise_ft`.
    """

    loss_classification: torch.Tensor | None = None
    loss_category: torch.Tensor | None = None
    loss_content: torch.Tensor | None = None
    head_logits: torch.Tensor | None = None
    zero_shot_logits: torch.Tensor | None = None

    def other_logits(self) -> dict[str, torch.Tensor]:
        """Other logits beside the answer: {"wise_ft": with equal shares of both heads}."""
        if self.head_logits is None or self.zero_shot_logits is None:
            return {}
        return {"wise_ft": (self.head_logits + self.zero_shot_logits) / 2}


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
    states_are = "image tokens"
    output_class = TGPTOutput
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

    def __init__(self, config: TGPTConfig, encoder: DualEncoder):
        super().__init__(config, encoder)
        self.uses_captions = "content" in SUPERVISION[config.supervision]
        shape, device = encoder.shape(), encoder.model.device
        text_width, context = shape["text_width"], shape["context_length"]
        room = context - encoder.prefix - 2  # "." and EOS
        for name in ("num_category_queries", "num_content_queries"):
            config.require(name, getattr(config, name) <= room, f"the context of {context} leaves room for {room}.")

        tokenizer = self.tokenizer(encoder)
        names, templates = config.class_names, config.templates
        start = templates[0] if config.initial_text is None else class_template(config.initial_text)

        def sentences(template: str) -> Sentences:
            return tokenize(tokenizer, [template.replace("{}", name) for name in names], encoder, names)

        category = (nn.Buffer(part, persistent=False) for part in sentences(start))
        self.category_ids, self.category_ends = category  # (c, t), (c,)
        self.default_caption_ids = nn.Buffer(sentences(templates[0])[0], persistent=False)  # (c, t)
        # What stands around a prompt: BOS | full stop, EOS and padding, each if the tokenizer has it, (1, about 3).
        (row,), (end,) = tokenize(tokenizer, [f"{PLACEHOLDER}."], encoder)
        self.end_token, stops = tokenizer.eos_token_id, len(full_stop(tokenizer))
        frame = torch.cat([row[: encoder.prefix], row[end - stops :]])
        self.frame_ids = nn.Buffer(frame[None], persistent=False)
        self.frame_end = encoder.prefix + stops  # where EOS is in it
        self._warned = False

        def queries(count: int) -> torch.Tensor:
            return torch.empty(1, count, text_width, device=device).normal_(std=0.02)

        category_queries = queries(config.num_category_queries)
        if config.initial_text is not None:
            first = word_ids(tokenizer, words_before(config.initial_text))[: config.num_category_queries]
            category_queries[0, : len(first)] = encoder.words()[first].detach()
        self.category_queries = nn.Parameter(category_queries)  # (1, 32, d_t)
        self.content_queries = nn.Parameter(queries(config.num_content_queries))  # (1, 64, d_t)
        self.category_bonder = Bonder(text_width)
        self.content_bonder = Bonder(text_width)
        # Departs from the release, which assumes that both widths are the same: if they differ, a trained map takes the
        # image tokens to the text width. It starts as the transpose of CLIP's own text projection.
        self.image_to_text: nn.Module = nn.Identity()
        if shape["projection_width"] != text_width:
            self.image_to_text = nn.Linear(shape["projection_width"], text_width, bias=False)
            projection = encoder.projections()[0].weight.detach().float()  # (d, d_t)
            self.image_to_text.weight = nn.Parameter(projection.T.clone(memory_format=torch.contiguous_format))

        self._zero_shot: Kept | None = None
        self.awaits_weights = config.inference_mode
        if self.awaits_weights:  # of W, too, so that the texts can wait until they are needed
            size = len(names), 2 * shape["projection_width"]
            self.head = nn.Parameter(torch.full(size, math.nan, device=device))
        else:
            self.head = nn.Parameter(self.encode_zero_shot_head(encoder).clone())  # W (c, 2d)

    @torch.compiler.disable  # caching reads version counters, which a compiled graph does not have
    def encode_zero_shot_head(self, encoder: DualEncoder) -> torch.Tensor:
        """The zero-shot classifier (c, 2d) in the towers' own precision, computed once and kept."""

        def compute() -> torch.Tensor:
            config, tokenizer = self.config, self.tokenizer(encoder)
            with torch.autocast(encoder.model.device.type, enabled=False):
                head = mean_features(encoder, config.class_names, config.templates, tokenizer, config.text_chunk_size)
                return unit(torch.cat([head, head], dim=-1))

        self._zero_shot = after = kept(self._zero_shot, encoder.text_parameters(), compute, self.unrecorded(encoder))
        return after[1]

    @property
    def zero_shot_head(self) -> torch.Tensor | None:
        """The zero-shot classifier (c, 2d) as it was last encoded; None before that."""
        return None if self._zero_shot is None else self._zero_shot[1]

    def class_features_shape(self, encoder: DualEncoder) -> tuple[int, int] | None:
        return len(self.head), self.head.shape[1]

    def fixed_class_features(self, encoder: DualEncoder) -> torch.Tensor:
        return self.encode_zero_shot_head(encoder)

    def take_class_features(self, encoder: DualEncoder, features: torch.Tensor) -> None:
        self._zero_shot = kept(None, encoder.text_parameters(), lambda: features, self.unrecorded(encoder))

    def standalone(self, encoder: DualEncoder, class_texts: ClassTexts | None = None) -> nn.Module:
        return _OneHead(self, encoder)

    @classmethod
    def fields_of_weights(cls, weights: dict[str, torch.Tensor], class_names: Sequence[str]) -> dict[str, Any]:
        if "head" in weights:
            check_rows(weights["head"], class_names)
        return {f"num_{prompt}_queries": prompts_in(weights, f"{prompt}_queries") for prompt in SUPERVISION["both"]}

    def forward(
        self,
        encoder: DualEncoder,
        pixel_values: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        class_texts: ClassTexts | None = None,
        caption_ids: torch.Tensor | None = None,
        image_states: torch.Tensor | None = None,
        tokens_per_image: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> TGPTOutput:
        """pixel_values (b, 3, h, w), labels (b,), caption_ids (b, t): one tokenised description per picture.

        `loss` is the classification loss plus, in training or with caption_ids, the sentence losses. Raises ValueError
        for a description without EOS.
        """
        if image_states is None:
            assert pixel_values is not None  # PromptedModel sees to it that there is one of the two
            image_states = self.image_states(encoder, pixel_values, **kwargs)  # (b, p, d_v)
        features, category, content = self.joint_features(encoder, image_states)
        logits = head_logits = scores(features, self.head)  # (b, c)
        zero_shot_logits = None
        if not self.training:  # linear in the weights, so mixing logits mixes the heads
            zero_shot_logits = scores(features, self.encode_zero_shot_head(encoder))  # (b, c)
            logits = torch.lerp(logits, zero_shot_logits, self.config.wise_ft)
        losses = {} if labels is None else {"classification": classification_loss(logits, labels)}
        if labels is not None and (self.training or caption_ids is not None):
            for name, targets in self.target_sentences(encoder, labels, caption_ids).items():
                prompts, of_all = category if name == "category" else content, (tokens_per_image or {}).get(name)
                smoothing, prefix = self.config.label_smoothing, encoder.prefix
                losses[name] = sentence_loss(prompts, *targets, encoder.words(), smoothing, of_all, prefix)
        return TGPTOutput(
            loss=sum(losses.values()) if losses else None,
            logits=logits,
            head_logits=head_logits,
            zero_shot_logits=zero_shot_logits,
            **{f"loss_{name}": loss for name, loss in losses.items()},
        )

    def joint_features(
        self, encoder: DualEncoder, image_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image states (b, p, d_v) -> unit features (b, 2d), and both prompts: P_category, P_content (b, n, d_t)."""
        tokens = self.bonder_tokens(encoder, image_states)  # (b, p, d_t)
        image_features = encoder.leave_image(image_states)  # v (b, d)
        category = self.category_bonder(self.category_queries, tokens)
        content = self.content_bonder(self.content_queries, tokens)
        text_features = (self.encode_prompts(encoder, category) + self.encode_prompts(encoder, content)) / 2  # t (b, d)
        return unit(torch.cat([image_features, text_features], dim=-1)), category, content

    def tokens_per_image(
        self, encoder: DualEncoder, labels: torch.Tensor, caption_ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        targets = self.target_sentences(encoder, labels, caption_ids).items()
        return {
            name: target_tokens(ends, getattr(self.config, f"num_{name}_queries"), encoder.prefix)
            for name, (_, ends) in targets
        }

    def target_sentences(
        self, encoder: DualEncoder, labels: torch.Tensor, captions: torch.Tensor | None
    ) -> dict[str, Sentences]:
        """The sentences that the pictures' prompts are trained to spell, by prompt."""
        targets = {"content": self.descriptions(encoder, captions, labels)} if self.uses_captions else {}
        targets["category"] = self.category_ids[labels], self.category_ends[labels]
        return {name: targets[name] for name in SUPERVISION[self.config.supervision]}

    def image_states(self, encoder: DualEncoder, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The image tower's last hidden states: the Bonder reads all tokens. (b, 3, h, w) -> (b, p, d_v)."""
        return image_tokens(encoder, pixel_values, **kwargs)

    def bonder_tokens(self, encoder: DualEncoder, image_states: torch.Tensor) -> torch.Tensor:
        """The Bonders' input: image states (b, p, d_v) -> X at the text width (b, p, d_t)."""
        return self.image_to_text(encoder.project_tokens(image_states).to(self.head.dtype))

    def encode_prompts(self, encoder: DualEncoder, prompts: torch.Tensor) -> torch.Tensor:
        """T of "[BOS] P . [EOS]", n + 3 tokens: prompts (b, n, d_t) -> (b, d), not normalised.

        For a tower that reads padding, the context is filled up with it.
        """
        count, length, _ = prompts.shape
        frame = encoder.words()[self.frame_ids[0]].to(prompts.dtype).expand(count, -1, -1)  # (b, 3, d_t)
        before, after = frame[:, : encoder.prefix], frame[:, encoder.prefix :]
        room = encoder.shape()["context_length"] - encoder.prefix - length
        embeddings = torch.cat([before, prompts, after[:, :room]], dim=1)  # (b, n + 3, d_t)
        return encode_text(encoder, embeddings, torch.full((count,), length + self.frame_end, device=prompts.device))

    @torch.compiler.disable  # it reads values of tensors
    def descriptions(self, encoder: DualEncoder, ids: torch.Tensor | None, labels: torch.Tensor) -> Sentences:
        """One sentence for each picture, ids (b, t) and ends (b,); `ids` None: the template with the class name."""
        if ids is None:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "TGP-T is trained without descriptions of the pictures: the content prompt is supervised "
                    f"by {self.config.templates[0]!r} with the class name instead.",
                    stacklevel=2,
                )
            ids = self.default_caption_ids[labels]
        ends = encoder.ends(ids, self.end_token)
        check_captions(ids, ends, self.frame_ids[0, self.frame_end], len(labels))
        return ids, ends

    def word_scores(
        self, encoder: DualEncoder, class_names: Sequence[str], pixel_values: torch.Tensor | None = None
    ) -> tuple[dict[str, torch.Tensor], bool]:
        """The scores that the sentence losses train, for one picture's prompts."""
        if pixel_values is None:
            raise ValueError("`image`=None: this method's attention depends on the picture; pass one.")
        tokens = self.bonder_tokens(encoder, self.image_states(encoder, pixel_values))
        prompts = {name: bonder(queries, tokens)[0] for name, queries, bonder in self.bonders()}  # (n, d_t)
        return {name: prompt @ encoder.words().float().T for name, prompt in prompts.items()}, True

    def query_attention(self, encoder: DualEncoder, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = self.bonder_tokens(encoder, self.image_states(encoder, pixel_values))
        return {name: bonder.attention(queries, tokens) for name, queries, bonder in self.bonders()}

    def bonders(self) -> list[tuple[str, torch.Tensor, Bonder]]:
        """Both prompts by name, with their queries (1, n, d_t) and Bonders."""
        return [
            ("category", self.category_queries, self.category_bonder),
            ("content", self.content_queries, self.content_bonder),
        ]


class _OneHead(nn.Module):
    """The learner with its two heads mixed into one, for export."""

    def __init__(self, learner: TGPT, encoder: DualEncoder):
        super().__init__()
        self.learner, self.model, self.encoder = learner, encoder.model, encoder
        zero_shot = learner.encode_zero_shot_head(encoder).to(learner.head.dtype)
        self.head = nn.Buffer(torch.lerp(learner.head.detach(), zero_shot, learner.config.wise_ft))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(b, 3, h, w) -> logits (b, c)."""
        states = self.learner.image_states(self.encoder, pixel_values)
        return scores(self.learner.joint_features(self.encoder, states)[0], self.head)


def scores(features: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Unit features (b, 2d) and a head (c, 2d) -> logits (b, c)."""
    return LOGIT_SCALE * features @ head.to(features.dtype).T


register("TGPT", TGPTConfig, TGPT)
