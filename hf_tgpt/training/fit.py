"""`hf_tgpt.fit`: heads on frozen features, fitted in one call, and classes added or removed afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn

from ..adapters.feature_head import FeatureHead
from ..adapters.fitting import Features
from ..data.images import FewShotImages, ImageTransform, decode_image
from ..data.readers.columns import find_columns, label_names, to_canonical
from ..encoders import DualEncoder, encoder_of
from ..encoders.loading import check_picture_size, load_image_processor
from ..utils.names import check_class_names
from .config import TrainingConfig, steps_of
from .features import encode_pictures
from .recipes import training_of

VIEWS = 10


def fit(
    model: Any,
    pictures: Any,
    labels: Any = None,
    *,
    validation: Any = None,
    views: int = VIEWS,
    training: TrainingConfig | None = None,
) -> Any:
    """Fits a head on frozen features (GDA, Tip-Adapter, CLAP, ...) to labelled pictures, and returns the model.

    `pictures` are a `datasets` data set with a column of images and one of labels, with `views` random crops taken of
    each picture; or pixel values (n, 3, h, w), or views of them (v, n, 3, h, w), with `labels` (n,), the class numbers.
    `validation` is another data set or a pair of pixel values and labels, for the search of the method's
    hyperparameters (without it: by cross-validation). A `DatasetDict` has both. The values found are in
    `model.peft_config["default"].fitted`. `training` configures the training of weights, for methods that have any
    (default: as in the paper).

    Raises ValueError for a model without such a head, for a class without a picture, for labels that are not classes,
    and for pictures that cannot be read or give features that are not finite. Then the model is unchanged.

    Example:
        >>> model = get_peft_model(clip, hf_tgpt.GDAConfig(class_names=["cat", "dog"]))
        >>> logits = hf_tgpt.fit(model, pixel_values, torch.tensor([0, 1, 0, 1]))(pixel_values).logits
    """
    learner, encoder = _head(model)
    training = training or training_of(learner.config.method)
    if isinstance(pictures, datasets.DatasetDict):
        validation = pictures.get("validation") if validation is None else validation
        pictures = pictures["train"]
    train = _features(model, pictures, labels, "pictures", views, training)
    tried, their_labels = validation if isinstance(validation, tuple | list) else (validation, None)
    held_out = None if tried is None else _features(model, tried, their_labels, "validation")
    learner.fit(encoder, train, held_out, steps_of(training))
    learner.forget()
    return model.eval()


def add_classes(model: Any, pictures: Mapping[str, Any], *, views: int = VIEWS, seed: int = 0) -> Any:
    """Adds classes to a fitted head from a few pictures each, and returns the model; the other logits do not change.

    `pictures` are {name: pixel values (n, 3, h, w), or views (v, n, 3, h, w), or a list of paths or PIL images};
    `views` random crops are taken of each listed image. GDA and Tip-Adapter support this. Raises ValueError for other
    methods, for a name that the model already has and for pictures that cannot be read; then no class is added.

    Example:
        >>> model = get_peft_model(clip, hf_tgpt.GDAConfig(class_names=["cat", "dog"]))
        >>> model = hf_tgpt.fit(model, pixel_values, torch.tensor([0, 1, 0, 1]))
        >>> model = hf_tgpt.add_classes(model, {"newt": pixel_values})  # or paths of pictures
    """
    learner, encoder = _head(model)
    names = list(learner.config.class_names)
    check_class_names([*names, *pictures])
    if not names_can_change(learner):
        raise ValueError(learner.fixed())
    found = {name: _of_class(model, name, given, len(names), views, seed) for name, given in pictures.items()}
    for name, features in found.items():
        learner.add_class(encoder, features)
        learner.config.class_names = [*learner.config.class_names, name]
    _base(model).classes_changed()
    return model


def remove_classes(model: Any, class_names: Sequence[str]) -> Any:
    """Removes classes from a fitted head, and returns the model; the other logits do not change.

    GDA and Tip-Adapter support this. Raises ValueError for other methods, for a name that is not a class, and if no
    class would be left.

    Example:
        >>> model = get_peft_model(clip, hf_tgpt.GDAConfig(class_names=["cat", "dog", "newt"]))
        >>> model = hf_tgpt.remove_classes(model, ["newt"])
    """
    learner, _ = _head(model)
    class_names = [class_names] if isinstance(class_names, str) else list(class_names)
    if not names_can_change(learner):
        raise ValueError(learner.fixed())
    unknown = [name for name in class_names if name not in learner.config.class_names]
    if unknown:
        raise ValueError(f"`class_names` has {unknown[0]!r}, which is not a class of the model; see model.class_names.")
    if len(set(class_names)) == len(learner.config.class_names):
        raise ValueError("`class_names` are all of the model's classes; keep at least one.")
    for name in dict.fromkeys(class_names):
        label = learner.config.class_names.index(name)
        learner.remove_class(label)
        learner.config.class_names = [other for other in learner.config.class_names if other != name]
    _base(model).classes_changed()
    return model


def names_can_change(learner: FeatureHead) -> bool:
    """Whether classes come and go in a head that is fitted."""
    return type(learner).add_class is not FeatureHead.add_class


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head(model: nn.Module) -> tuple[FeatureHead, DualEncoder]:
    learner = getattr(_base(model), "learner", None)
    if not isinstance(learner, FeatureHead):
        what = f"{learner.config.method}, which is not a head" if learner is not None else "no active adapter of a head"
        raise ValueError(
            f"`model` has {what} on frozen features; fit one such as GDAConfig(...), or train others with `hf-tgpt "
            "train` or hf_tgpt.training.loop.train."
        )
    return learner, encoder_of(_base(model))


def _features(
    model: Any,
    pictures: Any,
    labels: Any = None,
    name: str = "pictures",
    views: int = 1,
    training: TrainingConfig | None = None,
) -> Features:
    """Features of a data set or of pixel values; random crops of a data set as `training` defines them."""
    learner, encoder = _head(model)
    if isinstance(pictures, datasets.Dataset):
        if labels is not None:
            raise ValueError("`labels` are for pixel values; a data set has its own.")
        if views < 1:
            raise ValueError(f"`views`={views} but every picture needs one; choose 1 or more.")
        images = FewShotImages(_canonical(pictures, learner.config.class_names, name), _transform(encoder, training))
        states = encode_pictures(encoder, learner, images, views)
        return Features(states, torch.tensor(images.dataset["label"], device=states.device))
    pixels = torch.as_tensor(pictures)
    labels = _labels(labels, pixels, learner.config.class_names, name)
    return Features(_states(encoder, learner, pixels, name), labels.to(encoder.model.device))


def _labels(labels: Any, pixels: torch.Tensor, class_names: list[str], name: str) -> torch.Tensor:
    if labels is None:
        raise ValueError(f"`labels`=None but `{name}` are pixel values; pass the number of each picture's class.")
    labels = torch.as_tensor(labels)
    count = pixels.shape[-4] if pixels.ndim in (4, 5) else -1
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool or len(labels) != count:
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)} and type {labels.dtype} and `{name}` shape "
            f"{tuple(pixels.shape)}; pass pictures (n, 3, h, w) or views (v, n, 3, h, w), and n whole numbers."
        )
    outside = labels[(labels < 0) | (labels >= len(class_names))]
    if len(outside):
        raise ValueError(
            f"`labels` holds {int(outside[0])} but there are {len(class_names)} classes, 0 to {len(class_names) - 1}."
        )
    return labels.long()


@torch.no_grad()
def _states(encoder: DualEncoder, learner: FeatureHead, pixels: torch.Tensor, name: str) -> torch.Tensor:
    """Pixel values (n, 3, h, w) or (v, n, 3, h, w) -> image states (v, n, d)."""
    if pixels.ndim not in (4, 5) or not pixels.is_floating_point() or 0 in pixels.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(pixels.shape)} and type {pixels.dtype}; pass a data set, or pixel values "
            "(n, 3, h, w) or (v, n, 3, h, w) as the model's image processor makes them."
        )
    model, views = encoder.model, pixels[None] if pixels.ndim == 4 else pixels
    training = model.training
    model.eval()
    try:
        parts = [
            learner.image_states(encoder, part.to(model.device, encoder.dtype))
            for part in views.flatten(0, 1).split(64)
        ]
    finally:
        model.train(training)
    return torch.cat(parts).unflatten(0, views.shape[:2])


def _of_class(model: Any, name: str, pictures: Any, label: int, views: int, seed: int) -> Features:
    """Features of the pictures of one class."""
    learner, encoder = _head(model)
    field = f"pictures[{name!r}]"
    if not isinstance(pictures, torch.Tensor):
        if isinstance(pictures, str) or not isinstance(pictures, Sequence) or not pictures:
            raise ValueError(f"`{field}`: give at least one picture, as a list of paths or PIL images or as a tensor.")
        transform = _transform(encoder, training_of(learner.config.method))
        images = [decode_image(picture, name_hint=f"{field}[{i}]") for i, picture in enumerate(pictures)]
        pictures = torch.stack(
            [
                torch.stack(
                    [transform(image, np.random.default_rng([seed, view, i])) for i, image in enumerate(images)]
                )
                for view in range(views)
            ]
        )
    states = _states(encoder, learner, pictures, field)
    if not states.isfinite().all():
        raise ValueError(f"`{field}`: the features of its pictures are not finite; check them.")
    return Features(states, torch.full((states.shape[1],), label, device=states.device))


def _transform(encoder: DualEncoder, training: TrainingConfig | None) -> ImageTransform:
    processor = load_image_processor(encoder.model.name_or_path)
    as_is = ImageTransform.from_processor(processor, train=False)
    check_picture_size(encoder.model, as_is.size)
    return as_is if training is None else replace(as_is, train=True, scale=(training.crop_scale, 1.0))


def _canonical(dataset: datasets.Dataset, class_names: list[str], name: str) -> datasets.Dataset:
    """The columns `image` and `label`, with labels numbered like the model's classes."""
    columns = find_columns(dataset, None, None, None)
    columns = {role: columns[role] for role in ("image", "label")}
    names = label_names(dataset, columns["label"], class_names)
    present = dataset.unique(columns["label"])
    present = [names[label] if isinstance(label, int) and 0 <= label < len(names) else label for label in present]
    unknown = [label for label in present if label not in class_names]
    if unknown:
        raise ValueError(
            f"`{name}` has the label {unknown[0]!r}, which is not in `class_names`; leave such pictures out or make "
            "the adapter for all classes."
        )
    return to_canonical(dataset, "train", columns, class_names, class_names)
