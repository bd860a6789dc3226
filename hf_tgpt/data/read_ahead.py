"""Reads pictures in several threads, those of the next batch while the model works on this one."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch
from torch.utils.data import DataLoader

from .images import Collator, FewShotImages

_MOST = 16  # threads; Pillow and numpy work beside each other, Python's own part of each picture does not
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def read_batches(
    read: Callable[[_Item], _Result],
    items: Iterable[_Item],
    batch_size: int,
    *,
    ahead: bool = True,
    alone: Callable[[_Item], bool] = lambda item: False,
) -> Generator[list[tuple[_Item, _Result]], None, None]:
    """Batches of items, each with read(item), in order; an error in `read` is raised at its batch.

    Several are read at a time, and with `ahead` the next batch while the caller works on this one, so at most two
    batches are in memory. Without it `items` is taken no further than the batch asked for, which suits a source whose
    items arrive one by one. `alone` is true for items that must be read one after another, in the caller's own thread.

    No thread outlives the iterator, except to finish the item that it is reading.

    Example:
        >>> from hf_tgpt.data.read_ahead import read_batches
        >>> list(read_batches(len, ["a", "bc", "def"], batch_size=2))
        [[('a', 1), ('bc', 2)], [('def', 3)]]
    """
    source = iter(items)
    waiting: deque[list[tuple[_Item, Future[_Result] | None]]] = deque()
    pool = ThreadPoolExecutor(min(_MOST, os.cpu_count() or 1), thread_name_prefix="read-ahead")
    try:
        while True:
            while len(waiting) < 1 + ahead and (batch := list(islice(source, batch_size))):
                waiting.append([(item, None if alone(item) else pool.submit(read, item)) for item in batch])
            if not waiting:
                return
            yield [(item, read(item) if result is None else result.result()) for item, result in waiting.popleft()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def pixel_batches(images: FewShotImages, batch_size: int, num_workers: int = 0) -> Iterator[torch.Tensor]:
    """The pixel values (b, 3, s, s) of all pictures in order, read ahead in threads or by this many processes.

    Example:
        >>> from hf_tgpt.data.read_ahead import pixel_batches
        >>> [tuple(pixels.shape) for pixels in pixel_batches(images, batch_size=len(images) - 1)]
        [(3, 3, 32, 32), (1, 3, 32, 32)]
    """
    if num_workers:
        for batch in DataLoader(images, batch_size, collate_fn=Collator(), num_workers=num_workers):
            yield batch["pixel_values"]
        return
    for rows in read_batches(images.__getitem__, range(len(images)), batch_size):
        yield torch.stack([item["pixel_values"] for _, item in rows])
