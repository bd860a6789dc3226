"""`hf-tgpt export`: ONNX, with int8 beside it if asked for, or plain transformers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..data import FewShotImages, class_names, load_splits
from ..encoders.precision import AUTO
from ..hub.run import local_folder
from ..inference.onnx import export_onnx, onnx_accuracy, quantize_onnx
from ..inference.plain_transformers import export_transformers
from ..utils.files import read_json, write_json
from .loaded import choose_pictures, class_names_of, classifier_of
from .output import list_remarks, tidy_output


def main(args: argparse.Namespace) -> int:
    """Writes the model and prints a summary."""
    tidy_output()
    if args.int8 and args.format != "onnx":
        raise ValueError("`int8` is only for ONNX; leave it out, or choose --format onnx.")
    if args.int8 and args.dtype != "fp32":
        raise ValueError(f"`dtype`={args.dtype!r}: int8 is made from float32; leave out `int8` or `dtype`.")
    if args.format == "onnx" and args.dtype == AUTO:
        args.dtype = "fp32"  # what is faster here says nothing about ONNX Runtime elsewhere
    classifier = classifier_of(args)
    if args.format == "transformers":
        snippet = export_transformers(classifier, args.output, class_names_of(args))
        print(
            json.dumps({"output": args.output}) if args.json else f"Written to {args.output}; to use it:\n\n{snippet}"
        )
        return 0
    labels = class_names_of(args) or classifier.class_names
    if args.int8:
        with list_remarks():
            splits = load_splits(args.int8, seed=None, skip_damaged=True)
            test, _ = choose_pictures(splits, local_folder(args.adapter, revision=args.revision), args.int8)
        if class_names(test) != labels:
            raise ValueError(
                f"`int8`={args.int8!r} has other classes than the model, or another order of them; name the data "
                "set's by `class_names_file`, or choose another data set."
            )
    facts = {"output": args.output} | export_onnx(classifier, args.output, labels)
    if args.int8:
        small = str(Path(args.output).with_suffix(".int8.onnx"))
        quantize_onnx(args.output, small)
        images = FewShotImages(test, classifier.transform)
        facts["accuracy"], facts["int8_accuracy"] = onnx_accuracy(args.output, images), onnx_accuracy(small, images)
        facts |= {"int8_output": small, "images": len(images)}
        measured = {name: facts[name] for name in ("accuracy", "int8_accuracy", "images")} | {"dataset": args.int8}
        note = Path(args.output).with_suffix(".json")
        write_json(note, read_json(note) | {"int8": measured})
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{args.output} for {len(facts['labels'])} classes; labels and preprocessing: {Path(args.output).stem}.json")
    if args.int8:
        change = facts["int8_accuracy"] - facts["accuracy"]
        print(f"{small}: accuracy {facts['int8_accuracy']:.3f}, {change:+.3f} on {facts['images']} pictures")
    return 0
