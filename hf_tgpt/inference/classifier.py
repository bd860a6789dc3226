"""From pictures of any kind to class names, with whatever has been trained."""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, Literal, TypedDict, get_args

import datasets
import numpy as np
import torch
from transformers.modeling_outputs import ImageClassifierOutput

from ..adapters.tower_classifier import AdaptedModel, html_of
from ..data.images import ImageTransform
from ..encoders import encoder_of
from ..encoders.loading import check_device, check_picture_size, load_clip, load_image_processor
from ..evaluation.accuracy import for_classes
from ..hub.loading import load_trained
from ..hub.run import base_and_revision, local_folder
from ..utils.names import check_class_names
from .pictures import is_one, load_image, rows_of
from .turns import answering

# Class texts of image-conditioned prompts that are held at a time, one for each pair of image and class.
_PAIRS = 65_536
# Other lists of classes whose features are kept.
_LISTS = 8


class Guess(TypedDict):
    """A class and its probability."""

    label: str
    score: float


Answer = list[Guess]
Scores = Literal["softmax", "sigmoid"]


def load_classifier(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    *,
    base_model: str | os.PathLike[str] | None = None,
    revision: str | None = None,
) -> Classifier:
    """A trained adapter with the base model and the image processor that it belongs to, ready to classify.

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
    transform = ImageTransform.from_processor(load_image_processor(base, at), train=False)
    check_picture_size(clip, transform.size)
    return Classifier(load_trained(clip, folder), transform)


class Classifier:
    """A trained model as a function from pictures to the names of their classes; `load_classifier` makes one.

    `model` is a PeftModel with an adapter of this package, or a `TowerClassifier` such as LoRA; `transform` makes pixel
    values of an RGB picture. Any number of threads may ask one classifier, each about classes of its own. (PEFT's
    switches, such as `disable_adapter`, act on the model, and so on the answers of all threads.)

    Example:
        >>> classifier = hf_tgpt.load_classifier("runs/my-run")
        >>> classifier("cat.jpg", top_k=1, class_names=["a cat asleep", "a cat awake"])
    """

    def __init__(self, model: AdaptedModel, transform: ImageTransform):
        self.model, self.transform = model.eval(), transform
        self._class_names = tuple(model.class_names)
        # What answers about classes, by their names, of those that were asked about last; beside it the learner and the
        # config that it was made of, which `set_adapter` and `set_class_names` replace.
        self._among: OrderedDict[tuple[str, ...], tuple[Any, Any, Callable[..., ImageClassifierOutput]]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "transform": self.transform, "_class_names": self._class_names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _among=OrderedDict(), _lock=threading.Lock())

    def __repr__(self) -> str:
        names, count = ", ".join(map(repr, self._class_names[:5])), len(self._class_names)
        more = ", ..." if count > 5 else ""
        return f"Classifier({self.model.learner.config.method}, {count} classes: {names}{more})"

    def _repr_html_(self) -> str:
        return html_of(self.model)

    @property
    def class_names(self) -> list[str]:
        """The classes that the model came with."""
        return list(self._class_names)

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
        scores: Scores = "softmax",
        batch_size: int = 32,
    ) -> Answer | list[Answer] | Iterator[Answer]:
        """The `top_k` (None: all) most probable classes of a picture, [{"label", "score"}, ...], the likeliest first.

        One picture is a path, a URL, a PIL image, the bytes of a file, an open file, {"bytes", "path"}, an array (h, w)
        or (h, w, 1, 3 or 4) or a tensor (1, 3 or 4, h, w), integers of 0..255 or floats of 0..1. A list, an array or
        tensor with one more dimension, or a `datasets.Dataset` give a list of answers; an iterator, a generator or an
        IterableDataset give an iterator, which reads `batch_size` pictures at a time. Rows of a data set have their
        picture in the column of images.

        `class_names` are other classes for this call, of methods whose class list is open; of others they are some of
        the classes that they know. Scores are softmax probabilities among the classes asked about. With
        `scores`="sigmoid", on SigLIP, each is the probability of its class by itself: they do not add up to 1, and
        where all are low the picture shows none of these classes.

        Raises ValueError for a picture that cannot be read, naming it, for bad class names, for classes that a method
        with fixed ones does not know, and for a sigmoid on a base model that is not trained with one.
        """
        options: Any = {"class_names": class_names, "scores": scores}
        if is_one(images):
            return next(self.stream([images], top_k, **options))[1]
        answers = (answer for _, answer in self.stream(images, top_k, batch_size=batch_size, **options))
        at_once = isinstance(images, list | tuple | np.ndarray | torch.Tensor | datasets.Dataset)
        return list(answers) if at_once else answers

    def stream(
        self,
        images: Iterable[Any],
        top_k: int | None = 5,
        *,
        class_names: Sequence[str] | None = None,
        scores: Scores = "softmax",
        batch_size: int = 32,
        skip: Callable[[Any, ValueError], None] | None = None,
    ) -> Iterator[tuple[Any, Answer]]:
        """Pairs of a picture, as it was given, and its answer, while `images` lasts; other arguments as in the call.

        With `skip`, a picture that cannot be read goes to skip(picture, error) and gets no answer.
        """
        check_class_names(self.class_names if class_names is None else class_names)
        names = list(self.class_names if class_names is None else class_names)
        for name, value in (("top_k", top_k), ("batch_size", batch_size)):
            if name == "top_k" and value is None:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}`={value!r}: choose 1 or more.")
        self._check_scores(scores)
        if self.model.learner.texts_per_image:
            batch_size = max(1, min(batch_size, _PAIRS // len(names)))
        return self._stream(rows_of(images), top_k, names, scores, self.among(names), batch_size, skip)

    def _check_scores(self, scores: Scores) -> None:
        if scores not in get_args(Scores):
            raise ValueError(f"`scores`={scores!r} is unknown; choose one of {', '.join(get_args(Scores))}.")
        encoder = encoder_of(self.model.get_base_model())
        if scores == "sigmoid" and not encoder.sigmoid:
            raise ValueError(
                "`scores`='sigmoid' needs a base model that is trained with a sigmoid, such as SigLIP; "
                f"{encoder.model_class} is trained to compare classes with each other: use 'softmax'."
            )

    def _stream(
        self,
        images: Iterable[Any],
        top_k: int | None,
        names: list[str],
        scores: Scores,
        classify: Callable[..., ImageClassifierOutput],
        batch_size: int,
        skip: Callable[[Any, ValueError], None] | None,
    ) -> Iterator[tuple[Any, Answer]]:
        remaining = iter(images)
        read: list[tuple[Any, torch.Tensor]] = []
        while batch := list(itertools.islice(remaining, batch_size)):
            for image in batch:
                try:
                    read.append((image, self.transform(load_image(image))))
                except ValueError as error:
                    if skip is None:
                        raise
                    skip(image, error)
            if read:
                pixel_values = torch.stack([pixels for _, pixels in read])
                for (image, _), answer in zip(
                    read, self._answers(classify, pixel_values, names, scores, top_k), strict=True
                ):
                    yield image, answer
            read.clear()

    @answering()
    @torch.inference_mode()
    def _answers(
        self,
        classify: Callable[..., ImageClassifierOutput],
        pixel_values: torch.Tensor,
        names: list[str],
        scores: Scores,
        top_k: int | None,
    ) -> list[Answer]:
        device = next(self.model.parameters()).device
        logits = classify(pixel_values.to(device)).logits.float()  # (b, c)
        probabilities = logits.softmax(-1) if scores == "softmax" else logits.sigmoid()
        best = probabilities.topk(min(top_k or len(names), len(names)))
        return [
            [{"label": names[label], "score": score} for score, label in zip(*row, strict=True)]
            for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def among(self, class_names: Sequence[str]) -> Callable[..., ImageClassifierOutput]:
        """The model as a classifier of pixel values among these classes; the features of the last few lists are kept.

        Raises ValueError for bad names, and for classes that a method with fixed ones does not know.
        """
        key, learner = tuple(class_names), self.model.learner
        config = None if learner is None else learner.config
        with self._lock:
            answer = self._among.get(key)
            if answer is None or answer[0] is not learner or answer[1] is not config:
                answer = learner, config, for_classes(self.model, class_names)
            self._among[key] = answer
            self._among.move_to_end(key)
            if len(self._among) > _LISTS:
                self._among.popitem(last=False)
        return answer[2]
