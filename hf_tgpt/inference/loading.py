"""Loads trained adapters, ready to classify: one, or several that share base models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..adapters.class_features import use_class_features
from ..data.images import ImageTransform
from ..encoders.loading import check_device, check_picture_size, load_clip, load_image_processor, sharing_weights
from ..encoders.precision import read_dtype
from ..evaluation.calibration import read_calibration
from ..hub.loading import load_trained
from ..hub.run import base_and_revision, local_folder
from .classifier import Classifier


def load_classifier(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    *,
    base_model: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "fp32",
) -> Classifier:
    """A trained adapter with the base model and the image processor that it belongs to, ready to classify.

    `name_or_path` is a folder or an id on the Hub, there at `revision`; `device` is by default the GPU if there is one;
    `base_model` is another copy of the one that the adapter names. `dtype` is the precision of the towers: "fp32",
    "bf16", "fp16" or "auto", which is bf16 if this device is faster with it; features, adapter and logits are in
    float32. Raises ValueError if one of them cannot be loaded. The adapter's calibration, if it has one
    (`hf-tgpt calibrate`), is used for all answers.

    Example:
        >>> classifier = hf_tgpt.load_classifier("runs/my-run")
        >>> classifier("cat.jpg", top_k=2)  # [{"label": "cat", "score": 0.9}, {"label": "dog", "score": 0.1}]
    """
    adapters = {"": name_or_path}
    return load_classifiers(adapters, device, base_model=base_model, revision=revision, dtype=dtype)[""]


def load_classifiers(
    adapters: Mapping[str, str | os.PathLike[str]],
    device: str | torch.device | None = None,
    *,
    base_model: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "fp32",
) -> dict[str, Classifier]:
    """Several adapters by names that you choose; other arguments as in `load_classifier`, for all of them.

    Adapters of one base model share its weights, which are in memory once, whatever the methods. Each adapts towers of
    its own, so none changes another's answers.

    Example:
        >>> classifiers = load_classifiers({"maple": "runs/my-run", "coop": "runs/my-coop-run"})
        >>> classifiers["coop"]("cat.jpg", top_k=1)
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    precision = read_dtype(dtype, device)
    loaded: dict[str, Classifier] = {}
    towers: dict[Any, str] = {}  # hashes of text towers, each computed once
    bases: dict[tuple[str, str | None], tuple[PreTrainedModel, ImageTransform]] = {}
    for name, place in adapters.items():
        folder = local_folder(place, revision=revision)
        base, at = (os.fspath(base_model), None) if base_model else base_and_revision(folder)
        if (base, at) not in bases:
            clip = load_clip(base, **({"revision": at} if at else {}), dtype=precision).to(device).eval()
            transform = ImageTransform.from_processor(load_image_processor(base, at), train=False)
            check_picture_size(clip, transform.size)
            bases[base, at] = clip, transform
        clip, transform = bases[base, at]
        model = load_trained(sharing_weights(clip) if len(adapters) > 1 else clip, folder)
        loaded[name] = Classifier(model, transform, read_calibration(folder))
        use_class_features(model, folder, towers)  # last, as eval() discards what is kept
    return loaded
