"""What methods with image-conditioned text prompts share: a class text for every pair of image and class.

Letters as in `towers.py`, and n prompt tokens. b images and s sentences make b * s text sequences; they are encoded in
chunks of `text_chunk_size`, so memory does not grow with the number of classes beyond the features themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CLIPModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPOutput

from .chunks import chunks, in_chunks
from .learner import OpenPromptLearner, classification_loss, clip_output
from .packing import Packing, pack
from .towers import (
    after_bos,
    chunk_tokens,
    dimensions,
    encode_image,
    encode_text,
    logit_scale,
    text_parameters,
    token_embeddings,
    unit,
)


class ImageConditionedLearner(OpenPromptLearner):
    """A learner whose text prompts depend on the image. A method gives `prompts`, and may give `see`."""

    def prompts(self, image_features: torch.Tensor) -> torch.Tensor:
        """x0 (b, d), unit features of the plain image tower -> text prompts (b, n, d_t)."""
        raise NotImplementedError

    def see(
        self,
        clip: CLIPModel,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        texts: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Any,
    ) -> torch.Tensor:
        """f(x): x0 (b, d) and the image's class texts (b, s, d) -> the image features to compare, (b, d), unit.

        `texts` are the sentences themselves, ids (s, t) and EOS positions (s,).
        """
        return image_features

    def match(
        self,
        clip: CLIPModel,
        pixel_values: torch.Tensor | None,
        input_ids: torch.Tensor,
        eos: torch.Tensor,
        image_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures (b, 3, h, w), sentences (s, t) -> logits (b, s), image features (b, d), text features (b, s, d)."""
        if image_states is None:
            assert pixel_values is not None  # PromptedCLIPModel sees to it that there is one of the two
            with torch.no_grad():
                image_states = encode_image(clip, pixel_values, **kwargs)
        image_features = unit(image_states)  # x0 (b, d)
        text_features = self.describe(clip, image_features, input_ids, eos)  # w (b, s, d)
        seen = self.see(clip, pixel_values, image_features, text_features, (input_ids, eos), **kwargs)  # f (b, d)
        logits = logit_scale(clip) * torch.einsum("bd,bsd->bs", seen, text_features)
        return logits, seen, text_features

    def describe(
        self, clip: CLIPModel, image_features: torch.Tensor, input_ids: torch.Tensor, eos: torch.Tensor
    ) -> torch.Tensor:
        """x0 (b, d), sentences (s, t) -> unit text features of every pair, (b, s, d)."""
        count, sentences = len(image_features), len(input_ids)
        device = input_ids.device
        images = torch.arange(count, device=device).repeat_interleave(sentences)
        classes = torch.arange(sentences, device=device).repeat(count)
        prompts = self.prompts(self.as_weights(image_features))  # (b, n, d_t)
        pairs = self.encode_pairs(clip, prompts, input_ids, eos, images, classes)
        return pairs.unflatten(0, (count, sentences))

    def as_weights(self, features: torch.Tensor) -> torch.Tensor:
        """Features in the dtype of this learner's weights, which a user may have cast."""
        return features.to(next(self.parameters()).dtype)

    def encode_pairs(
        self,
        clip: CLIPModel,
        prompts: torch.Tensor,
        input_ids: torch.Tensor,
        eos: torch.Tensor,
        images: torch.Tensor,
        classes: torch.Tensor,
    ) -> torch.Tensor:
        """prompts (b, n, d_t), sentences (s, t), pairs as indices (m,) and (m,) -> unit features (m, d)."""

        shared, context = self.shared_length(input_ids, eos), dimensions(clip)["context_length"]
        ends = eos[classes]  # (m,)
        on_cpu = ends.cpu(), images.cpu()  # once, where `pack` needs them

        def encode(part: slice) -> torch.Tensor:
            words = nn.functional.embedding(input_ids[classes[part]], token_embeddings(clip))  # (m, t, d_t)
            # A row holds sentences of one image, since its prompts are among what they share.
            packing = pack(on_cpu[0][part], shared, context, on_cpu[1][part]).to(ends.device) if shared else None
            return encode_text(clip, after_bos(words, prompts[images[part]]), ends[part], packing=packing)

        parts = chunks(on_cpu[0], shared, self.config.text_chunk_size, chunk_tokens(clip))
        return unit(in_chunks(encode, parts, [prompts, *text_parameters(clip)]))

    def forward(
        self,
        clip: CLIPModel,
        pixel_values: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        image_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """pixel_values (b, 3, h, w), labels (b,) -> ImageClassifierOutput with logits (b, c)."""
        logits, _, _ = self.match(clip, pixel_values, self.class_ids, self.class_eos, image_states, **kwargs)
        return ImageClassifierOutput(loss=classification_loss(logits, labels), logits=logits)

    def compare(
        self,
        clip: CLIPModel,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        return_loss: bool = False,
        **kwargs: Any,
    ) -> CLIPOutput:
        """CLIP's own call; `text_embeds` (b, s, d) has one row for each image, which its text prompts depend on."""
        logits, image_embeds, text_embeds = self.match(clip, pixel_values, *self.read_texts(clip, input_ids), **kwargs)
        return clip_output(logits, image_embeds, text_embeds, return_loss)

    def text_features(
        self, clip: CLIPModel, input_ids: torch.Tensor, eos: torch.Tensor, packing: Packing | None = None
    ) -> torch.Tensor:
        raise ValueError(
            f"{self.config.method} has no text features apart from an image, on which its prompts depend; call "
            "model(input_ids=..., pixel_values=...)."
        )

    def image_features(self, clip: CLIPModel, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return encode_image(clip, pixel_values, **kwargs)
