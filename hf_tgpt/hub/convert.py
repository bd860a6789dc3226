"""Converts the research releases' files and tensor names to ours and back."""

from __future__ import annotations

import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..adapters.prompted import SLOT
from ..adapters.tuner import PromptTuner
from ..methods import available_methods, config_class

_PREFIX = f"base_model.model.{SLOT}.{PromptTuner.prefix}."
# Parts of a model that the releases save in separate files, where tensor names have no such prefix.
_PARTS = ("prompt_learner.", "cls_head.")
# Objects beside the tensors in a release's file: Dassl saves its scheduler's inner scheduler as an object.
_LEFTOVERS = ("torch.optim.", "dassl.", "solver.", "numpy.", "collections.defaultdict", "builtins.dict")
_CONTAINERS: dict[str, Callable[..., Any]] = {"collections.defaultdict": lambda *_: {}, "builtins.dict": dict}


def convert_original_state_dict(state_dict: dict[str, torch.Tensor], method: str) -> dict[str, torch.Tensor]:
    """A released checkpoint's tensors -> the adapter state dict that `peft.set_peft_model_state_dict` takes.

    `method` is the method's name in lower case, such as "maple". Tensors that the release never uses, its frozen CLIP
    and its class-dependent buffers are left out. Raises ValueError for an unknown method or if nothing is recognised.

    Example:
        >>> checkpoint = torch.load("model.pth.tar-50", weights_only=True)
        >>> state_dict = hf_tgpt.convert_original_state_dict(checkpoint["state_dict"], "coop")
        >>> peft.set_peft_model_state_dict(model, state_dict)
    """
    names = config_class(method).learner_class.original_names
    if not names:
        known = ", ".join(name for name, config in available_methods().items() if config.learner_class.original_names)
        raise ValueError(f"`method`={method!r} has no released checkpoints; these have: {known}.")
    converted = {}
    for name, value in state_dict.items():
        name = name.removeprefix("module.")  # of DataParallel
        own_name = next((names[part + name] for part in ("", *_PARTS) if part + name in names), None)
        if own_name is not None:
            converted[_PREFIX + own_name] = value
    if not converted:
        raise ValueError(
            f"`state_dict` has no tensor of a released {method} checkpoint, such as {next(iter(names))!r}; it starts "
            f"with {list(state_dict)[:3]}."
        )
    return converted


def convert_to_original_state_dict(state_dict: dict[str, torch.Tensor], method: str) -> dict[str, torch.Tensor]:
    """An adapter's state dict, as PEFT saves it -> the release's names. Raises ValueError for an unknown tensor.

    Example:
        >>> state_dict = hf_tgpt.convert_to_original_state_dict(peft.get_peft_model_state_dict(model), "coop")
    """
    names = {_PREFIX + ours: theirs for theirs, ours in config_class(method).learner_class.original_names.items()}
    unknown = [name for name in state_dict if name not in names]
    if unknown:
        raise ValueError(f"`state_dict` has {unknown[0]!r}, which is not part of a released {method} checkpoint.")
    return {names[name]: value for name, value in state_dict.items()}


# Files ---------------------------------------------------------------------------------------------------------------


def adapter_from_release(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    method: str,
    clip: PreTrainedModel,
    class_names: list[str],
    **fields: Any,
) -> PeftModel:
    """The adapter in a release's checkpoint, `model.pth.tar-N`, on `clip`, in evaluation mode.

    TGP-T's release saves two files, one of its prompt learner and one of its head; pass both. The caller must provide
    what the files do not contain: the base model, `class_names` in the order of the labels, and `fields` of the
    method's config such as `initial_text`, `class_position` or `templates`. Lengths and depths are read from
    the tensors.

    Raises ValueError for a file that is not such a checkpoint, and if names and tensors do not match.

    Example:
        >>> model = hf_tgpt.adapter_from_release("model.pth.tar-50", "coop", clip, ["cat", "dog"])
    """
    files = [files] if isinstance(files, str | os.PathLike) else files
    tensors = {name: value for file in files for name, value in read_checkpoint(file).items()}
    weights = {name: value.float() for name, value in convert_original_state_dict(tensors, method).items()}
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(
                f"{name.removeprefix(_PREFIX)!r} of the checkpoint holds NaN or infinity; use another one."
            )
    kind = config_class(method)
    by_name = {name.removeprefix(_PREFIX): value for name, value in weights.items()}
    sizes = kind.learner_class.fields_of_weights(by_name, class_names)
    model = get_peft_model(clip, kind(class_names=class_names, **(sizes | fields)))
    set_peft_model_state_dict(model, weights)  # which checks that all are there
    return model.eval()


def read_checkpoint(file: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors by name in a checkpoint that torch.save or safetensors wrote.

    A pickle is a program. It is read with `weights_only=True`, which allows tensors and plain containers but no code;
    the state of optimisers and schedulers is read as empty objects. Raises ValueError for a file that holds anything
    else, naming it, or no tensors.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is not a file; correct the path.")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(file)!r} is damaged ({error}); download it again.") from error
    try:
        if zipfile.is_zipfile(file):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        else:
            unsafe = []
            _check_names(file)
        foreign = sorted(name for name in unsafe if not name.startswith(_LEFTOVERS))
        if foreign:
            raise ValueError(
                f"{str(file)!r} holds {', '.join(foreign)}, not only tensors: loading it would run code, so it is not "
                "loaded. If you trust it, save its tensors as safetensors and convert that."
            )
        stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
            (_CONTAINERS.get(name, _Ignored), name) for name in unsafe
        ]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of pickles that it did not write
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle or archive makes torch raise nearly anything
        if type(error) is ValueError and str(file) in str(error):
            raise
        named = re.search(r"GLOBAL ([\w.]+)", str(error))  # in torch's words, amid advice
        reason = f"holds {named[1]}, not only tensors" if named else f"cannot be read ({type(error).__name__})"
        raise ValueError(
            f"{str(file)!r} {reason}; it is damaged or not a released checkpoint. Download it again, or save its "
            "tensors as safetensors and convert that."
        ) from error
    content = content if isinstance(content, dict) else {}
    content = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{str(file)!r} contains no named tensors; a released file has them under 'state_dict'.")
    return tensors


def _check_names(file: Path) -> None:
    """Raises ValueError for an absurdly long name, for which torch would take hours to format its error."""
    with file.open("rb") as stream:
        for _ in range(5):  # torch's old format is this many pickles in a row, followed by bare numbers
            for code, argument, _ in pickletools.genops(stream):
                if code.name == "GLOBAL" and len(str(argument)) > 200:
                    raise ValueError("a name in it is too long")


class _Ignored:
    """Replaces a class in a checkpoint that must not be instantiated."""

    def __init__(self, *args: Any) -> None:
        """Nothing is kept."""

    def __setstate__(self, state: Any) -> None:
        """Nothing is kept."""
