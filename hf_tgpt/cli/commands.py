"""What the commands of `hf-tgpt` do; their arguments are in `hf_tgpt_cli.py`. Each returns the exit status."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from tqdm.auto import tqdm

from ..adapters.config import PEFT_FIELDS, PromptConfig, check_weights_file, read_config
from ..hub.convert import adapter_from_release
from ..data.class_lists import read_class_names
from ..adapters.learner import OpenPromptLearner
from ..hub.loading import load_clip, local_folder, results_of
from ..inference.classifier import Answer, Classifier, load_classifier
from ..methods.references import NOTE, REFERENCES, read_note
from ..adapters.registry import config_class
from ..training.results import tidy_output

SOME_SKIPPED = 3
URLS = ("http://", "https://")
# Fields of a config that say nothing to people, or are told elsewhere.
_INNER = {"class_names", "base_model_dimensions", "base_model_fingerprint"}


def predict(args: argparse.Namespace) -> int:
    """A line for each picture that can be read; the others are counted and named on stderr."""
    tidy_output()
    files = find_files(args.images)
    kind = args.format or ("csv" if Path(args.output or "").suffix.lower() == ".csv" else "jsonl")
    classifier = _classifier(args)
    skipped: list[tuple[str, ValueError]] = []
    bar = tqdm(total=len(files), desc="predicting", unit=" images", disable=None)  # None: only on a terminal

    def skip(image: str, error: ValueError) -> None:
        skipped.append((image, error))
        bar.update()

    names = _class_names(args)
    answers = classifier.stream(files, args.top_k, class_names=names, batch_size=args.batch_size, skip=skip)
    columns = min(args.top_k, len(names or classifier.class_names))
    with bar, _output(args.output) as file:
        write = _csv_writer(file, columns) if kind == "csv" else _jsonl_writer(file)
        for image, answer in answers:
            write(image, answer)
            bar.update()
    if skipped:
        print(f"{len(skipped)} of {len(files)} files could not be read and were skipped:", file=sys.stderr)
        for _, error in skipped:
            print(f"  {error}", file=sys.stderr)
    return SOME_SKIPPED if skipped else 0


def demo(args: argparse.Namespace) -> int:
    """A web page, until Ctrl-C."""
    from ..inference.demo import Demonstration, listen, make_page, require_gradio, serve

    tidy_output()
    require_gradio()
    with listen(args.host, args.port) as listener:
        title = Path(args.adapter).resolve().name if os.path.isdir(args.adapter) else args.adapter
        page = make_page(Demonstration(_classifier(args)), title)
        host, port = listener.getsockname()[:2]
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends it)", flush=True)
        serve(page, listener)
    return 0


def info(args: argparse.Namespace) -> int:
    """What is in an adapter, without loading its base model."""
    tidy_output()
    facts = describe_adapter(args.adapter)
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    names = facts["class_names"]
    some = ", ".join(names[:10]) + (f", ... (--json lists all {len(names)})" if len(names) > 10 else "")
    print(f"method                     {facts['method']}\nbase model                 {facts['base_model']}")
    print(f"classes                    {len(names)}, {facts['class_list']} list: {some}")
    print(f"parameters                 {facts['parameters']:,} in {facts['bytes']:,} bytes")
    for name, value in facts["config"].items():
        print(f"{name:<26} {json.dumps(value, ensure_ascii=False)}")
    for name, value in facts.get("results", {}).items():
        if isinstance(value, str | int | float):
            print(f"{name:<26} {value}")
    return 0


def export(args: argparse.Namespace) -> int:
    """ONNX, with int8 beside it if asked for, or plain transformers."""
    from ..data import FewShotImages, load_splits
    from ..data.sources import class_names as names_of
    from ..inference.onnx import export_onnx, export_transformers, onnx_accuracy, quantize_onnx

    tidy_output()
    if args.int8 and args.format != "onnx":
        raise ValueError("`--int8` is a form of ONNX; leave it out or choose `--format onnx`.")
    classifier = _classifier(args)
    if args.format == "transformers":
        snippet = export_transformers(classifier, args.output, _class_names(args))
        print(
            json.dumps({"output": args.output}) if args.json else f"Written to {args.output}; to use it:\n\n{snippet}"
        )
        return 0
    labels = _class_names(args) or classifier.class_names
    if args.int8:
        test = load_splits(args.int8)["test"]
        if names_of(test) != labels:
            raise ValueError(
                f"`--int8`={args.int8!r} has other classes than the model, or another order of them; name the data "
                "set's by `--class_names_file`, or choose another data set."
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
        note.write_text(json.dumps(json.loads(note.read_text()) | {"int8": measured}, indent=2) + "\n")
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{args.output} for {len(facts['labels'])} classes; how to feed it is in {Path(args.output).stem}.json")
    if args.int8:
        change = facts["int8_accuracy"] - facts["accuracy"]
        print(f"{small}: accuracy {facts['int8_accuracy']:.3f}, {change:+.3f} on {facts['images']} pictures")
    return 0


def convert(args: argparse.Namespace) -> int:
    """A release's checkpoint as an adapter folder."""
    tidy_output()
    output = Path(args.output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"`output`={args.output!r} already holds files; choose a new folder.")
    names = _class_names(args)
    if names is None:
        raise ValueError("A checkpoint does not hold its class names; give `--class_names` or `--class_names_file`.")
    fields = dict(_field(text, args.method) for text in args.set)
    model = adapter_from_release(args.checkpoint, args.method, load_clip(args.model), names, **fields)
    model.save_pretrained(output)
    if args.json:
        facts = {"output": args.output, "method": args.method, "base_model": args.model, "class_names": names}
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        print(f"{args.method} for {len(names)} classes on {args.model} in {args.output}")
    return 0


