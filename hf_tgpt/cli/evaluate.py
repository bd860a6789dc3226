"""Tests a trained adapter on any data set, beside zero-shot CLIP, without training.

A method that classifies by text uses the data set's own class names. A method with fixed classes must have all of them,
and is scored only among those. On several GPUs: accelerate launch -m hf_tgpt evaluate ...
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import DatasetDict

from ..adapters.class_features import use_class_features
from ..adapters.config import change_config
from ..data import FewShotImages, ImageTransform, choose_classes, class_names, load_splits
from ..encoders.loading import check_picture_size, load_clip, load_image_processor
from ..encoders.precision import read_dtype
from ..evaluation.accuracy import UnknownClasses, evaluate, evaluation_loader, for_classes, measure, predict
from ..evaluation.calibration import read_calibration
from ..evaluation.plots import plot_classes, require_matplotlib
from ..evaluation.published_results import BACKBONE, published_beside, read_published
from ..hub.loading import load_trained
from ..hub.run import base_and_revision, local_folder, results_of
from ..inference.classifier import Classifier
from ..methods.zero_shot import zero_shot_beside
from ..training.recipes import RECIPES_FOLDER
from ..training.results import library_versions
from ..utils.files import write_json
from .arguments import DataArguments, Parser, parser_of
from .loaded import choose_pictures, fields_of
from .options import ADAPTER, add_dtype, add_json, add_set, whole_number
from .output import accuracies, check_own_folder, list_remarks, make_room_for, markdown_table, tidy_output
from .report import REPORT, Tested, write_report

EXAMPLES = """
hf-tgpt evaluate runs/mine --dataset other-pictures --output_dir results/other
hf-tgpt evaluate runs/mine --dataset other-pictures --classes new --picture classes.png
hf-tgpt evaluate runs/my-tgpt-run --dataset pictures --set wise_ft=0.3
"""
_NOTE = "evaluation.json"  # in --output_dir


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Runs the evaluation; `argv` defaults to that of the process.

    Raises UnknownClasses for classes that a method with a fixed list does not have; `--output` then has the reason.
    """
    # 1. Arguments.
    options = parser(prog)
    data, args = options.read(argv)
    args.adapter = args.adapter or args.adapter_option
    if not args.adapter:
        options.error("the adapter is not named: a folder that training wrote, or an id on the Hub")
    data, changes = DataArguments(**vars(data)), fields_of(args.set)
    if args.output:
        make_room_for(args.output)
    if args.output_dir:
        check_own_folder(args.output_dir, _NOTE, "evaluation")
        args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.picture and args.picture.suffix != ".png":
        raise ValueError(f"`picture`={str(args.picture)!r} does not end with .png; name such a file.")
    if args.picture:
        require_matplotlib()

    # 2. The base model that the adapter was trained on, unless another copy of it is named; the test pictures.
    tidy_output()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    start = time.perf_counter()
    folder, published = local_folder(args.adapter, revision=args.revision), []
    if args.compare_with_published:
        rows = read_published(RECIPES_FOLDER / "published.csv")
        published = published_beside(rows, results_of(folder), data.dataset, data.classes)
    model_name, revision = (data.model, None) if data.model else base_and_revision(folder)
    at = {"revision": revision} if revision else {}
    dtype = read_dtype(args.dtype, accelerator.device)
    clip = load_clip(model_name, **at, dtype=dtype).to(accelerator.device).eval()
    transform = ImageTransform.from_processor(load_image_processor(model_name, revision), train=False)
    check_picture_size(clip, transform.size)
    with list_remarks(silent=not accelerator.is_main_process), accelerator.main_process_first():
        splits = load_splits(**data.source, seed=None, skip_damaged=True)
        chosen, seen = choose_pictures(splits, folder, data.dataset, args.seed)
        splits = choose_classes(DatasetDict({"test": chosen}), data.classes)
    names = class_names(splits["test"])
    images = FewShotImages(splits["test"], transform)
    test = evaluation_loader(images, accelerator, args.num_workers)

    # 3. Zero-shot and the adapter on the same pictures.
    results = {"adapter": args.adapter, "dataset": data.dataset, "classes": data.classes, "images": len(images)} | seen
    trained = load_trained(clip, folder)
    classifier = Classifier(trained, transform, read_calibration(folder))
    use_class_features(trained, folder)  # after the classifier, whose eval() discards what is kept
    unchanged = change_config(trained, changes) if changes else {}
    try:
        model = for_classes(trained, names)
    except UnknownClasses as error:
        _write(args.output, results | {"accuracy": None, "refused": str(error)}, accelerator)
        raise
    plain = zero_shot_beside(trained, names, **data.zero_shot_templates(names, args.templates))
    if trained.learner.config.follows_data:  # it uses the templates of each data set
        model = plain
    zero_shot = evaluate(plain, test, accelerator, "zero-shot")
    if changes:
        changed = predict(model, test, accelerator, "testing, changed")
        change_config(trained, unchanged)
    predictions = predict(model, test, accelerator, "testing")
    if changes:
        same = predictions["logits"].argmax(-1) == changed["logits"].argmax(-1)
        results["changed"] = {
            "fields": changes,
            "accuracy": measure(changed)["accuracy"],
            "same_answers": float(same.mean()),
            "largest_difference_of_logits": float(abs(predictions["logits"] - changed["logits"]).max()),
        }

    # 4. Results.
    adapted = measure(predictions)
    calibration = classifier.calibration_for(names)
    if calibration is not None:
        results["temperature"], before = calibration.temperature, adapted["expected_calibration_error"]
        scaled = predictions | {"logits": predictions["logits"] / calibration.temperature}
        adapted = measure(scaled) | {"uncalibrated_error": before}
    if published:
        results["published"] = [{name: row[name] for name in ("method", "accuracy", "source")} for row in published]
    results |= {"zero_shot_accuracy": zero_shot["accuracy"], **adapted}
    results["seconds"] = round(time.perf_counter() - start, 1)
    _write(args.output, results, accelerator)
    if args.output_dir and accelerator.is_main_process:
        _write(args.output_dir / _NOTE, results, accelerator)
        tested = Tested(
            title=f"{args.adapter} on {data.dataset}",
            results=results,
            zero_shot=zero_shot,
            logits=predictions["logits"],
            labels=predictions["labels"],
            class_names=names,
            pictures=splits["test"],
            classifier=classifier,
            calibration=calibration,
            command=["evaluate", *(sys.argv[1:] if argv is None else argv)],
            settings={"base model": model_name, "classes": data.classes} | library_versions(),
        )
        write_report(args.output_dir, tested)
    if args.picture and accelerator.is_main_process:
        plot_classes(args.picture, names, zero_shot, adapted, predictions["logits"].argmax(-1), predictions["labels"])
    if args.json:
        accelerator.print(json.dumps(results, indent=2, ensure_ascii=False))
    else:
        accelerator.print(_in_words(results, model_name, len(names)))
        if args.output_dir:
            accelerator.print(f"What it gets wrong: {args.output_dir / REPORT}")
    accelerator.end_training()


