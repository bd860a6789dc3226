"""Mutual prompt learning: fine-grained text prompts from the image (FTP), visual prompts from the class texts (TVP).

Source: Long, Zhao, Yuan, Tan, Liu, Feng, Wang, Wang: Mutual Prompt Leaning for Vision Language Models, IJCV 2024, doi
10.1007/s11263-024-02243-z, and its forerunner at ICCV 2023, arXiv 2303.17169.

A RECONSTRUCTION. No code was ever released, and only the two abstracts were available to us. They say: CoCoOp puts the
same image feature into every text token, while FTP "decomposes the single global image feature into several
finer-grained semantics and incorporates them into corresponding text prompt tokens"; texts contain "redundant and
negative category semantics", so TVP "reorganizes the text descriptions of the current image to construct the visual
prompt, guiding the image branch to attend to class-related representations"; a contrastive loss aligns both. All else
below is our choice, and each choice is a field of the config.
"""

from typing import Any, ClassVar

import torch
from torch import nn

from ..adapters.config import TextPromptConfig
from ..adapters.image_conditioned import ImageConditionedLearner
from ..adapters.registry import register
from ..encoders import DualEncoder
from ..encoders.walk import encode_image, encode_words, unit
from ..texts.class_texts import ClassTexts
from ..texts.sentences import Sentences, initial_prompts
from ..utils.fields import above, at_least, checked, documented, one_of

HEADS = ("per_token", "shared", "none")


@checked
class MutualPromptConfig(TextPromptConfig):
    """Configuration of mutual prompt learning; quoted words are from the abstracts.

    Example:
        >>> config = MutualPromptConfig(class_names=["cat", "dog"], vision_prompt_length=4, top_k=10)
    """

    prompt_length: int = documented(
        4, "n, learned text tokens, the 'text prompt tokens'. Default: CoCoOp's.", at_least(1)
    )
    text_heads: str = documented(
        "per_token",
        "How the image enters the text tokens: 'per_token' is FTP, a head U_m of its own for each token's "
        "'finer-grained semantics'; 'shared' is one head for all, as in CoCoOp; 'none' leaves the image out.",
        one_of(*HEADS),
    )
    reduction: int = documented(
        16,
        "Ratio of d to the width of the bottlenecks where FTP 'decomposes' the image and TVP makes prompts. Default: "
        "CoCoOp's.",
        at_least(1),
    )
    vision_prompt_length: int = documented(
        4, "n_v, tokens of the 'visual prompt' (TVP) in each layer with one; 0 switches TVP off.", at_least(0)
    )
    vision_prompt_depth: int = documented(
        1, "J, number of first layers of the vision tower with visual prompts. Ignored without TVP.", at_least(1)
    )
    top_k: int = documented(
        10,
        "K, number of most relevant classes that 'reorganizes' uses; the rest is 'redundant'. Ignored without TVP.",
        at_least(1),
    )
    temperature: float = documented(
        0.01,
        "tau of the softmax over the relevances of the K classes. Default: CLIP's own scale. Ignored without TVP.",
        above(0),
    )
    relevance_weighting: bool = documented(
        True, "Weight classes by relevance. Off: equally, even 'redundant and negative' ones. Ignored without TVP."
    )
    conditioned_texts: bool = documented(
        True,
        "The 'text descriptions of the current image': the image-conditioned class texts, or, if off, CLIP's own. "
        "Ignored without TVP.",
    )
    shortlist: int | None = documented(
        None,
        "K', an APPROXIMATION: only the K' classes nearest to the image get image-conditioned texts, the others keep "
        "their unconditioned one. None: all classes, exact.",
        at_least(1, "choose 1 or more, or None."),
    )
    changeable: ClassVar = ("top_k", "temperature", "relevance_weighting", "conditioned_texts", "shortlist")


