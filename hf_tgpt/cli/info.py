"""`hf-tgpt info`: shows what is in an adapter, without its base model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from ..adapters.config import PEFT_FIELDS, PromptConfig
from ..adapters.folder import HEAD_WEIGHTS, check_weights_file, read_config
from ..adapters.peft_towers import NOTE
from ..evaluation.calibration import read_calibration
from ..hub.old_formats import PROBE_WEIGHTS, read_note
from ..hub.run import local_folder, results_of
from ..methods import config_class
from ..utils.names import in_a_line
from .output import tidy_output

# Fields of a config that mean nothing to users, or are shown elsewhere.
_INNER = {"class_names", "base_model_dimensions", "base_model_fingerprint"}


def main(args: argparse.Namespace) -> int:
    """Prints what an adapter contains, without loading its base model."""
    tidy_output()
    facts = describe_adapter(args.adapter)
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    names = facts["class_names"]
    some = in_a_line(names[:10]) + (f", ... (--json lists all {len(names)})" if len(names) > 10 else "")
    print(f"method                     {facts['method']}\nbase model                 {facts['base_model']}")
    print(f"classes                    {len(names)}, {facts['class_list']} list: {some}")
    print(f"parameters                 {facts['parameters']:,} in {facts['bytes']:,} bytes")
    for name, value in facts["config"].items():
        print(f"{name:<26} {json.dumps(value, ensure_ascii=False)}")
    if calibration := facts.get("calibration"):
        print(f"calibration                temperature {calibration['temperature']:.3g}, by {calibration['pictures']}")
    for name, value in facts.get("results", {}).items():
        if isinstance(value, str | int | float):
            print(f"{name:<26} {value}")
    return 0


def describe_adapter(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Method, base model, classes, config, tensors and results of an adapter. Raises ValueError if there is none."""
    folder = Path(local_folder(name_or_path))
    if not folder.is_dir():
        raise ValueError(f"There is no adapter in {os.fspath(name_or_path)!r}; correct the path or the id.")
    facts: dict[str, Any]
    if (folder / NOTE).is_file():
        note = read_note(folder)
        config = config_class(note["method"])(class_names=note["class_names"], **note["config"])
        facts = {name: note[name] for name in ("method", "base_model", "class_names", "config")}
    else:
        config = read_config(folder)
        if not isinstance(config, PromptConfig):
            raise ValueError(
                f"{str(folder)!r} contains an adapter of PEFT's own ({config.peft_type.value}), not of this package."
            )
        own = {field.name for field in dataclasses.fields(config)} - PEFT_FIELDS
        values = {name: getattr(config, name) for name in sorted(own - _INNER)}
        facts = {"method": config.method.lower(), "base_model": config.base_model_name_or_path}
        facts |= {"class_names": config.class_names, "config": values}
    files = [folder / name for name in (SAFETENSORS_WEIGHTS_NAME, HEAD_WEIGHTS, PROBE_WEIGHTS)]
    files = [file for file in files if file.is_file()]
    tensors: dict[str, list[int]] = {}
    for file in files:
        check_weights_file(str(file))
        with safe_open(file, framework="numpy") as weights:
            tensors |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    facts |= {"class_list": "open" if config.takes_new_classes else "closed", "tensors": tensors}
    facts["parameters"] = sum(math.prod(shape) for shape in tensors.values())
    facts["bytes"] = sum(file.stat().st_size for file in files)
    if calibration := read_calibration(folder):
        facts["calibration"] = {name: getattr(calibration, name) for name in ("temperature", "pictures", "strangers")}
    if (folder / "results.json").is_file():
        facts["results"] = results_of(folder)
    return facts
