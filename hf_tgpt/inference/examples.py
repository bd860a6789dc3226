"""The labelled pictures nearest to a picture, as evidence for an answer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, Image
from PIL import Image as PILImage

from ..data import class_names, decode_image, sample_few_shot
from ..data.remarks import count, remark
from ..methods.zero_shot import ZeroShot, zero_shot_beside
from ..utils.names import composed
from .classifier import Classifier
from .encoded import encode_splits, features_of
from .turns import answering

MOST = 5000  # pictures that are compared


@dataclass(frozen=True)
class Example:
    """A labelled picture, and the cosine of the angle between its image feature and the queried picture's."""

    picture: PILImage.Image
    label: str
    cosine: float


class Examples:
    """Labelled pictures with image features to compare others with; `described` names them for users.

    The features are those of the image tower with the adapter, or without it if they would depend on class texts. From
    more than 5,000 pictures, equally many of each class are drawn at random. Pictures that cannot be read are skipped.
    With a `folder`, features of a frozen image tower are stored there. Any number of threads may use it.

    Raises ValueError if no picture can be read.

    Example:
        >>> from hf_tgpt.data import load_splits
        >>> classifier = hf_tgpt.load_classifier("runs/my-run")
        >>> examples = Examples(load_splits("pictures")["train"], classifier)
        >>> [example.label for example in examples.nearest(hf_tgpt.inference.pictures.load_image("cat.jpg"), "cat")]
        ['cat', 'cat', 'dog']
    """

    def __init__(
        self,
        pictures: Dataset,
        classifier: Classifier,
        folder: str | os.PathLike[str] | None = None,
        described: str = "training pictures",
    ):
        self.described, self._transform, learner = described, classifier.transform, classifier.model.learner
        if len(pictures) > MOST:
            share = max(1, MOST // len(class_names(pictures)))
            remark(f"Of {len(pictures)} {described} {share} of each class are compared at most, chosen at random.")
            pictures = sample_few_shot(pictures, share, allow_fewer=True)
        self._tower = classifier.model
        if learner.states_are != ZeroShot.states_are or (learner.texts_per_image and not learner.vision_is_frozen):
            self._tower = zero_shot_beside(classifier.model, ["photo"])
        folder = folder if self._tower.learner.vision_is_frozen else None
        encoded = encode_splits({"": pictures}, self._tower, self._transform, folder)
        if unreadable := [f"{look.file} ({look.problem})" for look in encoded.looks if look.problem]:
            remark(f"{count(len(unreadable), 'picture')} passed over: {', '.join(unreadable[:5])}.")
        readable = encoded.dataset.select(encoded.readable)
        self._pictures = readable.select_columns("image").cast_column("image", Image(decode=False))
        self._features, names = encoded.features, class_names(pictures)
        self._labels = [names[label] for label in encoded.labels[encoded.readable]]
        self._composed = np.array([composed(label) for label in self._labels])

    def __len__(self) -> int:
        return len(self._labels)

    @answering()
    def nearest(self, image: PILImage.Image, label: str, count: int = 3) -> list[Example]:
        """The `count` nearest pictures of a class, the nearest first, and last the nearest one of any other class.

        There are fewer if the class has fewer.
        """
        feature = features_of(self._tower, self._transform(image)[None])[0]
        cosines = (self._features @ feature).numpy()
        order = np.argsort(-cosines, kind="stable")
        own = self._composed[order] == composed(label)
        return [
            example
            for rows, most in ((order[own], count), (order[~own], 1))
            for example, _ in zip(self._read(rows, cosines), range(most), strict=False)
        ]

    def _read(self, rows: np.ndarray, cosines: np.ndarray) -> Iterator[Example]:
        """The pictures in these rows that can be read, one by one."""
        for row in rows.tolist():
            try:
                picture = decode_image(self._pictures[row]["image"])
            except ValueError:  # its file has been removed since
                continue
            yield Example(picture, self._labels[row], float(cosines[row]))