class MutualPrompt(ImageConditionedLearner):
    """FTP: v (n, d_t), W_1 and the heads U. TVP: Q_0 (J, n_v, d_v) and an MLP from the reorganised text to Q - Q_0."""

    config: MutualPromptConfig
    citation = """@article{long2024mutual,
  title = {Mutual Prompt Leaning for Vision Language Models},
  author = {Long, Sifan and Zhao, Zhen and Yuan, Junkun and Tan, Zichang and Liu, Jiangjiang and Feng, Jingyuan and
            Wang, Shengsheng and Wang, Jingdong},
  journal = {International Journal of Computer Vision},
  year = {2024},
  doi = {10.1007/s11263-024-02243-z}
}"""

    def __init__(self, config: MutualPromptConfig, encoder: DualEncoder):
        size = encoder.shape()
        layers, text_width, width = size["vision_layers"], size["text_width"], size["projection_width"]
        remedy = f"the vision tower has {layers} layers; choose 1 to {layers}."
        config.require("vision_prompt_depth", config.vision_prompt_depth <= layers, remedy)
        super().__init__(config, encoder)
        narrow = max(1, width // config.reduction)
        self.text_prompts = nn.Parameter(
            initial_prompts(self.tokenizer(encoder), encoder, config.initial_text, config.prompt_length)
        )
        if config.text_heads != "none":
            heads = config.prompt_length if config.text_heads == "per_token" else 1
            self.decompose = nn.Sequential(nn.Linear(width, narrow), nn.ReLU(), nn.Linear(narrow, heads * text_width))
        if config.vision_prompt_length:
            shape = (config.vision_prompt_depth, config.vision_prompt_length, size["vision_width"])
            self.vision_prompts = nn.Parameter(torch.empty(shape, device=encoder.model.device).normal_(std=0.02))
            last = nn.Linear(narrow, self.vision_prompts.numel())
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.guide = nn.Sequential(nn.Linear(width, narrow), nn.ReLU(), last)

    def prompts(self, image_features: torch.Tensor) -> torch.Tensor:
        """FTP: v_m + U_m ReLU(W_1 x0). x0 (b, d) -> (b, n, d_t)."""
        prompts = self.text_prompts.expand(image_features.shape[0], -1, -1)  # (b, n, d_t)
        if self.config.text_heads == "none":
            return prompts
        return prompts + self.decompose(image_features).unflatten(-1, (-1, prompts.shape[-1]))  # (b, n or 1, d_t)

    def describe(self, encoder: DualEncoder, image_features: torch.Tensor, sentences: Sentences) -> torch.Tensor:
        # For how many classes an image gets its own texts; None: for all.
        shortlist, classes = 0 if self.config.text_heads == "none" else self.config.shortlist, len(sentences[0])
        if shortlist is None or shortlist >= classes:
            return super().describe(encoder, image_features, sentences)
        count, device = len(image_features), sentences[0].device
        all_classes = torch.arange(classes, device=device)
        one_image = torch.zeros_like(all_classes)
        plain = self.encode_pairs(encoder, self.text_prompts[None], sentences, one_image, all_classes)  # (s, d)
        if not shortlist:
            return plain.expand(count, -1, -1)  # (b, s, d)
        nearest = (image_features @ plain.detach().T).topk(shortlist).indices.flatten()  # (b * K',)
        images = torch.arange(count, device=device).repeat_interleave(shortlist)  # (b * K',)
        prompts = self.prompts(self.as_weights(image_features))  # (b, n, d_t)
        pairs = self.encode_pairs(encoder, prompts, sentences, images, nearest)  # (b * K', d)
        return plain.expand(count, -1, -1).clone().index_put((images, nearest), pairs)  # (b, s, d)

    def adapt_image(
        self,
        encoder: DualEncoder,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        sentences: Sentences,
        **kwargs: Any,
    ) -> torch.Tensor:
        """TVP: f(x) = V(x; Q(x)), unit, (b, d)."""
        if not self.config.vision_prompt_length:
            return image_features
        assert pixel_values is not None  # the vision tower has prompts, so nothing can replace the pictures
        if not self.config.conditioned_texts:
            plain = unit(encode_words(encoder, *sentences, chunk=self.config.text_chunk_size))
            text_features = plain.expand(len(image_features), -1, -1)
        relevance = self.relevance(image_features, text_features)  # a (b, s)
        description = torch.einsum("bs,bsd->bd", relevance, text_features)  # r (b, d)
        prompts = self.vision_prompts + self.guide(self.as_weights(description)).unflatten(
            -1, self.vision_prompts.shape
        )
        by_layer = dict(enumerate(prompts.unbind(1)))  # J of (b, n_v, d_v)
        return unit(encode_image(encoder, pixel_values, by_layer, **kwargs))

    @property
    def vision_is_frozen(self) -> bool:
        return not self.config.vision_prompt_length

    def relevance(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """a: the softmax over the K most relevant classes; classes of negative relevance get 0. -> (b, s)."""
        cosines = torch.einsum("bd,bsd->bs", image_features, text_features)
        if not self.config.relevance_weighting:
            return torch.full_like(cosines, 1 / cosines.shape[1])
        top = cosines.topk(min(self.config.top_k, cosines.shape[1])).indices
        chosen = torch.zeros_like(cosines, dtype=torch.bool).scatter(1, top, True) & (cosines > 0)
        scores = (cosines / self.config.temperature).masked_fill(~chosen, float("-inf"))
        # An image to which no class is relevant has a description of zeros.
        return torch.where(chosen.any(1, keepdim=True), scores, 0.0).softmax(-1) * chosen

    def class_shares(self, encoder: DualEncoder, pixel_values: torch.Tensor) -> torch.Tensor | None:
        if not self.config.vision_prompt_length:
            return None
        sentences = self.class_texts.ids, self.class_texts.ends
        features = unit(encode_image(encoder, pixel_values))  # (b, d)
        if self.config.conditioned_texts:
            texts = self.describe(encoder, features, sentences)  # (b, c, d)
        else:
            texts = unit(encode_words(encoder, *sentences)).expand(len(features), -1, -1)
        return self.relevance(features, texts)

    def standalone(self, encoder: DualEncoder, class_texts: ClassTexts | None = None) -> nn.Module:
        for field, exportable in (("shortlist", None), ("conditioned_texts", True)):
            value = getattr(self.config, field)
            if value != exportable:
                raise ValueError(
                    f"`{field}`={value!r}: these texts are computed by Python code that ONNX cannot represent; "
                    f"change it to {exportable!r} before the export."
                )
        return super().standalone(encoder, class_texts)


register("MUTUAL_PROMPT", MutualPromptConfig, MutualPrompt)
