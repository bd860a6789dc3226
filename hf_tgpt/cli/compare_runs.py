"""Runs other commands, one after the other, each in its own process, which ends when this one does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ..training.interruption import EXIT_CODES, Interruption, interruptions

# Seconds that a stopped run has for saving its state.
GRACE = 60.0
_PRELOADED = ["hf_tgpt.cli.main", "hf_tgpt.cli.train", "hf_tgpt.cli.evaluate"]


class Runner:
    """Runs commands of hf-tgpt; `runner()` makes one."""

    def __init__(self, interruption: Interruption, launcher: Sequence[str]):
        self._interruption = interruption
        self._launcher = list(launcher)
        # A server that has imported the libraries forks for each run, so that none waits for them. On macOS what
        # system libraries do in threads does not outlive a fork.
        self._processes: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux" and not self._launcher:
            self._processes.set_forkserver_preload(_PRELOADED)

    def run(self, arguments: Sequence[str], log: Path) -> str:
        """Runs a command and appends its output to `log`. Returns why it failed, "" if it did not.

        SIGTERM and Ctrl-C are passed on, and this program ends when the run has saved its state.
        """
        self._stop_if_asked()
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        start = log.stat().st_size
        process = self._processes.Process(target=_call, args=(list(arguments), self._launcher, log, os.getcwd()))
        process.start()
        try:
            deadline = float("inf")
            while process.is_alive() and time.monotonic() < deadline:
                process.join(0.2)
                if self._interruption.signal and deadline == float("inf"):
                    with suppress(ProcessLookupError):  # it has just ended
                        os.kill(process.pid, self._interruption.signal)
                    deadline = time.monotonic() + GRACE
            while self._interruption.signal and _is_there(process.pid) and time.monotonic() < deadline:
                time.sleep(0.1)  # a launcher may end before the processes that it launched
        finally:
            _tell(process.pid, signal.SIGKILL)  # processes that it may have left
            process.join()
        self._stop_if_asked()
        return _why(log, start, process.exitcode) if process.exitcode else ""

    def _stop_if_asked(self) -> None:
        if number := self._interruption.signal:
            raise SystemExit(EXIT_CODES[number])


@contextmanager
def runner(launcher: Sequence[str] = ()) -> Iterator[Runner]:
    """A runner; `launcher` are the words before `-m hf_tgpt`, such as ["accelerate", "launch"], or none."""
    with interruptions() as interruption:
        yield Runner(interruption, launcher)


def _call(arguments: list[str], launcher: list[str], log: Path, folder: str) -> None:
    """Runs in the new process, which leads its own group, so that a terminal's Ctrl-C reaches only the parent."""
    os.setsid()
    os.chdir(folder)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("ab") as stream, open(os.devnull, "rb") as nothing:
        for number, file in enumerate((nothing, stream, stream)):
            os.dup2(file.fileno(), number)
    if not launcher:
        from .main import main

        sys.exit(main(arguments))
    launched = subprocess.Popen([*launcher, "-m", "hf_tgpt", *arguments])

    def pass_on(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # this process is in the group, too
        _tell(os.getpid(), number)  # the group, as launchers do not pass signals to their children

    for number in EXIT_CODES:
        signal.signal(number, pass_on)
    code = launched.wait()
    sys.exit(code if code >= 0 else 128 - code)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a child
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    _tell(os.getpid(), signal.SIGKILL)


def _tell(group: int, number: int) -> bool:
    """Sends a signal to all processes of a group; False if none is left."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # the latter on macOS, for a group whose last process has ended
        return False
    return True


def _is_there(group: int) -> bool:
    return _tell(group, 0)


def _why(log: Path, start: int, code: int) -> str:
    """The last line of a failed run's output, which is its error."""
    if code < 0:
        hint = ", as where memory runs out" if -code == signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{hint}"
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {code}")
