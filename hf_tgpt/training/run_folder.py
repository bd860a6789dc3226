"""A run's folder: it contains one run, and one process writes to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from filelock import FileLock, Timeout

from ..adapters.registry import plain_name
from ..data.duplicates import digests
from ..hub.client import SEEN_PICTURES
from ..utils.files import read_json, write_json

_LOCK = ".lock"
_NOTE = "run.json"
_BEFORE_WORK = (_LOCK, _NOTE, SEEN_PICTURES)  # a folder with only these contains no results of a run

# Held until the process ends.
_LOCKS: dict[Path, FileLock] = {}


def check_output_dir(output_dir: Path, resume: bool) -> None:
    """Raises ValueError for an unsuitable path, before anything is read or written."""
    above = next((folder for folder in output_dir.absolute().parents if folder.exists()), None)
    if (output_dir.exists() and not output_dir.is_dir()) or (above and not above.is_dir()):
        raise ValueError(f"`output_dir`={str(output_dir)!r} is a file or below one; choose a folder.")
    if resume and not (output_dir / _NOTE).exists():
        raise ValueError(f"`resume`: {str(output_dir)!r} contains no run; start without `resume`.")
    if not resume and output_dir.is_dir() and any(path.name not in _BEFORE_WORK for path in output_dir.iterdir()):
        raise ValueError(
            f"`output_dir`={str(output_dir)!r} already holds another run or other files; choose a new folder, or "
            "resume that run."
        )


def prepare_output_dir(output_dir: Path, settings: dict[str, Any], resume: bool, accelerator: Accelerator) -> Path:
    """Makes the folder of a new run and notes its settings in run.json; with `resume`, checks that they are the same.

    Returns the folder, the main process's in all processes. Raises ValueError if another program is writing to it, if
    it contains another run, if a machine cannot access it, or if `resume` finds no run or one with other settings.
    """
    output_dir = Path(broadcast_object_list([str(output_dir)])[0])
    note, taken = output_dir / _NOTE, [False]
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        taken = [not lock_folder(output_dir)]
    if broadcast_object_list(taken)[0]:
        raise ValueError(f"`output_dir`={str(output_dir)!r} is being written to by another run; choose another folder.")
    if not output_dir.is_dir():
        raise ValueError(
            f"`output_dir`={str(output_dir)!r} does not exist for process {accelerator.process_index}; all "
            "machines of a run must share the folder."
        )
    check_output_dir(output_dir, resume)
    if resume:
        before = read_json(note)
        if not isinstance(before, dict):
            raise ValueError(f"{str(note)!r} is not a JSON object; start a new run.")
        methods = before.get("method"), settings.get("method")
        if plain_name(str(methods[0])) == plain_name(str(methods[1])):
            before["method"] = methods[1]  # which an earlier version may have spelled differently
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"`{name}`={value!r} but the run in {str(output_dir)!r} has {before.get(name)!r}; resume with the "
                    "same settings or start a new run."
                )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not resume:
        write_json(note, settings)
    accelerator.wait_for_everyone()
    return output_dir


def write_seen_pictures(output_dir: Path, chosen: Mapping[str, Dataset]) -> None:
    """Records a run's pictures by split and content, since a path would be meaningless elsewhere."""
    rows = [f"{digest} {split}\n" for split, data in chosen.items() for digest in digests(data)]
    (output_dir / SEEN_PICTURES).write_text("".join(rows))


def lock_folder(folder: Path) -> bool:
    """Locks a folder until this process ends, for whatever reason; False if another process has locked it."""
    path = (folder / _LOCK).resolve()
    if path not in _LOCKS:
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        _LOCKS[path] = lock
    return True
