"""Images that occur more than once in a data set: in training and test, or in two classes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Image

from ..utils.files import file_digest
from .remarks import count, remark

# Comparing all files of a larger set would take too long for so rare a mistake.
_LARGEST_SET = 50_000
_EXAMPLES = 5


def remark_on_duplicates(splits: Mapping[str, Dataset], between_classes: bool) -> None:
    """Remarks on test images that are in train too and, if asked for, on images that are in two classes, with paths.

    Sets beyond 50,000 images are not compared.
    """
    if sum(map(len, splits.values())) > _LARGEST_SET:
        return
    names = next(iter(splits.values())).features["label"].names
    classes_of: dict[bytes, dict[str, str]] = {}  # of each image: its class and place
    in_train: set[bytes] = set()
    repeated = []
    for split, digest, record, label in _with_twins(splits):
        place = record["path"] or f"an image of {split}"
        classes_of.setdefault(digest, {}).setdefault(names[label], place)
        if split == "train":
            in_train.add(digest)
        elif split == "test" and digest in in_train:
            repeated.append(place)
    if repeated:
        remark(
            f"{count(len(repeated), 'test image')} in the train split too "
            f"({', '.join(repeated[:_EXAMPLES])}): the test accuracy will be too high; remove them from one of the two."
        )
    twins = [places for places in classes_of.values() if len(places) > 1]
    if twins and between_classes:
        shown = "; ".join(
            " and ".join(f"{place} ({name})" for name, place in places.items()) for places in twins[:_EXAMPLES]
        )
        remark(f"{count(len(twins), 'image')} in two classes: {shown}. Remove each from the wrong class.")


def count_duplicates(train: Dataset, test: Dataset) -> int:
    """The number of test images that are byte for byte identical to a training image.

    Only images of equal size are read, and none is decoded.

    Example:
        >>> from hf_tgpt.data import count_duplicates, load_splits
        >>> splits = load_splits("toyworld:codes")
        >>> count_duplicates(splits["train"], splits["test"])
        0
    """
    in_train: set[bytes] = set()
    count = 0
    for split, digest, *_ in _with_twins({"train": train, "test": test}):
        if split == "train":
            in_train.add(digest)
        else:
            count += digest in in_train
    return count


def digests(dataset: Dataset) -> list[str]:
    """A digest of the content of each image of a data set: 16 hexadecimal digits, independent of its path."""
    undecoded = dataset.select_columns("image").cast_column("image", Image(decode=False))
    return [digest_of(row["image"]).hex()[:16] for row in undecoded]


def _with_twins(splits: Mapping[str, Dataset]) -> Any:
    """Split, digest, record and label of each image with the same size in bytes as another, train before the rest."""
    undecoded = {
        split: splits[split].select_columns(["image", "label"]).cast_column("image", Image(decode=False))
        for split in ("train", "validation", "test")
        if split in splits
    }
    sizes = {split: sizes_in_bytes(data) for split, data in undecoded.items()}
    distinct, counts = np.unique(np.concatenate(list(sizes.values())), return_counts=True)
    shared = distinct[(counts > 1) & (distinct > 0)]
    for split, data in undecoded.items():
        for row in np.flatnonzero(np.isin(sizes[split], shared)).tolist():
            record = data[row]
            yield split, digest_of(record["image"]), record["image"], record["label"]


def sizes_in_bytes(undecoded: Dataset) -> np.ndarray:
    """The size in bytes of every image, 0 for a file that is not there."""
    sizes = []
    for chunk in undecoded.with_format("arrow")["image"][:].chunks:
        held = pc.binary_length(chunk.field("bytes")).to_pylist()
        for size, path in zip(held, chunk.field("path").to_pylist(), strict=True):
            sizes.append(size or (os.path.getsize(path) if path and os.path.isfile(path) else 0))
    return np.array(sizes, dtype=np.int64)


def digest_of(record: dict) -> bytes:
    """The SHA-256 of an undecoded image's file."""
    if record["bytes"] is not None:
        return hashlib.sha256(record["bytes"]).digest()
    return file_digest(record["path"])
