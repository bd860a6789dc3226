"""Batches the work that several callers wait for: the oldest first, with all that can share its batch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

Work = Callable[[Hashable, list[Any]], Sequence[Any]]


@dataclass
class _Waiting:
    key: Hashable
    item: Any
    since: float
    result: asyncio.Future[Any] = field(default_factory=asyncio.Future)


class Batcher:
    """Calls `work(key, items)`, in one thread, on items with equal keys that callers wait for at the same time.

    While the worker is idle, an item waits at most `max_wait` seconds for others; items that arrive during a batch form
    the next one. `work` returns a result for each item. An error in it is raised for every caller of that batch.

    Example:
        >>> async def together():
        ...     batcher = Batcher(lambda key, items: [key * item for item in items], max_batch=8)
        ...     async with batcher:
        ...         return await asyncio.gather(batcher(2, [1, 2]), batcher(2, [3]), batcher(5, [1]))
        >>> asyncio.run(together())
        [[2, 4], [6], [5]]
    """

    def __init__(self, work: Work, max_batch: int = 32, max_wait: float = 0.005):
        self.work, self.max_batch, self.max_wait = work, max_batch, max_wait
        self._waiting: list[_Waiting] = []

    async def __aenter__(self) -> Batcher:
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._worker = asyncio.create_task(self._work_off())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._worker
        self._thread.shutdown()

    async def __call__(self, key: Hashable, items: Sequence[Any]) -> list[Any]:
        """The results of the items; if a caller is cancelled, its items are removed from the queue."""
        now = asyncio.get_running_loop().time()
        waiting = [_Waiting(key, item, now) for item in items]
        self._waiting += waiting
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(each.result for each in waiting)))
        finally:
            for each in waiting:
                each.result.cancel()

    async def _work_off(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._fill()
            batch = self._next()
            if not batch:
                continue
            items = [each.item for each in batch]
            try:
                results = await loop.run_in_executor(self._thread, self.work, batch[0].key, items)
            except Exception as error:  # raised for these callers; other batches continue
                for each in batch:
                    if not each.result.done():
                        each.result.set_exception(error)
                continue
            for each, result in zip(batch, results, strict=True):
                if not each.result.done():
                    each.result.set_result(result)

    async def _fill(self) -> None:
        """Returns when a batch is full or has waited long enough."""
        loop = asyncio.get_running_loop()
        while True:
            left = self._waiting[0].since + self.max_wait - loop.time() if self._waiting else None
            if left is not None and (left <= 0 or len(self._waiting) >= self.max_batch):
                return
            self._arrived.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _next(self) -> list[_Waiting]:
        """Takes the oldest item and others with its key, except those that nobody waits for any more."""
        waiting = [each for each in self._waiting if not each.result.done()]
        batch = [each for each in waiting if each.key == waiting[0].key][: self.max_batch]
        taken = set(map(id, batch))
        self._waiting = [each for each in waiting if id(each) not in taken]
        return batch
