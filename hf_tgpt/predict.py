"""From pictures of any kind to class names, with whatever has been trained."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypedDict

import datasets
import numpy as np
import torch
from huggingface_hub import get_session, is_offline_mode
from peft import PeftModel
from PIL import Image as PILImage
from transformers import CLIPImageProcessorPil
from transformers.modeling_outputs import ImageClassifierOutput

from .conditioned import ImageConditionedLearner
from .config import check_class_names
from .data.transforms import ImageTransform, decode_image
from .evaluation import for_classes
from .loading import base_and_revision, check_device, load_clip, load_trained, local_folder
from .references import Reference

# Class texts of image-conditioned prompts that are held at a time, one for each pair of image and class.
_PAIRS = 65_536
_SECONDS = 30


class Guess(TypedDict):
    """A class and its probability."""

    label: str
    score: float


Answer = list[Guess]


def load_classifier(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    *,
    base_model: str | os.PathLike[str] | None = None,
    revision: str | None = None,
) -> Classifier:
    """A trained adapter or reference with the base model and the image processor that it belongs to, ready to be asked.

    `name_or_path` is a folder or an id on the Hub, there at `revision`; `device` is by default the GPU where there is
    one; `base_model` is another copy of the one that the adapter names. Raises ValueError if one of them cannot be
    loaded.

    Example:
        >>> classifier = hf_tgpt.load_classifier("runs/my-run")
        >>> classifier("cat.jpg", top_k=2)  # [{"label": "cat", "score": 0.9}, {"label": "dog", "score": 0.1}]
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    folder = local_folder(name_or_path, revision=revision)
    base, at = (os.fspath(base_model), None) if base_model else base_and_revision(folder)
    clip = load_clip(base, **({"revision": at} if at else {})).to(device).eval()
    try:
        processor = CLIPImageProcessorPil.from_pretrained(base, revision=at)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The base model {base!r} has no image processor that could be loaded ({error}); name a copy with its "
            "preprocessor_config.json by `base_model`."
        ) from error
    return Classifier(load_trained(clip, folder), ImageTransform.from_processor(processor, train=False))


