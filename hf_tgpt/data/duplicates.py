"""Images that are in the training and in the test split."""

from __future__ import annotations

import hashlib
import os
import warnings

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Image

# Comparing all files of a larger set would take longer than the mistake is likely.
_LARGEST_SET = 50_000


def warn_of_duplicates(train: Dataset, test: Dataset) -> None:
    """Warns, with their number, of test images that are in train too; sets beyond 50,000 images are not compared."""
    if len(train) + len(test) <= _LARGEST_SET and (count := count_duplicates(train, test)):
        warnings.warn(
            f"{count} of {len(test)} test images are in the train split too: the test accuracy will be too high; "
            "remove them from one of the two.",
            stacklevel=3,
        )


def count_duplicates(train: Dataset, test: Dataset) -> int:
    """How many test images have the bytes of a train image. Only images of equal size are read, and none is decoded."""
    train, test = (data.select_columns("image").cast_column("image", Image(decode=False)) for data in (train, test))
    sizes = _sizes(train), _sizes(test)
    shared = np.intersect1d(*sizes)
    shared = shared[shared > 0]
    digests = {_digest(train[row]["image"]) for row in np.flatnonzero(np.isin(sizes[0], shared)).tolist()}
    return sum(_digest(test[row]["image"]) in digests for row in np.flatnonzero(np.isin(sizes[1], shared)).tolist())


def _sizes(undecoded: Dataset) -> np.ndarray:
    """The size in bytes of every image, 0 for a file that is not there."""
    sizes = []
    for chunk in undecoded.with_format("arrow")["image"][:].chunks:
        held = pc.binary_length(chunk.field("bytes")).to_pylist()
        for size, path in zip(held, chunk.field("path").to_pylist(), strict=True):
            sizes.append(size or (os.path.getsize(path) if path and os.path.isfile(path) else 0))
    return np.array(sizes, dtype=np.int64)


def _digest(record: dict) -> bytes:
    if record["bytes"] is not None:
        return hashlib.sha256(record["bytes"]).digest()
    with open(record["path"], "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
