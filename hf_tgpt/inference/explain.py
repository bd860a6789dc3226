"""Explanations of an adapter: words near its prompts, attention over the picture, classes in visual prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image as PILImage

from ..adapters.learner import PromptLearner
from ..encoders import DualEncoder, encoder_of, families
from ..evaluation.plots import new_figure, require_matplotlib
from .classifier import Answer, Classifier
from .pictures import load_image
from .turns import answering

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Words = list[list[tuple[str, float]]]


@answering()
@torch.no_grad()
def nearest_words(classifier: Classifier, image: Any = None, count: int = 5) -> dict[str, Words]:
    """The words of the vocabulary nearest to each learned token, {set of tokens: [[(word, number), ...], ...]}.

    The number is the Euclidean distance to the word's embedding, as CoOp's authors measure it (IJCV 2022, section 4.3).
    TGP-T's prompts belong to an `image`; there it is the score of the word that its sentence losses train. Deeper
    prompts are among hidden states, where there are no words. Raises ValueError for a model without text prompts.
    """
    learner, encoder = _learner(classifier), _encoder(classifier)
    pixels = None if image is None else _pixels(classifier, image)
    scores, largest = learner.word_scores(encoder, classifier.model.class_names, pixels)
    tokenizer = learner.tokenizer(encoder)

    def words(numbers: torch.Tensor) -> Words:
        best = numbers.topk(count, largest=largest)
        return [
            [(tokenizer.decode([word]).strip(), number) for word, number in zip(*row, strict=True)]
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    return {name: words(numbers) for name, numbers in scores.items()}


def bonder_attention(classifier: Classifier, image: Any) -> dict[str, torch.Tensor]:
    """The attention of TGP-T's queries to patches: {"category": (queries, rows, columns), "content": ...}.

    A query's map and its attention to the CLS token, which is left out, sum to 1. Raises ValueError for another method.
    """
    maps = query_attention(classifier, image)
    if not maps:
        method = _learner(classifier).config.method
        raise ValueError(f"{method} has no Bonder; image_attention works for every method.")
    return maps


@answering()
@torch.no_grad()
def query_attention(classifier: Classifier, image: Any) -> dict[str, torch.Tensor]:
    """The attention of a method's queries to patches, {queries: (n, rows, columns)}; empty without queries."""
    encoder = _encoder(classifier)
    maps = classifier.model.learner.query_attention(encoder, _pixels(classifier, image))
    return {name: _patches(encoder, weights[0]) for name, weights in maps.items()}


@answering()
@torch.no_grad()
def image_attention(classifier: Classifier, image: Any, layer: int = -1) -> torch.Tensor:
    """The attention of the picture's feature to patches in a `layer` of the image tower: (heads, rows, columns).

    This is the attention of the CLS token or, in a tower without one, of the pooling after the last layer; in an
    earlier layer of such a tower, the patches' mean attention. A head's map and its attention to the CLS token and to
    prompts, which are left out, sum to 1. If the tower runs more than once for a picture, the last run counts. Raises
    ValueError for a base model with unknown layers, such as ALIGN.
    """
    encoder = _encoder(classifier)  # its own view, so that other calls are not affected
    if not encoder.takes_prompts:
        raise ValueError(
            f"The base model is {encoder.model_class}, whose attention cannot be read; explain an adapter on one of "
            f"{families()}."
        )
    number = range(len(encoder.image_layers()))[layer]
    attention: list[torch.Tensor] = []

    def watch(i: int, hidden: torch.Tensor) -> None:
        if i == number:
            attention.append(encoder.feature_attention(i, hidden)[0])  # (heads, p)

    encoder.on_image_layer = watch
    classifier.model.learner(encoder, _pixels(classifier, image))
    return _patches(encoder, attention[-1])


def mean_attention(classifier: Classifier, image: Any) -> dict[str, torch.Tensor]:
    """The mean attention to patches (rows, columns), with a title: of a method's own queries, or else of what the image
    feature is read from, in the last layer.

    Raises ValueError as `image_attention` does.

    Example:
        >>> classifier = hf_tgpt.load_classifier("runs/my-run")
        >>> maps = mean_attention(classifier, "cat.jpg")
        >>> attention_figure(classifier, "cat.jpg", maps).savefig("cat-attention.png")
    """
    queries = query_attention(classifier, image)
    maps = {f"where the {name} queries look": weights.mean(0) for name, weights in queries.items()}
    feature = "CLS" if _encoder(classifier).class_tokens else "the pooling"
    return maps or {f"where {feature} looks in the last layer": image_attention(classifier, image).mean(0)}


