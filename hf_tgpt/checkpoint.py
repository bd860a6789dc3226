"""A run's folder and its checkpoints: Accelerate's, but with the adapter's weights alone, and never half a folder."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn


def prepare_output_dir(output_dir: Path, settings: dict[str, Any], resume: bool, accelerator: Accelerator) -> Path:
    """Makes the folder of a new run and notes its settings in run.json; with `resume`, checks that they are the same.

    Returns the folder, the main process's in all processes. Raises ValueError if it holds another run, or if `resume`
    finds no checkpoint or one of a run with other settings.
    """
    output_dir = Path(broadcast_object_list([str(output_dir)])[0])
    note = output_dir / "run.json"
    if resume:
        if not note.exists() or not find_checkpoint(output_dir / "checkpoint"):
            raise ValueError(f"`resume`: {str(output_dir)!r} holds no checkpoint; start the run without it.")
        before = json.loads(note.read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"`{name}`={value!r} but the run in {str(output_dir)!r} has {before.get(name)!r}; resume with the "
                    "same settings or start a new run."
                )
    elif output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(
            f"`output_dir`={str(output_dir)!r} already holds another run or other files; choose a new folder, or "
            "resume that run."
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not resume:
        output_dir.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(settings, indent=2) + "\n")
    accelerator.wait_for_everyone()
    return output_dir


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; the second name is left by a run that was stopped between two renames."""
    return next((path for path in (folder, folder.with_name("checkpoint.old")) if path.is_dir()), None)


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: the active adapter, whatever its name."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def save_weights(accelerator: Accelerator, model: nn.Module, path: Path) -> None:
    """The trained weights, written whole or not at all."""
    if accelerator.is_main_process:
        temporary = path.with_suffix(".tmp")
        save_file(trained_weights(model), temporary)
        os.replace(temporary, path)
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
def adapter_checkpoints(accelerator: Accelerator, model: nn.Module, **states):
    """Within, Accelerate's checkpoints hold the trained weights alone and `states`.

    The frozen CLIP would be written anew each time. `states` are objects with a `state_dict` of plain values.
    """

    def save(models, weights, folder):
        weights.clear()
        if accelerator.is_main_process:
            save_file(trained_weights(model), os.path.join(folder, "adapter.safetensors"))
            content = {name: state.state_dict() for name, state in states.items()}
            Path(folder, "states.json").write_text(json.dumps(content))

    def load(models, folder):
        models.clear()
        load_weights(model, Path(folder) / "adapter.safetensors")
        for name, content in json.loads(Path(folder, "states.json").read_text()).items():
            states[name].load_state_dict(content)

    hooks = [accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def save_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Written beside the old checkpoint, which is dropped only when the new one is whole."""
    temporary = folder.with_name("checkpoint.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(temporary)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        old = folder.with_name("checkpoint.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    found = find_checkpoint(folder)
    if found is None:
        raise ValueError(f"`resume`: there is no checkpoint {str(folder)!r}; start the run without resume.")
    accelerator.load_state(found)
