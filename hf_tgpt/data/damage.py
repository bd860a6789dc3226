"""Images that cannot be read or show nothing, found before they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from datasets import Dataset, Image
from PIL import Image as PILImage

from .images import decode_image
from .read_ahead import read_batches
from .remarks import count, remark

_BATCH = 64  # images that are held at a time
_EXAMPLES = 20
_Result = TypeVar("_Result")
_DARKEST = 32  # of 255; a picture whose brightest value is lower shows little, such as 12 bits stored as 16


def without_damaged(dataset: Dataset, about: str = "images") -> Dataset:
    """The data set without the images that cannot be read, each decoded once; a warning counts and lists them.

    Another warning lists images of a single colour and nearly black ones, which are kept. `about` is the name of the
    images in the warnings. Raises ValueError if none can be read.

    Example:
        >>> from hf_tgpt.data import load_splits, without_damaged
        >>> len(without_damaged(load_splits("toyworld:codes")["test"]))
        1000
    """
    damaged: dict[int, str] = {}
    blank: list[str] = []
    for row, (record, problem, is_blank) in enumerate(_looked_at(dataset)):
        name = record["path"] or f"row {row}"
        if problem is not None:
            damaged[row] = f"{name} ({problem})"
        elif is_blank:
            blank.append(name)
    if damaged:
        remark(
            f"{count(len(damaged), 'image')} skipped, of {len(dataset)} {about}, because "
            f"{'they' if len(damaged) > 1 else 'it'} cannot be read: "
            f"{_some(list(damaged.values()))}."
        )
        if len(damaged) == len(dataset):
            raise ValueError(f"none of the {len(dataset)} {about} can be read; replace them.")
        dataset = dataset.select([row for row in range(len(dataset)) if row not in damaged])
    if blank:
        remark(f"{count(len(blank), 'picture')} of one colour or nearly black: {_some(blank)}.")
    return dataset


def _looked_at(dataset: Dataset) -> Iterator[tuple[dict[str, Any], str | None, bool]]:
    """Each image's record, the reason if it cannot be read, and whether it shows nothing."""
    return of_each_record(dataset, _look)


def of_each_record(dataset: Dataset, function: Callable[[dict[str, Any]], _Result]) -> Iterator[_Result]:
    """A function's result for each image's {"bytes", "path"}, in order; several run at a time."""
    undecoded = dataset.select_columns("image").cast_column("image", Image(decode=False))
    records = (record for batch in undecoded.iter(_BATCH) for record in batch["image"])
    for batch in read_batches(function, records, _BATCH):
        yield from (result for _, result in batch)


def _look(record: dict[str, Any]) -> tuple[dict[str, Any], str | None, bool]:
    try:
        image = decode_image(record)
    except ValueError as error:
        return record, reason_of(error), False
    return record, None, shows_nothing(image)


def reason_of(error: ValueError) -> str:
    """Why `decode_image` could not read an image, without its name and the remedy."""
    return str(error).partition(": ")[2].rpartition(";")[0]


def shows_nothing(image: PILImage.Image) -> bool:
    """Whether an RGB image has one colour only, or is nearly black."""
    ranges: Any = image.getextrema()
    return all(low == high for low, high in ranges) or all(high < _DARKEST for _, high in ranges)


def _some(names: list[str]) -> str:
    rest = len(names) - _EXAMPLES
    return ", ".join(names[:_EXAMPLES]) + (f", and {rest} more" if rest > 0 else "")
