"""A run's folder: one run in it, one process that writes to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from ..adapters.registry import plain_name
from ..utils.files import read_json, write_json

_LOCK = ".lock"
_NOTE = "run.json"

# Held until the process ends.
_LOCKS: dict[Path, FileLock] = {}


def prepare_output_dir(output_dir: Path, settings: dict[str, Any], resume: bool, accelerator: Accelerator) -> Path:
    """Makes the folder of a new run and notes its settings in run.json; with `resume`, checks that they are the same.

    Returns the folder, the main process's in all processes. Raises ValueError if another program writes to it at the
    moment, if it holds another run, if a machine does not see it, or if `resume` finds none or one with other settings.
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
            f"`output_dir`={str(output_dir)!r} is not there for process {accelerator.process_index}; the machines of a "
            "run need a folder that all of them see."
        )
    if resume:
        if not note.exists():
            raise ValueError(f"`resume`: {str(output_dir)!r} holds no run; start it without.")
        before = read_json(note)
        if not isinstance(before, dict):
            raise ValueError(f"{str(note)!r} holds no JSON object; start a new run.")
        methods = before.get("method"), settings.get("method")
        if plain_name(str(methods[0])) == plain_name(str(methods[1])):
            before["method"] = methods[1]  # which a run of an earlier version may spell otherwise
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"`{name}`={value!r} but the run in {str(output_dir)!r} has {before.get(name)!r}; resume with the "
                    "same settings or start a new run."
                )
    elif any(path.name not in (_LOCK, _NOTE) for path in output_dir.iterdir()):  # a note alone: it never got to work
        raise ValueError(
            f"`output_dir`={str(output_dir)!r} already holds another run or other files; choose a new folder, or "
            "resume that run."
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not resume:
        write_json(note, settings)
    accelerator.wait_for_everyone()
    return output_dir


def lock_folder(folder: Path) -> bool:
    """Takes a folder for this process until it ends, however it ends; False if another one has it."""
    path = (folder / _LOCK).resolve()
    if path not in _LOCKS:
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        _LOCKS[path] = lock
    return True
