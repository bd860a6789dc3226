"""An adapter's folder: what is in it, and what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..utils.files import file_digest, read_json
from ..utils.version import __version__

# Calibration on held-out pictures (`evaluation.calibration`).
CALIBRATION = "calibration.json"
# The features of the adapter's own classes (`class_features`).
CLASS_FEATURES = "class_features.safetensors"
# The weights of a learner beside PEFT's own adapter, such as the head of 2SFS.
HEAD_WEIGHTS = "head.safetensors"
# Those of a linear probe of version 0.1.0 have a name of their own.
_WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, HEAD_WEIGHTS, "linear_probe.safetensors")


def read_config(folder: str | os.PathLike[str]) -> PeftConfig:
    """The config in an adapter's folder, ours or PEFT's. Raises ValueError if it is missing, damaged or unknown."""
    path = os.path.join(folder, CONFIG_NAME)
    if not os.path.isfile(path):
        raise ValueError(f"There is no adapter in {os.fspath(folder)!r}: {CONFIG_NAME} is missing; correct the path.")
    try:
        method = read_json(path)["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path!r} is damaged ({error!r}); save or download the adapter again.") from error
    if not isinstance(method, str) or method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"{os.fspath(folder)!r} has an adapter of the method {method!r}, which neither hf_tgpt {__version__} nor "
            "another installed package provides; update hf_tgpt, or install the package that it comes from."
        )
    try:
        return PeftConfig.from_pretrained(os.fspath(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The config of {method!r} in {os.fspath(folder)!r} cannot be used ({error}); save or download it again."
        ) from error


def read_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The results of training, results.json; empty if there is none. Raises ValueError if it is damaged."""
    path = os.path.join(folder, "results.json")
    results = read_json(path) if os.path.isfile(path) else {}
    if not isinstance(results, dict):
        raise ValueError(f"{path!r} is not a JSON object; train again, or remove the file.")
    return results


def digest_of_weights(folder: str | os.PathLike[str]) -> str:
    """The digest of the weights in an adapter's folder; empty for a method without weights."""
    files = [Path(folder) / name for name in _WEIGHTS]
    return " ".join(file_digest(file).hex()[:16] for file in files if file.is_file())


def check_weights_file(path: str) -> None:
    """Raises ValueError unless `path` is a readable safetensors file."""
    folder = os.path.dirname(path)
    if not os.path.isfile(path) and os.path.isfile(os.path.join(folder, WEIGHTS_NAME)):
        raise ValueError(
            f"The adapter folder {folder!r} has its weights as {WEIGHTS_NAME}, a pickle, which may run code when it "
            f"is read; get {os.path.basename(path)} instead, which save_pretrained writes."
        )
    if not os.path.isfile(path):
        raise ValueError(
            f"The adapter folder {folder!r} has no {os.path.basename(path)}: it was not written to the end; save the "
            "adapter again. (To read only the config, use PeftConfig.from_pretrained.)"
        )
    try:
        with safe_open(path, framework="pt") as weights:
            weights.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path!r} is damaged ({error}); save or download the adapter again.") from error
