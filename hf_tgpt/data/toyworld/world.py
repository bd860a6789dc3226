"""The toy world: small captioned pictures of painted shapes, drawn on demand and the same on every machine.

It exists so that every capability of this package can be run, tested and compared without a download. It is a toy: its
accuracies show that the code works and how methods differ on it, never how good a method is on photographs.

`load_toyworld` gives a few-shot task over the scenes of `scenes.py` as a Hugging Face `DatasetDict`; a domain other
than "photo" draws the same scenes in a way that the shipped toy CLIP was not trained on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from .scenes import COLOURS, SHAPES, SURFACES, draw, is_held_out, sample_scene


@dataclass(frozen=True)
class ToyClass:
    """A class of a task: its name and the parts of the scene that it fixes (as indices)."""

    name: str
    shape: int | None = None
    surface: int | None = None
    colour: int | None = None


def _triples() -> Iterator[ToyClass]:
    """Held-out combinations, spread evenly over shapes, surfaces and colours."""
    for shape, shape_name in enumerate(SHAPES):
        for surface, surface_name in enumerate(SURFACES):
            for colour, colour_name in enumerate(COLOURS):
                if is_held_out(shape, surface, colour) and (shape + surface) % 2 == 0:
                    yield ToyClass(f"{surface_name} {colour_name} {shape_name}", shape, surface, colour)


def _code(index: int) -> str:
    """A name unrelated to the picture, such as a part number."""
    return f"{'bkmtvz'[index % 6]}{'aeiou'[index % 5]}{'xqpw'[index % 4]} {(index * 37 + 11) % 90 + 10}"


TASKS: dict[str, tuple[ToyClass, ...]] = {
    "shapes": tuple(ToyClass(name, shape=i) for i, name in enumerate(SHAPES)),
    "colours": tuple(ToyClass(f"{name} shape", colour=i) for i, name in enumerate(COLOURS)),
    "surfaces": tuple(ToyClass(f"{name} shape", surface=i) for i, name in enumerate(SURFACES)),
    "coloured_shapes": tuple(
        ToyClass(f"{colour} {shape}", shape=i, colour=j)
        for i, shape in enumerate(SHAPES)
        for j, colour in enumerate(COLOURS)
        if j % 2 == 0
    ),
    "textured_shapes": tuple(
        ToyClass(f"{surface} {shape}", shape=i, surface=j)
        for i, shape in enumerate(SHAPES)
        for j, surface in enumerate(SURFACES)
    ),
    "unseen_triples": tuple(_triples()),
    "codes": tuple(
        ToyClass(_code(i), surface=i % len(SURFACES), colour=(2 * i + i // len(COLOURS)) % len(COLOURS))
        for i in range(20)
    ),
}

_SPLITS = ("train", "validation", "test")


def load_toyworld(
    task: str = "coloured_shapes",
    domain: str = "photo",
    train_per_class: int = 32,
    validation_per_class: int = 4,
    test_per_class: int | None = None,
) -> DatasetDict:
    """A task over toy pictures as splits with the columns `image`, `label` (ClassLabel) and `caption`.

    The same call gives the same pictures everywhere; a task shows the same scenes in every domain. `test_per_class`
    defaults to a number that gives about 1,000 test pictures. Raises ValueError for an unknown task or domain.

    Example:
        >>> splits = hf_tgpt.data.load_toyworld("codes", train_per_class=1, test_per_class=1)
        >>> len(splits["train"])
        20
    """
    if task not in TASKS:
        raise ValueError(f"`task`={task!r} is not a task of the toy world; choose one of {', '.join(TASKS)}.")
    test_per_class = math.ceil(1000 / len(TASKS[task])) if test_per_class is None else test_per_class
    splits = _drawn(task, domain, train_per_class, validation_per_class, test_per_class)
    # Objects of their own, since `set_format` changes a data set in place.
    return DatasetDict({split: data.with_format(None) for split, data in splits.items()})


@functools.lru_cache(maxsize=8)
def _drawn(task: str, domain: str, *per_class: int) -> dict[str, Dataset]:
    """The splits, kept for the next call, since drawing takes seconds."""
    classes = TASKS[task]
    features = Features(
        {"image": Image(), "label": ClassLabel(names=[c.name for c in classes]), "caption": Value("string")}
    )
    splits = {}
    for split, count in zip(_SPLITS, per_class, strict=True):
        rng = np.random.default_rng([list(TASKS).index(task), _SPLITS.index(split)])
        scenes = [
            (label, sample_scene(rng, toy.shape, toy.surface, toy.colour))
            for label, toy in enumerate(classes)
            for _ in range(count)
        ]
        columns = {
            "image": [draw(scene, domain) for _, scene in scenes],
            "label": [label for label, _ in scenes],
            "caption": [scene.caption for _, scene in scenes],
        }
        splits[split] = Dataset.from_dict(columns, features=features)
    return splits
