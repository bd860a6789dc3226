"""What an adapter has learned and looks at: words near its prompts, attention over the picture, chosen texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image as PILImage

from .bonder import NUM_HEADS, Bonder
from .learner import PromptLearner
from .methods.mutual import MutualPrompt
from .methods.tgpt import TGPT
from .predict import Answer, Classifier, load_image
from .references import clip_of
from .towers import cls_attention, encode_image, encode_tokens, project_image, token_embeddings, unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Words = list[list[tuple[str, float]]]
_PROMPTS = ("category", "content")  # TGP-T's


@torch.no_grad()
def nearest_words(classifier: Classifier, image: Any = None, count: int = 5) -> dict[str, Words]:
    """The words of CLIP's vocabulary nearest to each learned token, {set of tokens: [[(word, number), ...], ...]}.

    The number is the Euclidean distance to the word's embedding, as CoOp's authors measure it (IJCV 2022, section
    4.3). TGP-T's prompts belong to an `image`; there it is the score of the word that its sentence losses train.
    Deeper prompts stand among hidden states, where no words are. Raises ValueError for a model without text prompts.
    """
    model, learner, clip = classifier.model, _learner(classifier), clip_of(classifier.model)
    tokenizer, vocabulary = learner.tokenizer(clip), token_embeddings(clip).float()

    def words(numbers: torch.Tensor, largest: bool) -> Words:
        best = numbers.topk(count, largest=largest)
        return [
            [(tokenizer.decode([word]).strip(), number) for word, number in zip(*row, strict=True)]
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    if isinstance(learner, TGPT):
        tokens = _image_tokens(classifier, learner, image)
        read = {name: getattr(learner, f"{name}_bonder")(_queries(learner, name), tokens)[0] for name in _PROMPTS}
        return {name: words(prompt @ vocabulary.T, True) for name, prompt in read.items()}
    prompts: Any = getattr(learner, "text_prompts", ())
    if isinstance(prompts, torch.nn.ParameterList):
        prompts = prompts[0] if len(prompts) else ()
    if not len(prompts):
        raise ValueError(f"{learner.config.method} as configured learns no tokens of the text; look at its attention.")
    prompts = prompts.float()
    if prompts.ndim == 3:  # class-specific
        return {
            name: words(torch.cdist(own, vocabulary), False)
            for name, own in zip(model.class_names, prompts, strict=True)
        }
    return {"text": words(torch.cdist(prompts, vocabulary), False)}


@torch.no_grad()
def bonder_attention(classifier: Classifier, image: Any) -> dict[str, torch.Tensor]:
    """Which patches TGP-T's queries look at: {"category": (queries, rows, columns), "content": ...}.

    A query's map and its attention to the CLS token, which is left out, sum to 1. Raises ValueError for another method.
    """
    learner = _learner(classifier)
    if not isinstance(learner, TGPT):
        raise ValueError(f"{learner.config.method} has no Bonder; image_attention works for every method.")
    tokens = _image_tokens(classifier, learner, image)
    maps = {
        name: attention_of(getattr(learner, f"{name}_bonder"), _queries(learner, name), tokens) for name in _PROMPTS
    }
    return {name: _patches(classifier, weights[0]) for name, weights in maps.items()}


def attention_of(bonder: Bonder, queries: torch.Tensor, image_tokens: torch.Tensor) -> torch.Tensor:
    """The weights of a Bonder's cross-attention: queries (1, n, d), image_tokens (b, p, d) -> (b, n, p)."""
    queries = queries + bonder.self_attention(bonder.norm_self(queries))
    keys = bonder.norm_image(image_tokens)
    scale = (keys.shape[-1] // NUM_HEADS) ** -0.5
    return (scale * bonder.cross_query(bonder.norm_query(queries)) @ keys.transpose(1, 2)).softmax(-1)


@torch.no_grad()
def image_attention(classifier: Classifier, image: Any, layer: int = -1) -> torch.Tensor:
    """Which patches the CLS token looks at in a `layer` of the vision tower, prompts included: (heads, rows, columns).

    A head's map and its attention to the CLS token and to prompts, which are left out, sum to 1.
    """
    pixels = _pixels(classifier, image)
    model = classifier.model
    return _patches(classifier, cls_attention(clip_of(model), lambda: model(pixels), layer)[0])


@torch.no_grad()
def chosen_classes(classifier: Classifier, image: Any) -> Answer:
    """The classes whose texts make up the visual prompt of mutual prompt learning (TVP), and their shares of it.

    [{"label", "score"}, ...], the largest first, without those that take no part. Raises ValueError for another method.
    """
    learner = _learner(classifier)
    if not (isinstance(learner, MutualPrompt) and learner.config.vision_prompt_length):
        raise ValueError(f"{learner.config.method} as configured has no visual prompt made of class texts.")
    clip = clip_of(classifier.model)
    texts = learner.class_ids, learner.class_eos
    features = unit(encode_image(clip, _pixels(classifier, image)))  # (1, d)
    if learner.config.conditioned_texts:
        described = learner.describe(clip, features, *texts)  # (1, c, d)
    else:
        described = unit(encode_tokens(clip, *texts))[None]
    shares = learner.relevance(features, described)[0].tolist()
    chosen = [pair for pair in zip(classifier.model.class_names, shares, strict=True) if pair[1] > 0]
    return [{"label": label, "score": share} for label, share in sorted(chosen, key=lambda pair: -pair[1])]


# Pictures ------------------------------------------------------------------------------------------------------------


def attention_figure(classifier: Classifier, image: Any, maps: dict[str, torch.Tensor]) -> Figure:
    """The picture as the model sees it, and once for each title with its map (rows, columns) laid over it."""
    from matplotlib.figure import Figure

    picture, side = as_seen(classifier, image), 2.6
    figure = Figure(figsize=(side * (1 + len(maps)), side + 0.4), layout="constrained")
    for axes, (title, weights) in zip(figure.subplots(1, 1 + len(maps)), [("", None), *maps.items()], strict=True):
        axes.imshow(picture if weights is None else overlay(picture, weights))
        axes.set_title(title)
        axes.set_axis_off()
    return figure


def overlay(picture: PILImage.Image, weights: torch.Tensor) -> PILImage.Image:
    """A map (rows, columns) laid over a picture, from dark, where it is 0, to bright, where it is largest."""
    from matplotlib import colormaps

    weights = weights.float().cpu()
    heat = PILImage.fromarray((weights / weights.max().clamp_min(1e-12)).numpy())
    colours = colormaps["viridis"](np.asarray(heat.resize(picture.size, PILImage.Resampling.BILINEAR)), bytes=True)
    return PILImage.blend(picture, PILImage.fromarray(colours).convert("RGB"), 0.55)


def as_seen(classifier: Classifier, image: Any) -> PILImage.Image:
    """The part of a picture that reaches the model, at the model's size."""
    transform = classifier.transform
    pixels = transform(load_image(image)).movedim(0, -1)  # (h, w, 3)
    pixels = pixels * torch.tensor(transform.std) + torch.tensor(transform.mean)
    return PILImage.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def _learner(classifier: Classifier) -> PromptLearner:
    learner = getattr(classifier.model, "learner", None)
    if learner is None:
        raise ValueError(
            f"{type(classifier.model).__name__} has no prompts to explain; image_attention shows its tower."
        )
    return learner


def _pixels(classifier: Classifier, image: Any) -> torch.Tensor:
    if image is None:
        raise ValueError("`image`=None: what this method looks at depends on a picture; pass one.")
    return classifier.transform(load_image(image))[None].to(next(classifier.model.parameters()).device)


def _image_tokens(classifier: Classifier, learner: TGPT, image: Any) -> torch.Tensor:
    clip = clip_of(classifier.model)
    tokens = project_image(clip, learner.image_states(clip, _pixels(classifier, image)))
    return learner.image_to_text(tokens.to(learner.head.dtype))  # (1, p, d_t)


def _queries(learner: TGPT, name: str) -> torch.Tensor:
    return getattr(learner, f"{name}_queries")  # (1, n, d_t)


def _patches(classifier: Classifier, weights: torch.Tensor) -> torch.Tensor:
    """Attention (..., CLS, patches, prompts) -> that to the patches, (..., rows, columns)."""
    vision = clip_of(classifier.model).config.vision_config
    rows = vision.image_size // vision.patch_size
    return weights[..., 1 : 1 + rows * rows].unflatten(-1, (rows, rows))
