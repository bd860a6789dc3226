"""Checkpoints: Accelerate's, but only with the adapter's weights, and written completely or not at all.

Files are written to disk under a temporary name and then renamed, so a run that is killed at any moment leaves complete
files.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..utils.files import put_in_place, read_json


class Clock:
    """A run's seconds over all its parts; checkpoints store them."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._start -= state["seconds"]


def find_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in a run's folder. Each is complete, since it is named only then."""
    return max(_checkpoints(output_dir), key=step_of, default=None)


def _checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    return [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was saved after."""
    return int(checkpoint.name.rpartition("-")[2])


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that training changes: the active adapter's, whatever its name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _contents(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().contiguous() for name, value in weights.items()}


def save_weights(accelerator: Accelerator, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Writes weights by name, whole or not at all."""
    if accelerator.is_main_process:
        with _explained(path):
            temporary = path.with_suffix(".tmp")
            save_file(_contents(weights), temporary)
            put_in_place(temporary, path)
    accelerator.wait_for_everyone()


@torch.no_grad()
def load_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Loads weights by name, in place. Raises ValueError if the file has other weights."""
    saved = load_file(path)
    if weights.keys() != saved.keys():
        odd = sorted(weights.keys() ^ saved.keys())[0]
        raise ValueError(
            f"{str(path)!r} does not hold the weights that this model trains: {odd!r} is in only one of them. "
            "Continue a run with the version of hf-tgpt that started it."
        )
    for name, value in saved.items():
        weights[name].copy_(value)


@contextmanager
def adapter_checkpoints(accelerator: Accelerator, tensors: dict[str, torch.Tensor], **states: Any) -> Iterator[None]:
    """A context in which Accelerate's checkpoints contain only these tensors, which are loaded in place, and `states`.

    The frozen base model would be written again each time. `states` are objects with a `state_dict` of plain values.
    """

    def save(models: list[nn.Module], state_dicts: list[dict[str, torch.Tensor]], folder: str) -> None:
        state_dicts.clear()
        if accelerator.is_main_process:
            save_file(_contents(tensors), os.path.join(folder, "adapter.safetensors"))
            content = {name: state.state_dict() for name, state in states.items()}
            Path(folder, "states.json").write_text(json.dumps(content))

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()
        load_weights(tensors, Path(folder) / "adapter.safetensors")
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

    Raises OSError with the remedy if it cannot be written; earlier checkpoints then stay unchanged.
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
        shutil.rmtree(path, ignore_errors=True)  # a run resumed after its end saves it again
        with _explained(path):
            put_in_place(temporary, path)
        for old in sorted(_checkpoints(output_dir), key=step_of)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, output_dir: str | os.PathLike[str]) -> None:
    """Loads the newest checkpoint; a run that was stopped before its first starts again.

    Raises ValueError if it is damaged.
    """
    newest = find_checkpoint(output_dir)
    if newest is None:
        return
    try:
        accelerator.load_state(newest)
    except Exception as error:  # torch, safetensors and Accelerate have errors of their own for a damaged file
        raise ValueError(
            f"{str(newest)!r} cannot be read ({type(error).__name__}: {error}); move it elsewhere, and resume from the "
            "previous one or start again."
        ) from error


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Explains a failed write: what is left and what to do. torch and safetensors raise their own errors for it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        newest = find_checkpoint(path.parent)
        remaining = f"{newest.name} is whole" if newest else "there is no checkpoint yet"
        raise OSError(
            f"{str(path)!r} could not be written ({error}); {remaining}. Make room or correct the "
            "folder's permissions, and continue with --resume."
        ) from error