def parser(prog: str | None = None) -> Parser:
    """The command's parser."""
    parser = parser_of(
        DataArguments,
        "base model and images",
        prog=prog,
        description=__doc__,
        usage="%(prog)s ADAPTER [options]",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("adapter", nargs="?", help=ADAPTER)
    add("--adapter", dest="adapter_option", help=argparse.SUPPRESS)  # the spelling before it became positional
    add("--revision", help="the adapter's branch, tag or commit on the Hub")
    add_set(parser, "--change")
    add(
        "--templates",
        nargs="+",
        help="templates for zero-shot (default: those of a known data set, or 'a photo of a {}.')",
    )
    add("--seed", type=whole_number, help="seed for splitting data without a test split (default: test "
        "the held-out pictures of the run's own data, and all of other data)")  # fmt: skip
    add("--num_workers", type=whole_number, default=0, help="processes that decode images")
    add_dtype(parser)
    add("--mixed_precision", choices=["no", "bf16", "fp16"], help="(default: as configured in accelerate)")
    add("--compare_with_published", action="store_true", help="also print published accuracies for the same training "
        "and test (hf_tgpt/recipes/published.csv)")  # fmt: skip
    add("--picture", type=Path, help="a .png file for a plot of the change of each class and the confusion matrix")
    add("--output_dir", type=Path, help="a folder, new or from an earlier evaluation, for report.html, on what "
        "the adapter gets wrong, predictions.csv and evaluation.json (default: no report)")  # fmt: skip
    add("--output", type=Path, help="a JSON file for the results (default: they are only printed)")
    add_json(parser)
    parser.lead_with("dataset", "classes", "picture", "output", "output_dir", "json")
    return parser


def _write(file: Path | None, results: dict[str, Any], accelerator: Accelerator) -> None:
    if file and accelerator.is_main_process:
        write_json(file, results | {"versions": library_versions()})


def _in_words(results: dict[str, Any], model_name: str, classes: int) -> str:
    about = f"{results['adapter']} on {results['dataset']}"
    lines = [f"{about}, {results['classes']} classes ({classes}), {results['images']} pictures", accuracies(results)]
    if "temperature" in results:
        before, after = results["uncalibrated_error"], results["expected_calibration_error"]
        lines.append(f"{'calibration error':20} {after:.3f} ({before:.3f} before calibration)")
    if changed := results.get("changed"):
        fields = " ".join(f"{name}={value}" for name, value in changed["fields"].items())
        lines.append(
            f"with {fields}: {changed['accuracy']:.3f}, {changed['same_answers']:.1%} of the answers as before, "
            f"logits up to {changed['largest_difference_of_logits']:.2g} apart"
        )
    if published := results.get("published"):
        rows = [[f"measured: {results['adapter']} on {model_name}", f"{100 * results['accuracy']:.2f}", "this run"]]
        rows += [[f"{row['method']} on {BACKBONE}", f"{row['accuracy']:.2f}", row["source"]] for row in published]
        lines += ["", *markdown_table(["", "accuracy, percent", "source"], rows)]
    return "\n".join(lines)
