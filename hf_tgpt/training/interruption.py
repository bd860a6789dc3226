"""A polite end: SIGTERM, as schedulers send it, and Ctrl-C let a run save itself first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

# What shells give for a process that ended by the signal.
EXIT_CODES: dict[int, int] = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 128 + signal.SIGINT}


class Interruption:
    """Notes the first signal; the second one of the same kind does what it always did."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self._before[number])

    def requested(self, accelerator: Accelerator) -> int:
        """The signal's number, 0 without one; the same in all processes, of which any may have received it."""
        if accelerator.num_processes == 1:
            return self.signal
        numbers = accelerator.gather(torch.tensor([self.signal], device=accelerator.device))
        return int(numbers.max())


@contextmanager
def interruptions() -> Iterator[Interruption]:
    """Within, both signals are noted instead of ending the process; outside the main thread nothing changes."""
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