class Classifier:
    """A trained model as a function from pictures to the names of their classes.

    `model` is a PeftModel with an adapter of ours, or a module of `references.py`; `transform` makes pixel values of
    an RGB picture. `class_names` are the classes that the model came with.
    """

    def __init__(self, model: PeftModel | Reference, transform: ImageTransform):
        self.model, self.transform = model.eval(), transform
        self.class_names = list(model.class_names)

    @property
    def takes_new_classes(self) -> bool:
        """Whether it also classifies by names that it was not trained on."""
        return self.model.takes_new_classes

    def __call__(
        self,
        images: Any,
        top_k: int | None = 5,
        *,
        class_names: Sequence[str] | None = None,
        batch_size: int = 32,
    ) -> Answer | list[Answer] | Iterator[Answer]:
        """The `top_k` (None: all) most probable classes of a picture, [{"label", "score"}, ...], the likeliest first.

        One picture is a path, a URL, a PIL image, {"bytes", "path"}, an array (h, w) or (h, w, 1, 3 or 4) or a tensor
        (1, 3 or 4, h, w), integers of 0..255 or floats of 0..1. A list, an array or tensor with one more dimension, or
        a `datasets.Dataset` give a list of answers; an iterator, a generator or an IterableDataset give an iterator,
        which reads `batch_size` pictures at a time. Rows of a data set have their picture in the column of images.

        `class_names` are other classes for this call, of methods whose class list is open; of others they are some of
        the classes that they know. Scores are softmax probabilities among the classes asked about.

        Raises ValueError for a picture that cannot be read, naming it, for bad class names and for classes that a
        method with fixed ones does not know.
        """
        if _is_one(images):
            return next(self.stream([images], top_k, class_names=class_names))[1]
        answers = (answer for _, answer in self.stream(images, top_k, class_names=class_names, batch_size=batch_size))
        whole = isinstance(images, list | tuple | np.ndarray | torch.Tensor | datasets.Dataset)
        return list(answers) if whole else answers

    def stream(
        self,
        images: Iterable[Any],
        top_k: int | None = 5,
        *,
        class_names: Sequence[str] | None = None,
        batch_size: int = 32,
        skip: Callable[[Any, ValueError], None] | None = None,
    ) -> Iterator[tuple[Any, Answer]]:
        """Pairs of a picture, as it was given, and its answer, while `images` lasts; other arguments as in the call.

        With `skip`, a picture that cannot be read goes to skip(picture, error) and gets no answer.
        """
        check_class_names(self.class_names if class_names is None else class_names)
        names = list(self.class_names if class_names is None else class_names)
        for name, value in (("top_k", top_k), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}`={value}: choose 1 or more.")
        if isinstance(getattr(self.model, "learner", None), ImageConditionedLearner):
            batch_size = max(1, min(batch_size, _PAIRS // len(names)))
        self._for(names)
        return self._stream(_rows(images), top_k, names, batch_size, skip)

    def _stream(
        self,
        images: Iterable[Any],
        top_k: int | None,
        names: list[str],
        batch_size: int,
        skip: Callable[[Any, ValueError], None] | None,
    ) -> Iterator[tuple[Any, Answer]]:
        left = iter(images)
        read: list[tuple[Any, torch.Tensor]] = []
        while batch := list(itertools.islice(left, batch_size)):
            for image in batch:
                try:
                    read.append((image, self.transform(load_image(image))))
                except ValueError as error:
                    if skip is None:
                        raise
                    skip(image, error)
            if read:
                pixel_values = torch.stack([pixels for _, pixels in read])
                for (image, _), answer in zip(read, self._answers(pixel_values, names, top_k), strict=True):
                    yield image, answer
            read.clear()

    @torch.inference_mode()
    def _answers(self, pixel_values: torch.Tensor, names: list[str], top_k: int | None) -> list[Answer]:
        device = next(self.model.parameters()).device
        logits = self._for(names)(pixel_values.to(device)).logits  # (b, c)
        best = logits.float().softmax(-1).topk(min(top_k or len(names), len(names)))
        return [
            [{"label": names[label], "score": score} for score, label in zip(*row, strict=True)]
            for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def _for(self, names: list[str]) -> Callable[..., ImageClassifierOutput]:
        """The model among these classes; it keeps the class features of those that it was asked about last."""
        return for_classes(self.model, names)


def load_image(image: Any) -> PILImage.Image:
    """One picture of any kind that `Classifier` takes as RGB, upright, transparency on white.

    Raises ValueError for what cannot be read, naming it, and for a URL without a network to reach it.
    """
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return _download(image)
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


def _is_one(images: Any) -> bool:
    if isinstance(images, np.ndarray | torch.Tensor):
        return images.ndim <= 3
    return isinstance(images, str | os.PathLike | PILImage.Image | dict)


def _rows(images: Iterable[Any]) -> Iterable[Any]:
    """A data set's pictures undecoded, so that one that cannot be read is named; anything else as it is."""
    if not isinstance(images, datasets.Dataset | datasets.IterableDataset):
        if isinstance(images, Iterable):
            return images
        raise ValueError(f"`images` is a {type(images).__name__}; give pictures, or paths, URLs or arrays of them.")
    features = images.features
    if features is None:  # of a stream whose columns are not known before it runs
        return images
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(columns) != 1:
        found = f"columns of images: {', '.join(columns) or 'none'}"
        raise ValueError(f"`images` is a data set with {len(features)} columns and {found}; select_columns one.")
    images = images.select_columns(columns).cast_column(columns[0], datasets.Image(decode=False))
    return (row[columns[0]] for row in images)


def _from_array(array: np.ndarray) -> PILImage.Image:
    """(h, w) or (h, w, 1, 3 or 4), integers of 0..255 or floats of 0..1."""
    shape = array.shape
    if array.ndim == 3 and shape[-1] == 1:
        array = array[..., 0]
    if 0 in shape or not (array.ndim == 2 or (array.ndim == 3 and shape[-1] in (3, 4))):
        raise ValueError(
            f"an array of shape {shape} is no picture; give (h, w) or (h, w, 3), as a tensor (3, h, w), and a batch "
            "with one dimension more in front."
        )
    if array.dtype == bool:
        array = array.astype(np.float32)
    floats, low, high = np.issubdtype(array.dtype, np.floating), array.min(), array.max()
    if not (low >= 0 and high <= (1 if floats else 255)):  # also where there is a NaN
        raise ValueError(
            f"an array of {array.dtype} from {low} to {high} is no picture; give integers of 0..255 or floats of 0..1. "
            "(Normalised pixel values go to the model itself: classifier.model(pixel_values).)"
        )
    return PILImage.fromarray((np.round(array * 255) if floats else array).astype(np.uint8))


def _download(url: str) -> PILImage.Image:
    if is_offline_mode():
        raise ValueError(
            f"cannot read {url}: HF_HUB_OFFLINE is set, so nothing is fetched; unset it, or give the file's path."
        )
    try:
        response = get_session().get(url, timeout=_SECONDS, follow_redirects=True)
        response.raise_for_status()
    except Exception as error:  # the client's own kinds, which change with it
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot read {url}: {reason}; check the address.") from error
    return decode_image({"bytes": response.content, "path": url})
