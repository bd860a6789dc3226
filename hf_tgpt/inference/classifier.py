"""Classifies pictures of any kind with a trained model."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import closing
from numbers import Integral
from typing import Any, get_args

import datasets
import numpy as np
import torch
from transformers.modeling_outputs import ImageClassifierOutput

from ..adapters.tower_classifier import AdaptedModel, html_of
from ..data.images import ImageTransform
from ..data.read_ahead import read_batches
from ..encoders import encoder_of
from ..evaluation.accuracy import for_classes
from ..evaluation.calibration import Calibration, settings_of
from ..utils.names import check_class_names
from .answers import Answer, Question, Scores, answers
from .pictures import has_state, is_one, load_image, rows_of
from .turns import answering

# Class texts of image-conditioned prompts in memory at a time, one for each pair of image and class.
_PAIRS = 65_536
# How many other class lists have their features kept.
_LISTS = 8
_ITS_CLASSES = "the classes that the adapter was calibrated with, all of them; leave out `class_names`"


class Classifier:
    """A trained model as a function from pictures to the names of their classes; `hf_tgpt.load_classifier` makes one.

    `model` is a PeftModel with an adapter of this package, or a `TowerClassifier` such as LoRA; `transform` turns an
    RGB picture into pixel values; `calibration` is the one of its logits on held-out pictures. Any number of threads
    may use one classifier, each with its own classes. (PEFT's switches, such as `disable_adapter`, act on the model,
    and so affect the answers in all threads.)

    Example:
        >>> classifier = hf_tgpt.load_classifier("runs/my-run")
        >>> classifier("cat.jpg", top_k=1, class_names=["a cat asleep", "a cat awake"])
    """

    def __init__(self, model: AdaptedModel, transform: ImageTransform, calibration: Calibration | None = None):
        self.model, self.transform, self.calibration = model.eval(), transform, calibration
        self._class_names = tuple(model.class_names)
        # The models for the class lists used last, by their names; beside each the learner and the config that it was
        # made from, which `set_adapter` and `set_class_names` replace.
        self._among: OrderedDict[tuple[str, ...], tuple[Any, Any, Callable[..., ImageClassifierOutput]]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_among", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"calibration": None} | state, _among=OrderedDict(), _lock=threading.Lock())

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
        """Whether it can also classify among names that it was not trained on."""
        return self.model.takes_new_classes

    def __call__(
        self,
        images: Any,
        top_k: int | None = 5,
        *,
        class_names: Sequence[str] | None = None,
        scores: Scores = "softmax",
        coverage: float | None = None,
        reject: bool = False,
        batch_size: int = 32,
    ) -> Answer | list[Answer] | Iterator[Answer]:
        """The `top_k` (None: all) most probable classes of a picture, [{"label", "score"}, ...], the likeliest first.

        One picture is a path, a URL, a PIL image, the bytes of a file, an open file, {"bytes", "path"}, an array (h, w)
        or (h, w, 1, 3 or 4) or a tensor (1, 3 or 4, h, w), integers of 0..255 or floats of 0..1. A list, an array or
        tensor with one more dimension, or a `datasets.Dataset` give a list of answers; an iterator, a generator or an
        IterableDataset give an iterator, which reads `batch_size` pictures at a time. In rows of a data set, the
        picture is in the image column. Pictures are decoded in several threads, and if `images` has a length, those of
        the next batch while the model works; PIL images and open files are read one after another.

        `class_names` are other classes for this call, if the method's class list is open; otherwise they are a subset
        of its classes. Scores are softmax probabilities among the classes asked about. With `scores`="sigmoid", on
        SigLIP, each is the probability of its class by itself: they do not add up to 1, and if all are low, the picture
        shows none of these classes.

        With a calibration (`hf-tgpt calibrate`), softmax probabilities match the accuracy on held-out pictures, and the
        order of the labels is the same. `coverage`, such as 0.9, then answers with as many classes as it takes for the
        right one to be among them for this share of pictures, whatever `top_k` is. With `reject`, a picture of none of
        the classes is answered by [{"label": None, "nearest": its nearest class, "score"}].

        Raises ValueError for a picture that cannot be read, naming it, for bad class names, for classes that a method
        with fixed ones does not have, for a sigmoid on a base model not trained with one, and for `coverage` and
        `reject` without a calibration of these classes.
        """
        options: Any = {"class_names": class_names, "scores": scores, "coverage": coverage, "reject": reject}
        if is_one(images):
            question = self.question(top_k, **options)
            return self.answers_to([question], self.pixel_values(images)[None])[0]
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
        coverage: float | None = None,
        reject: bool = False,
        batch_size: int = 32,
        skip: Callable[[Any, ValueError], None] | None = None,
    ) -> Iterator[tuple[Any, Answer]]:
        """Pairs of a picture, as given, and its answer, until `images` ends; other arguments as in `__call__`.

        With `skip`, a picture that cannot be read is passed to skip(picture, error) and gets no answer.
        """
        if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"`batch_size`={batch_size!r}: choose 1 or more.")
        question = self.question(top_k, class_names=class_names, scores=scores, coverage=coverage, reject=reject)
        # What comes from a source that has no length may arrive one by one, and no answer waits for a later picture.
        return self._stream(rows_of(images), question, batch_size, skip, ahead=isinstance(images, Sized))

    def question(
        self,
        top_k: int | None = 5,
        *,
        class_names: Sequence[str] | None = None,
        scores: Scores = "softmax",
        coverage: float | None = None,
        reject: bool = False,
    ) -> Question:
        """The question that a call with these arguments asks, for `answers_to`. Raises ValueError like `__call__`."""
        check_class_names(self.class_names if class_names is None else class_names)
        names = list(self.class_names if class_names is None else class_names)
        if top_k is not None and (not isinstance(top_k, Integral) or isinstance(top_k, bool) or top_k < 1):
            raise ValueError(f"`top_k`={top_k!r}: choose 1 or more.")
        self._check_scores(scores)
        question = Question(names, top_k, scores, coverage, reject, self.calibration_for(names))
        self._check_question(question)
        self.among(names)
        return question

    def pixel_values(self, image: Any) -> torch.Tensor:
        """The pixel values (3, s, s) of a picture of any kind that `__call__` takes. Raises ValueError like it."""
        return self.transform(load_image(image))

    def answers_to(self, questions: Sequence[Question], pixel_values: torch.Tensor) -> list[Answer]:
        """An answer for each picture, pixel values (b, 3, s, s), to its own question; all questions have the same
        classes.

        Example:
            >>> classifier = hf_tgpt.load_classifier("runs/my-run")
            >>> questions = [classifier.question(top_k=1), classifier.question(top_k=2)]
            >>> pictures = torch.stack([classifier.pixel_values("newt-1.jpg"), classifier.pixel_values("newt-2.jpg")])
            >>> [len(answer) for answer in classifier.answers_to(questions, pictures)]
            [1, 2]
        """
        classify, most = self.among(questions[0].names), len(questions)
        if self.model.learner.texts_per_image:
            most = max(1, min(most, _PAIRS // len(questions[0].names)))
        parts = [slice(start, start + most) for start in range(0, len(questions), most)]
        return [answer for part in parts for answer in self._answers(classify, questions[part], pixel_values[part])]

    def calibration_for(self, class_names: Sequence[str]) -> Calibration | None:
        """The calibration if its temperature holds for these classes and for the adapter's settings, else None."""
        return None if self._uncalibrated(class_names) else self.calibration

    def temperature(self, class_names: Sequence[str]) -> float:
        """The divisor of these classes' logits before the softmax; 1 without a calibration of them."""
        calibration = self.calibration_for(class_names)
        return 1.0 if calibration is None else calibration.temperature

    def _uncalibrated(self, class_names: Sequence[str]) -> str | None:
        """What is missing for calibrated answers about these classes; None if nothing is."""
        learner = self.model.learner
        if self.calibration is None:
            return "a calibrated adapter, and this one is not; calibrate it: `hf-tgpt calibrate FOLDER`"
        if learner is not None and settings_of(learner.config) != self.calibration.settings:
            return "the adapter's settings as they were calibrated; calibrate it with those of now"
        return None if self.calibration.includes(class_names) else _ITS_CLASSES

    def _check_question(self, question: Question) -> None:
        """Raises ValueError for a `coverage` or `reject` that the calibration does not allow."""
        why, calibration, names = self._uncalibrated(question.names), question.calibration, question.names
        if calibration is not None and not calibration.is_for(names):
            why = _ITS_CLASSES
        for name, value in (("coverage", question.coverage), ("reject", question.reject or None)):
            if value is not None and why is not None:
                raise ValueError(f"`{name}`={value!r} needs {why}.")
        if calibration is not None and question.coverage is not None:
            calibration.least_probabilities(question.coverage, names)
        if calibration is not None and question.reject:
            calibration.rejected(torch.zeros(1, len(names)))

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
        question: Question,
        batch_size: int,
        skip: Callable[[Any, ValueError], None] | None,
        ahead: bool,
    ) -> Iterator[tuple[Any, Answer]]:
        def read(image: Any) -> torch.Tensor | ValueError:
            try:
                return self.pixel_values(image)
            except ValueError as error:
                if skip is None:
                    raise
                return error

        def answer(batch: list[tuple[Any, torch.Tensor | ValueError]]) -> list[tuple[Any, Answer | ValueError]]:
            pixels = [values for _, values in batch if isinstance(values, torch.Tensor)]
            found = iter(self.answers_to([question] * len(pixels), torch.stack(pixels)) if pixels else ())
            return [(image, values if isinstance(values, ValueError) else next(found)) for image, values in batch]

        with closing(read_batches(read, images, batch_size, ahead=ahead, alone=has_state)) as batches:
            for image, found in itertools.chain.from_iterable(map(answer, batches)):
                if not isinstance(found, ValueError):
                    yield image, found
                elif skip is not None:
                    skip(image, found)

    @answering()
    @torch.inference_mode()
    def _answers(
        self,
        classify: Callable[..., ImageClassifierOutput],
        questions: Sequence[Question],
        pixel_values: torch.Tensor,
    ) -> list[Answer]:
        device = next(self.model.parameters()).device
        logits = classify(pixel_values.to(device)).logits.float()
        if logits.isnan().any():
            raise FloatingPointError(
                "Some answers are not numbers, as where float16 overflows or weights are damaged; load the adapter "
                "with `dtype`='bf16' or 'fp32'."
            )
        rows = iter(logits.split(1))
        found: list[Answer] = []
        for _, alike in itertools.groupby(questions, key=id):
            asked = list(alike)
            found += answers(torch.cat(list(itertools.islice(rows, len(asked)))), asked[0])
        return found

    def among(self, class_names: Sequence[str]) -> Callable[..., ImageClassifierOutput]:
        """The model as a classifier of pixel values among these classes; the features of the last few lists are kept.

        Raises ValueError for bad names, and for classes that a method with fixed ones does not have.
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
