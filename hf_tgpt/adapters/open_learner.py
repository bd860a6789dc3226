"""A learner that classifies by class sentences, so that its class list is open."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import ModelOutput

from ..encoders import DualEncoder
from ..encoders.chunks import in_chunks
from ..encoders.packing import Packing, common_length, pack
from ..encoders.shares import in_shares
from ..encoders.walk import encode_image, trim, unit
from ..texts.class_texts import ClassTexts
from ..texts.sentences import PIPELINE_SENTENCE, PLACEHOLDER, class_sentences, class_template, word_ids, words_before
from ..texts.zero_shot_head import zero_shot_head
from .config import PromptConfig
from .learner import PromptLearner, cross_entropy


@dataclass
class Forward:
    """What a forward pass has computed.

    Shapes: unit features `image_features` (b, d) and `class_features` (c, d), or (b, c, d) if the texts depend on
    the image; `second_image_features` (b, d) of a method with two features per picture; `logits` (b, c);
    `pixel_values` (b, 3, h, w), None if image states were given instead.
    """

    class_texts: ClassTexts
    pixel_values: torch.Tensor | None
    image_features: torch.Tensor
    class_features: torch.Tensor
    labels: torch.Tensor | None
    second_image_features: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class OpenPromptLearner(PromptLearner):
    """A method defines `text_features` and, if it has visual prompts, `image_features`."""

    def __init__(self, config: PromptConfig, encoder: DualEncoder):
        super().__init__(config, encoder)
        self.class_texts = self.texts_for(encoder, config.class_names)
        self.end_token = self.tokenizer(encoder).eos_token_id

    @property
    def prompt_length(self) -> int:
        """Learned tokens of a class sentence; 0 for a method that learns none."""
        return getattr(self.config, "prompt_length", 0)

    # Classes ----------------------------------------------------------------------------------------------------------

    @property
    def trained_names(self) -> list[str]:
        """The classes that it was trained on; `set_class_names` may have given it others."""
        return getattr(self.config, "trained_class_names", None) or self.config.class_names

    def texts_for(self, encoder: DualEncoder, class_names: Sequence[str]) -> ClassTexts:
        initial_text = getattr(self.config, "initial_text", "a photo of a")
        with torch.inference_mode(False):
            sentences = class_sentences(self.tokenizer(encoder), class_names, initial_text, self.prompt_length, encoder)
            return ClassTexts(class_names, *sentences, trained=self.trained_names)

    def set_class_names(self, encoder: DualEncoder, class_names: Sequence[str]) -> None:
        remembers = hasattr(self.config, "trained_class_names")
        if type(self).classify_new is not OpenPromptLearner.classify_new and not remembers:
            raise ValueError(
                f"{self.config.method} classifies the classes that it was trained on in a special way, so they cannot "
                "be replaced; pass other classes in a call, as `hf_tgpt.load_classifier` does."
            )
        texts = self.texts_for(encoder, class_names)
        self.config = copy.copy(self.config)  # which may serve another adapter too
        if remembers:
            self.config.trained_class_names = self.trained_names
        self.config.class_names = list(class_names)
        self.class_texts = ClassTexts(class_names, texts.ids, texts.ends, trained=self.trained_names)

    @torch.compiler.disable  # caching reads version counters, which a compiled graph does not have
    def class_features(self, encoder: DualEncoder, class_texts: ClassTexts | None = None) -> torch.Tensor:
        """The classes' unit features (c, d), computed once and kept until something they depend on changes.

        They are kept in evaluation, and in training if only vision prompts are trained.

        Every change that torch records is detected: training, loading, casts, moves, another adapter. A write through
        `.data` is not recorded; call train() or eval() after one.
        """
        texts = self.class_texts if class_texts is None else class_texts
        rests_on = [*self.text_weights(), *encoder.text_parameters()]
        trained = any(weight.requires_grad for weight in rests_on)
        if self.training and (trained or encoder.text_is_random()):
            return in_shares(lambda share: self.encode_classes(encoder, texts, share), len(texts))
        if trained and torch.is_grad_enabled():
            return self.encode_classes(encoder, texts)
        return texts.features("own", rests_on, lambda: self.encode_classes(encoder, texts), self.unrecorded(encoder))

    def class_features_shape(self, encoder: DualEncoder) -> tuple[int, int] | None:
        return None if self.texts_per_image else (len(self.class_texts), encoder.shape()["projection_width"])

    def fixed_class_features(self, encoder: DualEncoder) -> torch.Tensor:
        return self.class_features(encoder)

    def take_class_features(self, encoder: DualEncoder, features: torch.Tensor) -> None:
        rests_on = [*self.text_weights(), *encoder.text_parameters()]
        self.class_texts.features("own", rests_on, lambda: features, self.unrecorded(encoder))

    def frozen_class_features(
        self,
        encoder: DualEncoder,
        templates: list[str],
        class_texts: ClassTexts | None = None,
        normalize_each: bool = True,
    ) -> torch.Tensor:
        """The base model's own unit features of the classes (c, d), without prompts or gradient, computed once.

        They are averaged over `templates` after encoding, each at unit length first if `normalize_each`.
        """
        texts = self.class_texts if class_texts is None else class_texts
        return texts.features(
            ("frozen", tuple(templates), normalize_each),
            list(encoder.text_parameters()),
            lambda: zero_shot_head(encoder, texts.names, templates, self.tokenizer(encoder), normalize_each),
            self.unrecorded(encoder),
        )

    def encode_classes(self, encoder: DualEncoder, class_texts: ClassTexts, share: slice | None = None) -> torch.Tensor:
        """The unit features of a share of the classes, in chunks."""
        share = slice(0, len(class_texts)) if share is None else share
        weights = [*self.text_weights(), *encoder.text_parameters()]
        plan = class_texts.plan(
            encoder,
            share,
            getattr(self.config, "text_chunk_size", None),
            lambda ids, ends: self.shared_length(encoder, ids, ends) if encoder.causal else 0,
            lambda ids, ends: self.pack(encoder, ids, ends),
        )
        return unit(in_chunks(lambda part: self.encode_part(encoder, class_texts, *part), plan, weights))

    def text_weights(self) -> Iterable[nn.Parameter]:
        """The weights that class features depend on. Overridden if some only affect images."""
        return self.parameters()

    def encode_part(
        self, encoder: DualEncoder, class_texts: ClassTexts, part: slice, packing: Packing | None
    ) -> torch.Tensor:
        """T of a slice of the classes, (part, d), not normalised. Overridden if prompts differ by class."""
        return self.text_features(encoder, class_texts.ids[part], class_texts.ends[part], packing)

    def pack(self, encoder: DualEncoder, input_ids: torch.Tensor, ends: torch.Tensor) -> Packing | None:
        """Sentences, ids (s, t), ends (s,) -> how they share rows; None if they have no common beginning."""
        shared = self.shared_length(encoder, input_ids, ends) if encoder.causal else 0
        return pack(ends, shared, encoder.shape()["context_length"]) if shared else None

    def shared_length(self, encoder: DualEncoder, input_ids: torch.Tensor, ends: torch.Tensor) -> int:
        """How many leading tokens all sentences share with prompts in place.

        Overridden where prompts are not after BOS. It must be 0 where prompts of any layer differ by sentence, or else
        `encode_text` shares nothing and chunks are planned as if it did: too large.
        """
        unlearned = input_ids.clone()
        unlearned[:, encoder.prefix : encoder.prefix + self.prompt_length] = 0
        return common_length(unlearned, ends)

    # Forward ----------------------------------------------------------------------------------------------------------

    def forward(
        self,
        encoder: DualEncoder,
        pixel_values: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        class_texts: ClassTexts | None = None,
        image_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        texts = self.class_texts if class_texts is None else class_texts
        if image_states is None:
            assert pixel_values is not None  # PromptedModel sees to it that there is one of the two
            features, second = self.unit_image_features(encoder, pixel_values, **kwargs)
        else:
            features, second = unit(image_states), None
        class_features = self.class_features(encoder, texts)  # (c, d)
        return self.answer(encoder, Forward(texts, pixel_values, features, class_features, labels, second))

    def answer(self, encoder: DualEncoder, computed: Forward) -> ImageClassifierOutput:
        """Logits (b, c) and, with labels, the loss: cross entropy and the method's own terms."""
        computed.logits = self.logits(encoder, computed)
        if computed.labels is None:
            return self.output_class(logits=computed.logits)
        own = self.own_loss(encoder, computed, computed.labels)
        terms = {"loss_classification": own, **self.extra_losses(encoder, computed)}
        told = {name: term for name, term in terms.items() if hasattr(self.output_class, name)}
        return self.output_class(loss=sum(terms.values()), logits=computed.logits, **told)

    def own_loss(self, encoder: DualEncoder, computed: Forward, labels: torch.Tensor) -> torch.Tensor:
        """The classification loss."""
        assert computed.logits is not None  # `answer` has computed them
        return cross_entropy(computed.logits, labels)

    def classify(self, encoder: DualEncoder, computed: Forward) -> torch.Tensor:
        """Logits (b, c) of the classes that the adapter was trained on."""
        return encoder.scale(computed.image_features @ computed.class_features.T)

    def classify_new(self, encoder: DualEncoder, computed: Forward) -> torch.Tensor:
        """Logits (b, c) of all other classes; by default computed in the same way."""
        return self.classify(encoder, computed)

    def logits(self, encoder: DualEncoder, computed: Forward) -> torch.Tensor:
        """Logits (b, c): from `classify` for each class that was trained, else from `classify_new`."""
        if computed.class_texts.all_trained or type(self).classify_new is OpenPromptLearner.classify_new:
            return self.classify(encoder, computed)
        trained = computed.class_texts.trained_labels >= 0  # (c,)
        return torch.where(trained, self.classify(encoder, computed), self.classify_new(encoder, computed))

    def extra_losses(self, encoder: DualEncoder, computed: Forward) -> dict[str, torch.Tensor]:
        """A method's own terms of the loss, by name, from what the forward pass has computed already."""
        return {}

    def image_features(self, encoder: DualEncoder, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The image tower: (b, 3, h, w) -> (b, d), not normalised. Overridden by methods with visual prompts."""
        return encode_image(encoder, pixel_values, **kwargs)

    def unit_image_features(
        self, encoder: DualEncoder, pixel_values: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Unit image features (b, d), and a second one of each picture for a method with two."""
        return unit(self.image_features(encoder, pixel_values, **kwargs)), None

    def trained_sentence(self) -> str | None:
        """The class sentence of the training, with {} for the name; None for a method that is not trained."""
        if self.prompt_length:
            text = getattr(self.config, "initial_text", None)
            return class_template(" ".join([PLACEHOLDER] * self.prompt_length) if text is None else text)
        templates = getattr(self.config, "templates", None)
        return templates[0] if templates and list(self.parameters()) else None

    def _remark_on_sentences(self, encoder: DualEncoder, input_ids: torch.Tensor) -> None:
        """Warns if texts (s, t) are the sentence of transformers' pipeline but another one was trained."""
        trained = self.trained_sentence()
        if trained is None or words_before(trained) == words_before(PIPELINE_SENTENCE):
            return
        words = input_ids.new_tensor(word_ids(self.tokenizer(encoder), words_before(PIPELINE_SENTENCE)))
        begins = input_ids[:, encoder.prefix : encoder.prefix + len(words)]
        if begins.shape[1] == len(words) and bool((begins == words).all()):
            warnings.warn(
                f"The texts are {PIPELINE_SENTENCE!r}, the sentence of transformers' pipeline, but the adapter was "
                f"trained with {trained!r} and answers better with that: pass hypothesis_template={trained!r}.",
                stacklevel=2,
            )

    def read_texts(self, encoder: DualEncoder, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._remark_on_sentences(encoder, input_ids)
        ids, ends = trim(encoder, input_ids, self.end_token)
        n, shortest = self.prompt_length, int(ends.min()) - encoder.prefix
        if n and shortest < n:
            words = getattr(self.config, "initial_text", None) or " ".join([PLACEHOLDER] * n)
            like = class_template(words).replace("{}", "cat")
            raise ValueError(
                f"`input_ids` holds a text of {shortest} tokens beside BOS and EOS, but the first {n} are learned; "
                f"pass class sentences like {like!r}."
            )
        return ids, ends

    def compare(
        self,
        encoder: DualEncoder,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        return_loss: bool = False,
        **kwargs: Any,
    ) -> ModelOutput:
        """The model's own call with the prompts in place: input_ids (s, t), pixel_values (b, 3, h, w).

        The texts must be class sentences; the prompts go after BOS, usually in place of the first tokens.
        """
        text_features = self.text_features(encoder, *self.read_texts(encoder, input_ids))  # (s, d)
        image_features = self.image_features(encoder, pixel_values, **kwargs)  # (b, d)
        text_embeds, image_embeds = unit(text_features), unit(image_features)
        logits = encoder.scale(image_embeds @ text_embeds.T)  # (b, s)
        return encoder.output(
            logits,
            image_embeds,
            text_embeds,
            return_loss,
            text_model_output=BaseModelOutputWithPooling(pooler_output=text_features),
            vision_model_output=BaseModelOutputWithPooling(pooler_output=image_features),
        )

    def linear_head(
        self, encoder: DualEncoder, class_texts: ClassTexts | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        ways = (type(self).classify, type(self).classify_new)
        if ways != (OpenPromptLearner.classify, OpenPromptLearner.classify_new):
            return None
        with torch.no_grad():
            features = self.class_features(encoder, class_texts)  # (c, d)
            bias = encoder.scale(features.new_zeros(len(features)))  # what an encoder adds to every cosine
            return encoder.scale(features).sub(bias[:, None]).detach(), bias.detach()

    def standalone(self, encoder: DualEncoder, class_texts: ClassTexts | None = None) -> nn.Module:
        if self.linear_head(encoder, class_texts) is not None:
            return super().standalone(encoder, class_texts)
        return _FrozenTexts(self, encoder, self.class_texts if class_texts is None else class_texts)


class _FrozenTexts(nn.Module):
    """A learner that classifies in its own way, with fixed features of its classes."""

    def __init__(self, learner: OpenPromptLearner, encoder: DualEncoder, class_texts: ClassTexts):
        super().__init__()
        self.model, self.encoder, self.learner, self.texts = encoder.model, encoder, learner, class_texts
        with torch.no_grad():
            self.features = nn.Buffer(learner.class_features(encoder, class_texts))  # (c, d)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(b, 3, h, w) -> logits (b, c)."""
        features, second = self.learner.unit_image_features(self.encoder, pixel_values)  # (b, d)
        computed = Forward(self.texts, pixel_values, features, self.features, None, second)
        return self.learner.logits(self.encoder, computed)


def prompts_in(weights: dict[str, torch.Tensor], name: str) -> int:
    """The number of tokens in a release's prompts (..., n, d); 0 if there are none of that name."""
    return weights[name].shape[-2] if name in weights else 0
