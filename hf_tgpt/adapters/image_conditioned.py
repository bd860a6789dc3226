"""What methods with image-conditioned text prompts share: a class text for every pair of image and class.

Letters as in `learner.py`. b images and s sentences make b * s text sequences; they are encoded in chunks of
`text_chunk_size`, so memory does not grow with the number of classes beyond the features themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import ModelOutput

from ..encoders import DualEncoder
from ..encoders.chunks import in_chunks
from ..encoders.packing import Packing, pack
from ..encoders.walk import encode_image, encode_text, text_chunks, unit
from ..texts.class_texts import ClassTexts
from ..texts.sentences import Sentences
from .open_learner import Forward, OpenPromptLearner


class ImageConditionedLearner(OpenPromptLearner):
    """A learner whose text prompts depend on the image. A method defines `prompts`, and may define `adapt_image`."""

    @property
    def texts_per_image(self) -> bool:
        return True

    def prompts(self, image_features: torch.Tensor) -> torch.Tensor:
        """x0 (b, d), the plain image tower's unit features -> text prompts (b, n, d_t)."""
        raise NotImplementedError

    def adapt_image(
        self,
        encoder: DualEncoder,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        sentences: Sentences,
        **kwargs: Any,
    ) -> torch.Tensor:
        """f(x): x0 (b, d) and the image's class texts (b, s, d) -> the image features to compare, (b, d), unit.

        `sentences` are the class texts' ids (s, t) and ends (s,).
        """
        return image_features

    def match(
        self,
        encoder: DualEncoder,
        pixel_values: torch.Tensor | None,
        sentences: Sentences,
        image_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (b, 3, h, w), sentences (s, t) -> unit features of images (b, d) and texts (b, s, d)."""
        if image_states is None:
            assert pixel_values is not None  # PromptedModel sees to it that there is one of the two
            with torch.no_grad():
                image_states = encode_image(encoder, pixel_values, **kwargs)
        plain = unit(image_states)  # x0 (b, d)
        text_features = self.describe(encoder, plain, sentences)  # w (b, s, d)
        adapted = self.adapt_image(encoder, pixel_values, plain, text_features, sentences, **kwargs)  # f (b, d)
        return adapted, text_features

    def describe(self, encoder: DualEncoder, image_features: torch.Tensor, sentences: Sentences) -> torch.Tensor:
        """x0 (b, d), sentences (s, t) -> unit text features of every pair, (b, s, d)."""
        count, classes = len(image_features), len(sentences[0])
        device = sentences[0].device
        of_image = torch.arange(count, device=device).repeat_interleave(classes)
        of_class = torch.arange(classes, device=device).repeat(count)
        prompts = self.prompts(self.as_weights(image_features))  # (b, n, d_t)
        pairs = self.encode_pairs(encoder, prompts, sentences, of_image, of_class)
        return pairs.unflatten(0, (count, classes))

    def as_weights(self, features: torch.Tensor) -> torch.Tensor:
        """Features in the dtype of this learner's weights, which a user may have cast."""
        return features.to(next(self.parameters()).dtype)

    def encode_pairs(
        self,
        encoder: DualEncoder,
        prompts: torch.Tensor,
        sentences: Sentences,
        of_image: torch.Tensor,
        of_class: torch.Tensor,
    ) -> torch.Tensor:
        """prompts (b, n, d_t), sentences (s, t), pairs as indices (m,) and (m,) -> unit features (m, d)."""
        input_ids, ends = sentences
        shared = self.shared_length(encoder, input_ids, ends) if encoder.causal else 0
        context = encoder.shape()["context_length"]
        pair_ends = ends[of_class]  # (m,)
        on_cpu = pair_ends.cpu(), of_image.cpu()  # once, where `pack` needs them

        def encode(part: slice) -> torch.Tensor:
            embeddings = nn.functional.embedding(input_ids[of_class[part]], encoder.words())  # (m, t, d_t)
            # A row holds sentences of one image, since its prompts are among what they share.
            packing = pack(on_cpu[0][part], shared, context, on_cpu[1][part]).to(ends.device) if shared else None
            return encode_text(encoder, embeddings, pair_ends[part], {0: prompts[of_image[part]]}, packing)

        parts = text_chunks(encoder, on_cpu[0], input_ids.shape[1], shared, self.config.text_chunk_size)
        return unit(in_chunks(encode, parts, [prompts, *encoder.text_parameters()]))

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
        features = self.match(encoder, pixel_values, (texts.ids, texts.ends), image_states, **kwargs)
        return self.answer(encoder, Forward(texts, pixel_values, *features, labels))

    def classify(self, encoder: DualEncoder, computed: Forward) -> torch.Tensor:
        return encoder.scale(torch.einsum("bd,bcd->bc", computed.image_features, computed.class_features))

    def compare(
        self,
        encoder: DualEncoder,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        return_loss: bool = False,
        **kwargs: Any,
    ) -> ModelOutput:
        """The model's own call; `text_embeds` (b, s, d) has a row for each image, which its prompts depend on."""
        features = self.match(encoder, pixel_values, self.read_texts(encoder, input_ids), **kwargs)
        logits = encoder.scale(torch.einsum("bd,bsd->bs", *features))
        return encoder.output(logits, *features, return_loss)

    def text_features(
        self, encoder: DualEncoder, input_ids: torch.Tensor, ends: torch.Tensor, packing: Packing | None = None
    ) -> torch.Tensor:
        raise ValueError(
            f"{self.config.method} has no text features without an image, on which its prompts depend; call "
            "model(input_ids=..., pixel_values=...)."
        )

    def standalone(self, encoder: DualEncoder, class_texts: ClassTexts | None = None) -> nn.Module:
        texts = self.class_texts if class_texts is None else class_texts
        return _Unpacked(self, encoder, texts)


class _Unpacked(nn.Module):
    """Class texts for every image: like a learner's own forward, but without packing, which Python code computes."""

    def __init__(self, learner: ImageConditionedLearner, encoder: DualEncoder, class_texts: ClassTexts):
        super().__init__()
        self.model, self.encoder, self.learner, self.texts = encoder.model, encoder, learner, class_texts
        self.ids = nn.Buffer(class_texts.ids)  # (c, t)
        self.embeddings = nn.Buffer(encoder.words()[class_texts.ids])  # (c, t, d_t)
        self.ends = nn.Buffer(class_texts.ends)  # (c,)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(b, 3, h, w) -> logits (b, c)."""
        encoder, learner, count, classes = self.encoder, self.learner, pixel_values.shape[0], self.embeddings.shape[0]
        plain = unit(encode_image(encoder, pixel_values))  # (b, d)
        prompts = learner.prompts(plain)[:, None].expand(-1, classes, -1, -1)  # (b, c, n, d_t)
        embeddings = self.embeddings[None].expand(count, -1, -1, -1).flatten(0, 1)  # (b * c, t, d_t)
        texts = encode_text(encoder, embeddings, self.ends.repeat(count), {0: prompts.flatten(0, 1)})
        text_features = unit(texts).unflatten(0, (count, classes))  # (b, c, d)
        adapted = learner.adapt_image(encoder, pixel_values, plain, text_features, (self.ids, self.ends))
        return learner.logits(encoder, Forward(self.texts, pixel_values, adapted, text_features, None))
