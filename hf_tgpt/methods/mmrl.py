"""MMRL: tokens from one shared space in the upper layers of both towers, and a second image feature made from them.

Source: Guo, Gu: MMRL: Multi-Modal Representation Learning for Vision-Language Models, CVPR 2025, arXiv 2503.08497,
section 3.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.config import PromptConfig
from ..adapters.learner import cross_entropy
from ..adapters.open_learner import Forward, OpenPromptLearner
from ..adapters.registry import register
from ..encoders import DualEncoder
from ..encoders.packing import Packing
from ..encoders.walk import encode_text, image_tokens, split_tokens, unit
from ..texts.class_texts import ClassTexts
from ..texts.zero_shot_head import template_tokens
from ..utils.fields import above, at_least, between, checked, documented
from ..utils.names import check_class_names, check_templates

_UPPER = 7 / 12  # the share of the layers that get tokens


def check_layers(layers: Any) -> None:
    """Raises ValueError unless these are numbers of layers, counted from 1, or None."""
    if layers is not None and (
        not isinstance(layers, list)
        or not layers
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in layers)
        or layers != sorted(set(layers))
    ):
        raise ValueError(f"`layers`={layers!r}: list numbers of layers from 1 upwards, each once and in order.")


@checked
class MMRLConfig(PromptConfig):
    """Configuration of MMRL.

    Example:
        >>> config = MMRLConfig(class_names=["cat", "dog"], regularization_weight=4.0)
    """

    num_tokens: int = documented(5, "K, tokens in each of the layers. Default: paper.", at_least(1))
    token_width: int = documented(512, "Width of the shared space. Default: paper.", at_least(1))
    layers: list[int] | None = documented(
        None,
        "The layers that get tokens, counted from 1, the same in both towers. Default: the upper part of each tower, "
        "in proportion to the paper's 6 to 12 of 12.",
        check_layers,
    )
    alpha: float = documented(
        0.7, "Share of the class token's logits; the inserted tokens' have the rest. Default: paper.", between(0, 1)
    )
    regularization_weight: float = documented(
        0.5,
        "Weight of the distances to CLIP's own features (lambda). Default: the paper's for ImageNet; it uses 0.01 to "
        "7, tuned on each data set.",
        at_least(0, "choose 0 (without these terms) or more."),
    )
    templates: list[str] = documented(
        ["a photo of a {}."],
        "The class sentences, with {} for the class name, averaged after encoding. The release uses each data set's.",
        check_templates,
    )
    tokenizer_name_or_path: str | None = documented(
        None, "Tokenizer of the class sentences; a Hub id or folder. Default: the base model's own."
    )
    logit_scale: float | None = documented(
        None, "Factor from cosines to logits; the release fixes 100. Default: the base model's own.", above(0)
    )
    text_chunk_size: int | None = documented(
        None, "Class sentences whose activations are kept at a time; see the other methods.", at_least(1)
    )
    trained_class_names: list[str] | None = documented(
        None, "Filled in when `set_class_names` gives it other classes: those that it was trained on."
    )


class MMRL(OpenPromptLearner):
    """The tokens R (K, r), a linear map for each layer with tokens in each tower, and P_r (d_v, d).

    Trained classes are scored with both image features, all others with the class token's only; the class names decide
    which is which. The model's own call, which has no class names, uses only the class token's.
    """

    config: MMRLConfig
    citation = """@inproceedings{guo2025mmrl,
  title = {{MMRL}: Multi-Modal Representation Learning for Vision-Language Models},
  author = {Guo, Yuncheng and Gu, Xiaodong},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2025}
}"""
    original_names: ClassVar = {
        "representation_learner.compound_rep_tokens": "tokens",
        "image_encoder.proj_rep": "token_projection",
        **{
            f"representation_learner.compound_rep_tokens_r2{letter}proj.{i}.{part}": f"to_{tower}.{i}.{part}"
            for letter, tower in (("t", "text"), ("v", "vision"))
            for i in range(100)
            for part in ("weight", "bias")
        },
    }

    def __init__(self, config: MMRLConfig, encoder: DualEncoder):
        shape, device = encoder.shape(), encoder.model.device
        depths = {tower: shape[f"{tower}_layers"] for tower in ("text", "vision")}
        lowest = min(depths.values())
        remedy = f"the towers have {depths['text']} and {depths['vision']} layers; choose of 1 to {lowest}."
        config.require("layers", config.layers is None or config.layers[-1] <= lowest, remedy)
        count = max(1, round(_UPPER * lowest))
        # Counted from 0, as `encode_text` and `image_tokens` do.
        self.layers = {
            tower: list(range(depth - count, depth)) if config.layers is None else [n - 1 for n in config.layers]
            for tower, depth in depths.items()
        }
        super().__init__(config, encoder)
        width = config.token_width
        self.tokens = nn.Parameter(torch.empty(config.num_tokens, width, device=device).normal_(std=0.02))
        self.to_text, self.to_vision = (
            nn.ModuleList(nn.Linear(width, shape[f"{tower}_width"], device=device) for _ in self.layers[tower])
            for tower in ("text", "vision")
        )
        size = shape["vision_width"], shape["projection_width"]
        self.token_projection = nn.Parameter(torch.empty(size, device=device).normal_(std=size[0] ** -0.5))

    @classmethod
    def fields_of_weights(cls, weights: dict[str, torch.Tensor], class_names: Sequence[str]) -> dict[str, Any]:
        count, width = weights["tokens"].shape if "tokens" in weights else (5, 512)
        return {"num_tokens": count, "token_width": width, "logit_scale": 100.0}  # the release's own scale

    def prompts(self, tower: str) -> dict[int, torch.Tensor]:
        """The tokens (K, d_t or d_v) before each layer of the "text" or "vision" tower that has some."""
        layers = self.to_text if tower == "text" else self.to_vision
        return {n: layer(self.tokens) for n, layer in zip(self.layers[tower], layers, strict=True)}

    # Texts ------------------------------------------------------------------------------------------------------------

    def texts_for(self, encoder: DualEncoder, class_names: Sequence[str]) -> ClassTexts:
        check_class_names(class_names)
        return self._sentences(encoder, class_names, self.config.templates[0])

    def _sentences(self, encoder: DualEncoder, class_names: Sequence[str], template: str) -> ClassTexts:
        with torch.inference_mode(False):
            tokens = template_tokens(encoder, class_names, template, self.tokenizer(encoder))
            return ClassTexts(class_names, *tokens, trained=self.trained_names)

    def encode_classes(self, encoder: DualEncoder, class_texts: ClassTexts, share: slice | None = None) -> torch.Tensor:
        features = [super().encode_classes(encoder, class_texts, share)]
        for template in self.config.templates[1:]:
            sentences = partial(self._sentences, encoder, class_texts.names, template)
            features.append(super().encode_classes(encoder, class_texts.once(("template", template), sentences), share))
        return unit(torch.stack(features).mean(0)) if len(features) > 1 else features[0]

    def text_weights(self) -> list[nn.Parameter]:
        return [self.tokens, *self.to_text.parameters()]

    def text_features(
        self, encoder: DualEncoder, input_ids: torch.Tensor, ends: torch.Tensor, packing: Packing | None = None
    ) -> torch.Tensor:
        packing = packing or self.pack(encoder, input_ids, ends)
        embeddings = F.embedding(input_ids, encoder.words())  # (s, t, d_t)
        return encode_text(encoder, embeddings, ends, self.prompts("text"), packing, insert=True)  # (s, d)

    # Images -----------------------------------------------------------------------------------------------------------

    def unit_image_features(
        self, encoder: DualEncoder, pixel_values: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """f_c of the class token and f_r of the inserted tokens, each (b, d)."""
        prompts = self.prompts("vision")
        tokens = image_tokens(encoder, pixel_values, prompts, behind_class_token=True, behind_norm=True, **kwargs)
        own, inserted = split_tokens(tokens, prompts, True, encoder.class_tokens)
        pooled = encoder.normalize_tokens(inserted).mean(dim=1)  # (b, d_v)
        return unit(encoder.leave_image(own)), unit(pooled @ self.token_projection.to(pooled.dtype))

    def image_features(self, encoder: DualEncoder, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Only the class token's feature, at unit length: (b, 3, h, w) -> (b, d)."""
        return self.unit_image_features(encoder, pixel_values, **kwargs)[0]

    # Answers ----------------------------------------------------------------------------------------------------------

    def scaled(self, encoder: DualEncoder, cosines: torch.Tensor) -> torch.Tensor:
        """Logits from cosines (b, c): by the config's factor, or as the base model computes them."""
        own = self.config.logit_scale
        return encoder.scale(cosines) if own is None else own * cosines

    def classify(self, encoder: DualEncoder, computed: Forward) -> torch.Tensor:
        alpha = self.config.alpha
        return torch.lerp(self.by_tokens(encoder, computed), self.classify_new(encoder, computed), alpha)

    def classify_new(self, encoder: DualEncoder, computed: Forward) -> torch.Tensor:
        return self.scaled(encoder, computed.image_features @ computed.class_features.T)

    def by_tokens(self, encoder: DualEncoder, computed: Forward) -> torch.Tensor:
        """Logits (b, c) from the inserted tokens' feature."""
        assert computed.second_image_features is not None  # `unit_image_features` gives it
        return self.scaled(encoder, computed.second_image_features @ computed.class_features.T)

    def own_loss(self, encoder: DualEncoder, computed: Forward, labels: torch.Tensor) -> torch.Tensor:
        answers = self.by_tokens(encoder, computed), self.classify_new(encoder, computed)
        by_tokens, by_class_token = (cross_entropy(logits, labels) for logits in answers)
        return torch.lerp(by_tokens, by_class_token, self.config.alpha)

    def extra_losses(self, encoder: DualEncoder, computed: Forward) -> dict[str, torch.Tensor]:
        """The distances of both towers' features to CLIP's own: section 3.4."""
        weight = self.config.regularization_weight
        assert computed.pixel_values is not None  # its image tower has prompts, so nothing stands in their place
        images = self.frozen_image_features(encoder, computed.pixel_values)  # (b, d)
        texts = self.frozen_class_features(encoder, self.config.templates, computed.class_texts)  # (c, d)
        return {
            "loss_image": weight * (1 - (computed.image_features * images).sum(-1).mean()),
            "loss_text": weight * (1 - (computed.class_features * texts).sum(-1).mean()),
        }


register("MMRL", MMRLConfig, MMRL)
