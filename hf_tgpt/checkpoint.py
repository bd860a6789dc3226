"""A run's folder and its checkpoints: Accelerate's, but with the adapter's weights alone, and never half a one.

What is written gets a temporary name, goes to the disk and is then renamed, so that a run which is killed at any moment
leaves files that are whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .reading import read_json

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


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Written whole or not at all."""
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    put_in_place(temporary, Path(path))


def put_in_place(temporary: Path, path: Path) -> None:
    """Renames a file or folder once its content is on the disk; a file that is there already is replaced."""
    for file in (temporary, *temporary.rglob("*")):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    os.replace(temporary, path)


def find_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in a run's folder. Each is whole: it has its name only since then."""
    return max(_checkpoints(output_dir), key=_step, default=None)


def _checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    return [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: the active adapter, whatever its name."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def save_weights(accelerator: Accelerator, model: nn.Module, path: Path) -> None:
    """The trained weights, written whole or not at all."""
    if accelerator.is_main_process:
        with _explained(path):
            temporary = path.with_suffix(".tmp")
            save_file(trained_weights(model), temporary)
            put_in_place(temporary, path)
    accelerator.wait_for_everyone()


@torch.no_grad()
def load_weights(model: nn.Module, path: Path) -> None:
    """Raises ValueError if the file holds other weights than the model trains."""
    ours, saved = trained_weights(model), load_file(path)
    if ours.keys() != saved.keys():
        odd = sorted(ours.keys() ^ saved.keys())[0]
        raise ValueError(f"{str(path)!r} does not hold the weights that this model trains: {odd!r} is in one alone.")
    for name, value in saved.items():
        ours[name].copy_(value)


@contextmanager
def adapter_checkpoints(accelerator: Accelerator, model: nn.Module, **states: Any) -> Iterator[None]:
    """Within, Accelerate's checkpoints hold the trained weights alone and `states`.

    The frozen CLIP would be written anew each time. `states` are objects with a `state_dict` of plain values.
    """

    def save(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            save_file(trained_weights(model), os.path.join(folder, "adapter.safetensors"))
            content = {name: state.state_dict() for name, state in states.items()}
            Path(folder, "states.json").write_text(json.dumps(content))

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()
        load_weights(model, Path(folder) / "adapter.safetensors")
        for name, content in read_json(Path(folder, "states.json")).items():
            states[name].load_state_dict(content)

    hooks = [accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def save_checkpoint(accelerator: Accelerator, output_dir: str | os.PathLike[str], step: int, keep: int = 1) -> None:
    """Writes `checkpoint-STEP` and drops all but the newest `keep`.

    Raises OSError, with what to do, if it cannot be written; the earlier ones are then as they were.
    """
    output_dir = Path(output_dir)
    temporary = output_dir / "checkpoint.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    with _explained(temporary):
        accelerator.save_state(temporary)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        path = output_dir / f"checkpoint-{step}"
        shutil.rmtree(path, ignore_errors=True)  # a run that is resumed at its end comes here again
        with _explained(path):
            put_in_place(temporary, path)
        for old in sorted(_checkpoints(output_dir), key=_step)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, output_dir: str | os.PathLike[str]) -> None:
    """The newest one; a run that was stopped before its first begins anew.

    Raises ValueError if it is damaged.
    """
    found = find_checkpoint(output_dir)
    if found is None:
        return
    try:
        accelerator.load_state(found)
    except Exception as error:  # torch, safetensors and Accelerate have errors of their own for a damaged file
        raise ValueError(
            f"{str(found)!r} cannot be read ({type(error).__name__}: {error}); remove it, and resume from the one "
            "before or start anew."
        ) from error


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """A failure to write says what is left and what to do. torch and safetensors have errors of their own for it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        found = find_checkpoint(path.parent)
        left = f"{found.name} is whole" if found else "there is no checkpoint yet"
        raise OSError(
            f"{str(path)!r} could not be written ({error}); {left}. Make room or mend the rights, and go on with "
            "--resume."
        ) from error
