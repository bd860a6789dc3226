"""Stopping cleanly: on SIGTERM, as sent by schedulers, and Ctrl-C, a run first saves a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

# The exit status that shells report for a process ended by the signal.
EXIT_CODES: dict[int, int] = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 128 + signal.SIGINT}


class Interruption:
    """Records the first signal; a second one of the same kind has its usual effect."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self._before[number])

    def requested(self, accelerator: Accelerator) -> int:
        """The signal's number, or 0; the same in all processes, whichever received it."""
        if accelerator.num_processes == 1:
            return self.signal
        numbers = accelerator.gather(torch.tensor([self.signal], device=accelerator.device))
        return int(numbers.max())


@contextmanager
def interruptions() -> Iterator[Interruption]:
    """A context in which both signals are recorded and do not end the process; only in the main thread."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    interruption._before = {number: signal.signal(number, interruption._note) for number in EXIT_CODES}
    try:
        yield interruption
    finally:
        for number, handler in interruption._before.items():
            signal.signal(number, handler)