@answering()
@torch.no_grad()
def chosen_classes(classifier: Classifier, image: Any) -> Answer:
    """The classes whose texts form the visual prompt of mutual prompt learning (TVP), and their weights.

    [{"label", "score"}, ...], the largest first, without those of weight 0. Raises ValueError for another method.
    """
    learner = _learner(classifier)
    shares = learner.class_shares(_encoder(classifier), _pixels(classifier, image))
    if shares is None:
        raise ValueError(f"{learner.config.method} as configured has no visual prompt made of class texts.")
    pairs = zip(classifier.model.class_names, shares[0].tolist(), strict=True)
    chosen = sorted((pair for pair in pairs if pair[1] > 0), key=lambda pair: -pair[1])
    return [{"label": label, "score": share} for label, share in chosen]


# Pictures ------------------------------------------------------------------------------------------------------------


def attention_figure(classifier: Classifier, image: Any, maps: dict[str, torch.Tensor]) -> Figure:
    """The picture as the model sees it, and once for each title with its map (rows, columns) as an overlay."""
    return attention_rows(classifier, {"": (image, maps)})


def attention_rows(classifier: Classifier, rows: dict[str, tuple[Any, dict[str, torch.Tensor]]]) -> Figure:
    """The same for several pictures, {title: (image, maps)}, a row for each."""
    columns, side = 1 + max(len(maps) for _, maps in rows.values()), 2.6
    figure = new_figure(side * columns, (side + 0.4) * len(rows))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for places, (title, (image, maps)) in zip(grid, rows.items(), strict=True):
        picture = as_seen(classifier, image)
        for axes, (words, weights) in zip(places, [(title, None), *maps.items()], strict=True):
            axes.imshow(picture if weights is None else overlay(picture, weights))
            axes.set_title(words, fontsize="medium")
            axes.set_axis_off()
    return figure


def overlay(picture: PILImage.Image, weights: torch.Tensor) -> PILImage.Image:
    """A map (rows, columns) laid over a picture, from dark, where it is 0, to bright, where it is largest."""
    require_matplotlib()
    from matplotlib import colormaps

    weights = weights.float().cpu()
    heat = PILImage.fromarray((weights / weights.max().clamp_min(1e-12)).numpy())
    colours = colormaps["viridis"](np.asarray(heat.resize(picture.size, PILImage.Resampling.BILINEAR)), bytes=True)
    return PILImage.blend(picture, PILImage.fromarray(colours).convert("RGB"), 0.55)


def attention_pictures(classifier: Classifier, image: Any) -> dict[str, PILImage.Image]:
    """The part of the picture that reaches the model and, by title, the mean attention laid over it.

    For a base model with unknown layers, only the former. Raises ValueError for the latter without matplotlib.
    """
    cropped = as_seen(classifier, image)
    if not _encoder(classifier).takes_prompts:
        return {"what the model sees": cropped}
    maps = mean_attention(classifier, image)
    return {"what the model sees": cropped} | {title: overlay(cropped, weights) for title, weights in maps.items()}


def as_seen(classifier: Classifier, image: Any) -> PILImage.Image:
    """The part of a picture that reaches the model, at the model's size."""
    transform = classifier.transform
    pixels = transform(load_image(image)).movedim(0, -1)  # (h, w, 3)
    pixels = pixels * torch.tensor(transform.std) + torch.tensor(transform.mean)
    return PILImage.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def _learner(classifier: Classifier) -> PromptLearner:
    learner = classifier.model.learner
    if not list(learner.parameters()):
        raise ValueError(f"{learner.config.method} has no prompts to explain; image_attention shows its tower.")
    return learner


def _encoder(classifier: Classifier) -> DualEncoder:
    return encoder_of(classifier.model.get_base_model())


def _pixels(classifier: Classifier, image: Any) -> torch.Tensor:
    if image is None:
        raise ValueError("`image`=None: this method's attention depends on the picture; pass one.")
    return classifier.transform(load_image(image))[None].to(next(classifier.model.parameters()).device)


def _patches(encoder: DualEncoder, weights: torch.Tensor) -> torch.Tensor:
    """Attention (..., CLS, patches, prompts) -> attention to the patches, (..., rows, columns)."""
    rows, start = encoder.patch_rows(), encoder.class_tokens
    return weights[..., start : start + rows * rows].unflatten(-1, (rows, rows))
