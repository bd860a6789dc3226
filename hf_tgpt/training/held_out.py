"""Logits of training pictures as if they had been held out, for a head on frozen features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..adapters.fitting import Features
from ..adapters.head_search import out_of_fold_logits
from ..data.images import FewShotImages
from ..encoders import encoder_of
from .config import steps_of
from .features import encode_pictures
from .recipes import training_of


def cross_validated(model: Any, images: FewShotImages) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (m, c) and labels (m,) of the pictures that a head was fitted to, each from a head fitted to the others.

    `images` contains them without augmentation. The copies are fitted to as many random crops as the model. Raises
    ValueError if each class has a single picture.
    """
    learner, encoder = model.learner, encoder_of(model.get_base_model())
    training = training_of(learner.config.method)
    augmented = replace(images.transform, train=True, scale=(training.crop_scale, 1.0))
    crops = FewShotImages(images.dataset, augmented, seed=training.seed)
    labels = torch.tensor(images.dataset["label"][:], device=encoder.model.device)
    views = encode_pictures(encoder, learner, crops, learner.noted("views", 1))
    as_is = encode_pictures(encoder, learner, images, 1)[0]
    logits, labels = out_of_fold_logits(learner, encoder, Features(views, labels), as_is, steps_of(training))
    return logits.cpu(), labels.cpu()