def describe_adapter(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Method, base model, classes, config, tensors and results of an adapter or reference.

    Raises ValueError for a folder that is neither.
    """
    folder = Path(local_folder(name_or_path))
    if not folder.is_dir():
        raise ValueError(f"There is no adapter in {os.fspath(name_or_path)!r}; correct the path or the id.")
    facts: dict[str, Any]
    if (folder / NOTE).is_file():
        note = read_note(folder)
        takes_new, facts = REFERENCES[note["method"]].takes_new_classes, {"method": note["method"]}
        facts |= {name: note[name] for name in ("base_model", "class_names", "config")}
    else:
        config = read_config(folder)
        if not isinstance(config, PromptConfig):
            raise ValueError(
                f"{str(folder)!r} holds a {config.peft_type} adapter, which is PEFT's own and not of here."
            )
        takes_new = issubclass(config.learner_class, OpenPromptLearner) and not getattr(config, "class_specific", False)
        own = {field.name for field in dataclasses.fields(config)} - PEFT_FIELDS
        values = {name: getattr(config, name) for name in sorted(own - _INNER)}
        facts = {"method": config.method.lower(), "base_model": config.base_model_name_or_path}
        facts |= {"class_names": config.class_names, "config": values}
    files = [folder / name for name in (SAFETENSORS_WEIGHTS_NAME, "linear_probe.safetensors")]
    files = [file for file in files if file.is_file()]
    tensors: dict[str, list[int]] = {}
    for file in files:
        check_weights_file(str(file))
        with safe_open(file, framework="numpy") as weights:
            tensors |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    facts |= {"class_list": "open" if takes_new else "closed", "tensors": tensors}
    facts["parameters"] = sum(_product(shape) for shape in tensors.values())
    facts["bytes"] = sum(file.stat().st_size for file in files)
    if (folder / "results.json").is_file():
        facts["results"] = results_of(folder)
    return facts


def find_files(paths: list[str]) -> list[str]:
    """All files in folders, at any depth and in the order of their names, without hidden ones; files and URLs as named.

    Raises ValueError for a path that does not exist and where there is no file.
    """
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            for folder, folders, files in os.walk(path):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                found += [os.path.join(folder, name) for name in sorted(files) if not name.startswith(".")]
        elif os.path.exists(path) or path.startswith(URLS):
            found.append(path)
        else:
            raise ValueError(f"{path!r} does not exist; correct the path.")
    if not found:
        raise ValueError(f"There is no file in {', '.join(paths)}.")
    return found


def _product(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _classifier(args: argparse.Namespace) -> Classifier:
    return load_classifier(args.adapter, args.device, base_model=args.model, revision=args.revision)


def _class_names(args: argparse.Namespace) -> list[str] | None:
    if args.class_names_file is None:
        return args.class_names
    names = read_class_names(args.class_names_file)
    return list(names.values()) if isinstance(names, dict) else names


def _field(text: str, method: str) -> tuple[str, Any]:
    """FIELD=VALUE, the value as JSON or as bare words. Raises ValueError for a field that the method's config lacks."""
    name, _, value = text.partition("=")
    known = {field.name for field in dataclasses.fields(config_class(method))}
    if name not in known:
        raise ValueError(f"`--set` {text!r}: {name!r} is no field of {method}'s config.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@contextmanager
def _output(path: str | None) -> Iterator[TextIO]:
    """stdout, or a file that has its name when it is whole."""
    if path is None:
        yield sys.stdout
        return
    if os.path.isdir(path):
        raise ValueError(f"`--output`={path!r} is a folder; name a file.")
    draft = Path(path).with_name(Path(path).name + ".part")
    draft.parent.mkdir(parents=True, exist_ok=True)
    with draft.open("w", encoding="utf-8", newline="") as file:
        yield file
    os.replace(draft, path)


def _jsonl_writer(file: TextIO) -> Callable[[str, Answer], None]:
    def write(image: str, answer: Answer) -> None:
        row = {"image": image, **answer[0], "top_k": answer}
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()

    return write


def _csv_writer(file: TextIO, columns: int) -> Callable[[str, Answer], None]:
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(
        ["image", "label", "score", *(f"{name}_{i}" for i in range(2, columns + 1) for name in ("label", "score"))]
    )

    def write(image: str, answer: Answer) -> None:
        rows.writerow([image, *(value for part in answer for value in (part["label"], part["score"]))])
        file.flush()

    return write
