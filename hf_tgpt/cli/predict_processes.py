"""One or several processes that predict: their shares of the pictures, their progress, and the final output."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from ..encoders.precision import PRECISIONS, read_dtype
from ..utils.files import read_json, write_json
from .predict_rows import Output, Writer, jsonl_writer

_SECONDS = 30  # between two lines of progress without a terminal
# How long the first process waits for the last; a share of a million pictures may take long.
_PATIENCE = timedelta(days=30)


class Progress:
    """A progress bar on a terminal; elsewhere, such as in a log file, an occasional line."""

    def __init__(self, total: int, done: int, silent: bool = False, step: int = 1):
        self.total, self.done, self.told, self.silent, self.step = total, done, time.monotonic(), silent, step
        self.bar = tqdm(total=total, initial=done, desc="predicting", unit=" images", disable=True if silent else None)
        if done and not silent:
            print(f"{done} of {total} pictures are already in the output.", file=sys.stderr)

    def update(self) -> None:
        """Counts a picture, and those that other processes have done in the meantime."""
        step = min(self.step, self.total - self.done)
        self.done += step
        self.bar.update(step)
        if self.bar.disable and not self.silent and time.monotonic() - self.told > _SECONDS:
            self.told = time.monotonic()
            print(f"{self.done} of {self.total} pictures", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()


Classify = Callable[[list[str], Writer, Progress], None]


class Processes:
    """The processes that `accelerate launch` has started, or this one alone."""

    def __init__(self) -> None:
        # An Accelerator is made only for several, since it chooses a device for the whole process.
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        self._state = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)]) if several else None
        self.count = self._state.num_processes if self._state else 1
        self.number = self._state.process_index if self._state else 0

    @property
    def is_main(self) -> bool:
        """Whether it is the first, which reads the folder and merges the rows."""
        return self.number == 0

    @property
    def device(self) -> str | None:
        """The device of this process, if there are several."""
        return str(self._state.device) if self._state else None

    def precision(self, name: str) -> str:
        """A --dtype that means the same in all processes: each would measure "auto" for itself."""
        if self._state is None:
            return name
        found = read_dtype(name, self._state.device)
        (name,) = broadcast_object_list([next(key for key, dtype in PRECISIONS.items() if dtype == found)])
        return name

    def check(self, args: argparse.Namespace) -> None:
        """Raises ValueError for arguments that need a single process."""
        if self.count == 1:
            return
        if not args.output:
            raise ValueError("`output` is not given, and several processes cannot write to one stdout; name a file.")
        if args.list == "-":
            raise ValueError("`list`='-' is read by one process alone; name a file.")
        if args.sort_into:
            raise ValueError(
                "`sort_into` is for one process; leave it out, or call `hf-tgpt predict` without accelerate."
            )

    def run(
        self, output: Output, pictures: list[str], classify: Classify, columns: int, asked: Mapping[str, Any]
    ) -> list[tuple[str, str]]:
        """Writes the rows of all pictures that the output lacks, and returns the pictures that could not be read.

        Only the first process needs `pictures` and gets a return value.
        """
        lock = output.lock() if self.is_main else None
        try:
            return self._run(output, pictures, classify, columns, asked)
        finally:
            if lock is not None:
                os.unlink(lock.lock_file)  # first, as after the release it could be another call's
                lock.release()

    def _run(
        self, output: Output, pictures: list[str], classify: Classify, columns: int, asked: Mapping[str, Any]
    ) -> list[tuple[str, str]]:
        remaining = output.begin(pictures) if self.is_main else []
        done = len(pictures) - len(remaining)
        if self._state is not None:
            if self.is_main:
                write_json(output.list, remaining)
            self._state.wait_for_everyone()
            remaining = read_json(output.list)
        share = remaining[self.number :: self.count]
        start = time.monotonic()
        progress = Progress(len(pictures), done, silent=not self.is_main, step=self.count)
        with output.part(None if self.count == 1 else self.number) as file:
            classify(share, jsonl_writer(file, asked), progress)
        if self._state is not None:
            self._state.wait_for_everyone()
        if not self.is_main:
            return []
        skipped = output.finish(pictures, columns, asked)
        if self._state is not None:
            self._write_manifest(output, pictures, skipped, done, time.monotonic() - start)
        return skipped

    def _write_manifest(
        self, output: Output, pictures: Sequence[str], skipped: Sequence[tuple[str, str]], before: int, seconds: float
    ) -> None:
        facts = {"output": output.path.name, "images": len(pictures), "answered": len(pictures) - len(skipped)}
        facts |= {"skipped": [{"image": image, "error": error} for image, error in skipped]}
        facts |= {"processes": self.count, "done_before": before, "seconds": round(seconds, 1), "about": output.about}
        write_json(output.path.with_name(f"{output.path.name}.manifest.json"), facts)
