"""What each picture reveals without a model: whether it can be read, shows anything, and equals another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image

from .damage import of_each_record, reason_of, shows_nothing
from .duplicates import digest_of, sizes_in_bytes
from .images import decode_image

_SIDE = 16  # of the small copies by which pictures are compared
_FLAT = 1.0  # of 255; a small copy that varies less has no recognisable content
_BLOCK = 2048  # pictures that are compared with all others at a time
_SAME = 0.985  # correlation of two small copies
_SAME_FEATURES = 0.9  # and cosine of their features, which separates textures whose small copies look alike


def picture_names(dataset: Dataset) -> list[str]:
    """What each picture is called: its path, and without one "row 0" and so on. No picture is read.

    Example:
        >>> from hf_tgpt.data import load_splits
        >>> picture_names(load_splits("toyworld:codes")["test"])[:2]
        ['row 0', 'row 1']
    """
    plain = dataset.with_format(None).select_columns("image")  # a format's columns would outlive `flatten`
    undecoded = plain.cast_column("image", Image(decode=False))
    paths = undecoded.flatten()["image.path"][:]
    return [path or f"row {row}" for row, path in enumerate(paths)]


@dataclass(frozen=True)
class Look:
    """A picture's name, why it cannot be read (None: it can), whether it shows nothing, its size in pixels, and a small
    copy of it (16, 16, 3) of 0..255.
    """

    file: str
    problem: str | None
    blank: bool = False
    size: tuple[int, int] = (0, 0)
    small: np.ndarray | None = None


def look_at(dataset: Dataset, split: str = "") -> Iterator[Look]:
    """A look at each picture, each decoded once, several at a time; one without a file is named by split and row.

    Example:
        >>> from hf_tgpt.data import load_splits
        >>> [look.size for look in look_at(load_splits("pictures")["test"])]
        [(40, 40), (40, 40), (40, 40), (40, 40)]
    """
    for row, (path, problem, *rest) in enumerate(of_each_record(dataset, _look)):
        yield Look(path or f"{split} row {row}".strip(), problem, *rest)


def _look(record: dict[str, Any]) -> tuple[Any, ...]:
    try:
        image = decode_image(record)
    except ValueError as error:
        return record["path"], reason_of(error)
    small = np.asarray(image.resize((_SIDE, _SIDE), reducing_gap=2.0))
    return record["path"], None, shows_nothing(image), image.size, small


def equal_pictures(dataset: Dataset) -> list[list[int]]:
    """The rows of pictures whose files are byte for byte identical, in groups. Only files of equal size are read.

    Example:
        >>> from hf_tgpt.data import load_splits
        >>> equal_pictures(load_splits("pictures")["test"])
        []
    """
    undecoded = dataset.select_columns("image").cast_column("image", Image(decode=False))
    sizes = sizes_in_bytes(undecoded)
    distinct, counts = np.unique(sizes, return_counts=True)
    groups: dict[bytes, list[int]] = {}
    for row in np.flatnonzero(np.isin(sizes, distinct[(counts > 1) & (distinct > 0)])).tolist():
        groups.setdefault(digest_of(undecoded[row]["image"]), []).append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def similar_pairs(small: np.ndarray, features: torch.Tensor) -> list[tuple[int, int, float]]:
    """Pairs of rows that show nearly the same picture, as after saving it again or resizing it, and their similarity.

    Small copies (n, 16, 16, 3) correlate by 0.985 or more, and unit features (n, d) have a cosine of 0.9 or more.
    Copies without any structure match no other. Crops and mirrored pictures are not found.

    Example:
        >>> small = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3))
        >>> similar_pairs(np.stack([small[0], small[1], small[0]]), torch.ones(3, 1))[0][:2]
        (0, 2)
    """
    copies = torch.as_tensor(small, dtype=torch.float32).flatten(1, 2)  # (n, 256, 3)
    copies = (copies - copies.mean(1, keepdim=True)).flatten(1)  # a plain colour is no structure
    flat = copies.square().mean(1).sqrt() < _FLAT
    copies = torch.nn.functional.normalize(copies, dim=1) * ~flat[:, None]
    features = features.float().to(copies.device)
    pairs = []
    for start in range(0, len(copies), _BLOCK):
        likeness = copies[start : start + _BLOCK] @ copies[start:].T
        for i, j in (likeness >= _SAME).nonzero().tolist():
            if i < j and float(features[start + i] @ features[start + j]) >= _SAME_FEATURES:
                pairs.append((start + i, start + j, min(1.0, float(likeness[i, j]))))
    return pairs


def connected(pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Groups of rows that pairs connect, each in order.

    Example:
        >>> connected([(0, 4), (2, 3), (4, 7)])
        [[0, 4, 7], [2, 3]]
    """
    group_of: dict[int, list[int]] = {}
    for i, j in pairs:
        one, other = group_of.setdefault(i, [i]), group_of.setdefault(j, [j])
        if one is not other:
            one += other
            group_of.update(dict.fromkeys(other, one))
    return sorted({id(rows): sorted(rows) for rows in group_of.values()}.values())
