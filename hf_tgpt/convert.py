"""From the research releases' tensor names to ours and back."""

from __future__ import annotations

import torch

from .registry import config_class
from .tuner import SLOT, PromptTuner

_PREFIX = f"base_model.model.{SLOT}.{PromptTuner.prefix}."


def convert_original_state_dict(state_dict: dict[str, torch.Tensor], method: str) -> dict[str, torch.Tensor]:
    """A released checkpoint's tensors -> the adapter state dict that `peft.set_peft_model_state_dict` takes.

    `method` is the method's name in lower case, such as "maple". Tensors that the release never uses, its frozen CLIP
    and its class-dependent buffers are left out. Raises ValueError for an unknown method or if nothing is recognised.

    Example:
        >>> state_dict = hf_tgpt.convert_original_state_dict(checkpoint["state_dict"], "maple")
        >>> peft.set_peft_model_state_dict(model, state_dict)
    """
    names = config_class(method).learner_class.original_names
    converted = {_PREFIX + names[name]: value for name, value in state_dict.items() if name in names}
    if not converted:
        raise ValueError(
            f"`state_dict` has no tensor of a released {method} checkpoint, such as {next(iter(names))!r}; it starts "
            f"with {list(state_dict)[:3]}."
        )
    return converted


def convert_to_original_state_dict(state_dict: dict[str, torch.Tensor], method: str) -> dict[str, torch.Tensor]:
    """An adapter's state dict, as PEFT saves it -> the release's names. Raises ValueError for a tensor without one."""
    names = {_PREFIX + ours: theirs for theirs, ours in config_class(method).learner_class.original_names.items()}
    unknown = [name for name in state_dict if name not in names]
    if unknown:
        raise ValueError(f"`state_dict` has {unknown[0]!r}, for which released {method} checkpoints have no place.")
    return {names[name]: value for name, value in state_dict.items()}
