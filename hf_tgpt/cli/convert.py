"""`hf-tgpt convert`: a research release's checkpoint as an adapter folder."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from ..encoders.loading import load_clip
from ..hub.convert import adapter_from_release
from ..methods import config_class
from .loaded import class_names_of
from .output import tidy_output


def main(args: argparse.Namespace) -> int:
    """A release's checkpoint as an adapter folder."""
    tidy_output()
    output = Path(args.output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"`output`={args.output!r} already holds files; choose a new folder.")
    names = class_names_of(args)
    if names is None:
        raise ValueError("A checkpoint does not contain its class names; give `class_names` or `class_names_file`.")
    fields = dict(_field(text, args.method) for text in args.set)
    model = adapter_from_release(args.checkpoint, args.method, load_clip(args.model), names, **fields)
    model.save_pretrained(output)
    if args.json:
        facts = {"output": args.output, "method": args.method, "base_model": args.model, "class_names": names}
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        print(f"{args.method} for {len(names)} classes on {args.model} in {args.output}")
    return 0


def _field(text: str, method: str) -> tuple[str, Any]:
    """FIELD=VALUE, the value as JSON or as bare words. Raises ValueError for a field that the method's config lacks."""
    name, _, value = text.partition("=")
    known = {field.name for field in dataclasses.fields(config_class(method))}
    if name not in known:
        raise ValueError(f"`set`={text!r}: {name!r} is not a field of {method}'s config.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
