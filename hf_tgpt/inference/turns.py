"""Who may use torch at a time: any number of answers together, an export alone.

torch's export state is global to the process, not per thread, so it would affect other threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_MOST = 64  # answers at a time
_ANSWERS = threading.Semaphore(_MOST)
_EXPORT = threading.Lock()


@contextmanager
def answering() -> Iterator[None]:
    """For work that may run beside other answers; it waits while a model is exported."""
    with _ANSWERS:
        yield


@contextmanager
def exporting() -> Iterator[None]:
    """For an export; it waits for answers in progress."""
    with _EXPORT:
        for _ in range(_MOST):
            _ANSWERS.acquire()
        try:
            yield
        finally:
            _ANSWERS.release(_MOST)
