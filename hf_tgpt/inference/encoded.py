"""All pictures of a data set, inspected and encoded by the image tower once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, concatenate_datasets

from ..adapters.tower_classifier import AdaptedModel
from ..data.fewshot import read_labels
from ..data.images import FewShotImages, ImageTransform
from ..data.looks import Look, look_at
from ..encoders import encoder_of
from ..encoders.walk import unit
from ..training.features import cache_features, encode_pictures


@dataclass(frozen=True)
class Encoded:
    """The pictures of all splits, one split after another: n pictures, m of which can be read.

    Shapes: `looks` and `splits` n, `labels` (n,), `readable` (m,) the rows that can be read, `features` (m, d) of those
    in one centre view, float32 at unit length, and `states` (m, ...) the model's `image_states` of them.
    """

    dataset: Dataset
    splits: list[str]
    labels: np.ndarray
    looks: list[Look]
    readable: np.ndarray
    features: torch.Tensor
    states: torch.Tensor

    def place(self, row: int) -> dict[str, Any]:
        """How a picture is named: its file, split and row there."""
        return {
            "file": self.looks[row].file,
            "split": self.splits[row],
            "row": row - self.splits.index(self.splits[row]),
        }


def encode_splits(
    splits: Mapping[str, Dataset],
    model: AdaptedModel,
    transform: ImageTransform,
    folder: str | os.PathLike[str] | None = None,
    num_workers: int = 0,
) -> Encoded:
    """Inspects all pictures of data sets with the columns `image` and `label`, and encodes those that can be read.

    The features are those of the model's image tower with its adapter. With a `folder` they are stored there and reused
    the next time (see `training.features.cache_features`), which needs a frozen image tower.

    Raises ValueError if none can be read, or if the image tower's output depends on texts.

    Example:
        >>> from hf_tgpt.data import load_splits
        >>> from hf_tgpt.methods.zero_shot import zero_shot_beside
        >>> transform = hf_tgpt.data.ImageTransform(32, (0.5,) * 3, (0.5,) * 3, train=False)
        >>> encoded = encode_splits(load_splits("pictures"), zero_shot_beside(clip, ["cat", "dog"]), transform)
        >>> tuple(encoded.features.shape), encoded.place(7)["split"], encoded.place(7)["row"]
        ((8, 512), 'test', 3)
    """
    dataset = concatenate_datasets([data.select_columns(["image", "label"]) for data in splits.values()])
    looks = [look for split, data in splits.items() for look in look_at(data, split)]
    readable = np.array([row for row, look in enumerate(looks) if look.problem is None], dtype=np.int64)
    if not len(readable):
        raise ValueError(f"none of the {len(dataset)} pictures can be read; the first: {looks[0].problem}.")
    images = FewShotImages(dataset.select(readable), transform)
    learner = model.learner
    if learner.texts_per_image and not learner.vision_is_frozen:
        raise ValueError(
            f"`adapter`: the image features depend on the class texts with {learner.config.method} as configured, so a "
            "picture has no features of its own; choose another adapter, or the base model."
        )
    if folder is not None:
        states = cache_features(model, images, 1, folder, torch.float32, num_workers=num_workers).states
    else:
        states = encode_pictures(encoder_of(model.get_base_model()), learner, images, 1, num_workers)
    features = _features(model, states[0])
    of_split = [split for split, data in splits.items() for _ in range(len(data))]
    return Encoded(dataset, of_split, read_labels(dataset), looks, readable, features, states[0])


def unlabelled(files: Sequence[str]) -> dict[str, Dataset]:
    """Files as the split "" for `encode_splits`, whose only class has no name. No file is opened.

    Example:
        >>> unlabelled(["cat.jpg"])[""].num_rows
        1
    """
    features = Features({"image": Image(), "label": ClassLabel(names=[""])})
    return {"": Dataset.from_dict({"image": list(files), "label": [0] * len(files)}, features=features)}


def _features(model: AdaptedModel, states: torch.Tensor) -> torch.Tensor:
    """Unit features (m, d) of image states: (m, d), or all tokens (m, p, d_v), on the CPU."""
    encoder = encoder_of(model.get_base_model())
    with torch.no_grad():
        states = states.to(encoder.model.device)
        return unit((encoder.leave_image(states) if states.ndim == 3 else states).float()).cpu()


@torch.inference_mode()
def features_of(model: AdaptedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Unit features (b, d) of pixel values (b, 3, s, s), float32 on the CPU, as `encode_splits` gives them.

    Example:
        >>> from hf_tgpt.methods.zero_shot import zero_shot_beside
        >>> tuple(features_of(zero_shot_beside(clip, ["cat", "dog"]), torch.zeros(1, 3, 32, 32)).shape)
        (1, 512)
    """
    encoder = encoder_of(model.get_base_model())
    return _features(model, model.learner.image_states(encoder, pixel_values.to(encoder.model.device)))
