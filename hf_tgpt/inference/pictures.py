"""Reads pictures of any kind, one or millions."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub import constants, get_session
from PIL import Image as PILImage

from ..data.images import decode_image

_SECONDS = 30
_SIDE = 160  # of a small copy, in pixels


def load_image(image: Any) -> PILImage.Image:
    """One picture of any kind that `Classifier` takes as RGB, upright, transparency on white.

    Raises ValueError, naming the picture, if it cannot be read, and for a URL if there is no network.
    """
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return _download(image)
    if _is_open_file(image):
        image = image.read()
        if isinstance(image, str):
            raise ValueError("an open text file is not a picture; open it with 'rb', or give its path.")
    if isinstance(image, bytes | bytearray | memoryview):
        return decode_image({"bytes": bytes(image), "path": None})
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = image.movedim(0, -1) if image.ndim == 3 else image
        image = (image.float() if image.is_floating_point() else image).numpy()
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if isinstance(image, dict) and not {"bytes", "path"} & image.keys():
        if "image" not in image:
            raise ValueError(f"a row with {', '.join(image) or 'nothing'} has no picture; give it as 'image'.")
        return load_image(image["image"])
    return decode_image(image)


def is_one(images: Any) -> bool:
    """Whether this is a single picture."""
    if isinstance(images, np.ndarray | torch.Tensor):
        return images.ndim <= 3
    one = str | os.PathLike | PILImage.Image | dict | bytes | bytearray | memoryview
    return isinstance(images, one) or _is_open_file(images)


def has_state(image: Any) -> bool:
    """Whether reading the picture changes it, so that two threads must not read it at a time: a Pillow picture may be
    read from its file first, and an open file moves on; either may share its file with another picture.
    """
    if isinstance(image, dict):
        return has_state(image.get("image"))
    return isinstance(image, PILImage.Image) or _is_open_file(image)


def _is_open_file(image: Any) -> bool:
    return callable(getattr(image, "read", None))


def rows_of(images: Iterable[Any]) -> Iterable[Any]:
    """A data set's pictures undecoded, so that an unreadable one can be named; anything else unchanged."""
    if not isinstance(images, datasets.Dataset | datasets.IterableDataset):
        if isinstance(images, Iterable):
            return images
        raise ValueError(f"`images` is a {type(images).__name__}; give pictures, or paths, URLs or arrays of them.")
    features = images.features
    if features is None:  # for a stream whose columns are unknown before it starts
        return images
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(columns) != 1:
        columns_given = f"columns of images: {', '.join(columns) or 'none'}"
        raise ValueError(
            f"`images` is a data set with {len(features)} columns and {columns_given}; select_columns one."
        )
    images = images.select_columns(columns).cast_column(columns[0], datasets.Image(decode=False))
    return (row[columns[0]] for row in images)


def _from_array(array: np.ndarray) -> PILImage.Image:
    """(h, w) or (h, w, 1, 3 or 4), integers of 0..255 or floats of 0..1."""
    shape = array.shape
    if array.ndim == 3 and shape[-1] == 1:
        array = array[..., 0]
    if 0 in shape or not (array.ndim == 2 or (array.ndim == 3 and shape[-1] in (3, 4))):
        raise ValueError(
            f"an array of shape {shape} is not a picture; give (h, w) or (h, w, 3), as a tensor (3, h, w), and a batch "
            "with one more dimension in front."
        )
    if array.dtype == bool:
        array = array.astype(np.float32)
    floats, low, high = np.issubdtype(array.dtype, np.floating), array.min(), array.max()
    if not (low >= 0 and high <= (1 if floats else 255)):  # also true for NaN
        raise ValueError(
            f"an array of {array.dtype} from {low} to {high} is not a picture; give integers of 0..255 or floats "
            "of 0..1. (Normalised pixel values go to the model itself: classifier.model(pixel_values).)"
        )
    return PILImage.fromarray((np.round(array * 255) if floats else array).astype(np.uint8))


def _download(url: str) -> PILImage.Image:
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"cannot read {url}: HF_HUB_OFFLINE is set, so nothing is downloaded; unset it, or give the file's path."
        )
    try:
        response = get_session().get(url, timeout=_SECONDS)
        response.raise_for_status()
    except Exception as error:  # the client's own exceptions, which differ by client
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot read {url}: {reason}; check the address.") from error
    return decode_image({"bytes": response.content, "path": url})


def address(picture: PILImage.Image) -> str:
    """An RGB picture as a data URI, exactly."""
    return _data_uri(picture, "png")


def small_address(picture: PILImage.Image) -> str:
    """A small copy of an RGB picture as a data URI.

    Example:
        >>> small_address(load_image("cat.jpg"))[:23]
        'data:image/jpeg;base64,'
    """
    small = picture.copy()
    small.thumbnail((_SIDE, _SIDE), PILImage.Resampling.BICUBIC)
    return _data_uri(small, "jpeg", quality=80)


def _data_uri(picture: PILImage.Image, kind: str, **options: int) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
