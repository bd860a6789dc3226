"""Calibrates a trained adapter with pictures that it was not trained on, and writes calibration.json beside it.

After that its probabilities can be trusted, `predict --coverage 0.9` answers with as many classes as that needs, and
`predict --reject` detects pictures of none of them. By default the pictures are the validation split of the run's own
data; without one, a head on frozen features is cross-validated on its training pictures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict

from ..adapters.class_features import use_class_features
from ..adapters.config import change_config
from ..adapters.feature_head import FeatureHead
from ..adapters.folder import CALIBRATION, digest_of_weights
from ..adapters.tower_classifier import AdaptedModel
from ..data import FewShotImages, ImageTransform, choose_classes, class_names, load_splits
from ..data.duplicates import digests
from ..data.fewshot import replace_labels
from ..data.read_ahead import read_batches
from ..data.remarks import count, remark
from ..encoders.loading import check_device, check_picture_size, load_clip, load_image_processor
from ..encoders.precision import read_dtype
from ..evaluation.accuracy import evaluation_loader, predict
from ..evaluation.calibration import KEPT, Calibration, calibrate, settings_of
from ..evaluation.metrics import classification_metrics
from ..hub.loading import load_trained
from ..hub.run import base_and_revision, seen_pictures
from ..inference.pictures import load_image
from ..training.held_out import cross_validated
from ..utils.names import composed
from .arguments import DataArguments, Parser, parser_of
from .loaded import data_of_run, fields_of, remark_on_cut_off, training_pictures
from .options import add_dtype, add_json, add_set, share
from .output import list_remarks, tidy_output
from .predict import find_files

EXAMPLES = """
hf-tgpt calibrate runs/mine --dataset pictures
hf-tgpt calibrate runs/mine --dataset pictures --reject 0.9 --unknown other-pictures
"""
_SHOWN = 0.9  # the coverage whose answers are described


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Runs the calibration; `argv` defaults to that of the process."""
    data, args = parser(prog).read(argv)
    tidy_output()
    folder = os.path.expanduser(args.adapter)
    if not os.path.isdir(folder):
        raise ValueError(f"{args.adapter!r} is no folder here, and the calibration is written beside the adapter; "
                         "name the folder of a run.")  # fmt: skip
    data = data_of_run(folder, vars(data))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    accelerator = Accelerator(cpu=device == "cpu")
    name, revision = (data.model, None) if data.model else base_and_revision(folder)
    precision = read_dtype(args.dtype, device)
    clip = load_clip(name, **({"revision": revision} if revision else {}), dtype=precision).to(device).eval()
    transform = ImageTransform.from_processor(load_image_processor(name, revision), train=False)
    check_picture_size(clip, transform.size)
    model = load_trained(clip, folder)
    use_class_features(model, folder)
    if args.set:
        change_config(model, fields_of(args.set))
    with list_remarks():
        remark_on_cut_off(folder)
        splits = choose_classes(load_splits(**data.source, seed=None, skip_damaged=True), data.classes)
        held_out = held_out_pictures(splits, folder)
        if held_out is None:
            training = training_pictures(splits, folder)
            if not isinstance(model.learner, FeatureHead) or not len(training):
                raise ValueError(
                    f"`dataset`={data.dataset!r} has no pictures that the adapter was not trained on: no validation "
                    "split; name others, such as a folder with a folder of pictures for each class."
                )
            remark(
                "There is no validation split, so the training pictures are cross-validated: each is judged by an "
                "adapter that was fitted to the others."
            )
        strangers = _logits_of_files(model, args.unknown, transform) if args.unknown else None
    if held_out is None:
        logits, labels = cross_validated(model, FewShotImages(_relabelled(training, model), transform))
        what = f"cross-validation on {len(labels)} training pictures"
    else:
        images = FewShotImages(_relabelled(held_out, model), transform)
        found = predict(model, evaluation_loader(images, accelerator), accelerator, "calibrating")
        logits, labels = torch.from_numpy(found["logits"]), torch.from_numpy(found["labels"])
        what = f"{len(labels)} held-out pictures"
    calibration = calibrate(
        logits, labels, model.class_names, unknown=strangers, kept=KEPT if args.reject is None else args.reject,
        pictures=what, settings=settings_of(model.learner.config), weights=digest_of_weights(folder),
    )  # fmt: skip
    calibration.save(folder)
    facts = {"output": str(Path(folder) / CALIBRATION)} | describe(calibration, logits, labels, model.class_names)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else _in_words(facts))


def held_out_pictures(splits: DatasetDict, folder: str) -> Dataset | None:
    """The pictures to calibrate a run's adapter with, none of which it was trained on; None if there are none.

    `splits` are those of `load_splits` with `seed`=None. The validation split is used. Without one, it is what the run
    held out for validation if these are the run's own pictures, and the test split if they are not.
    """
    seen = seen_pictures(folder)
    pictures = splits.get("validation")
    if pictures is None:
        content = {digest for data in splits.values() for digest in digests(data)}
        in_training = {digest for digest, split in seen.items() if split != "test"}
        pictures = splits["test"]
        if seen and 2 * len(in_training & content) >= len(in_training):
            rows = [row for row, digest in enumerate(digests(pictures)) if seen.get(digest) == "validation"]
            pictures = pictures.select(rows)
        elif "train" in splits:
            remark("There is no validation split: the test split is used, so test the adapter on other pictures.")
    if not seen:
        remark(f"{folder} does not record which pictures it was trained on, so some of these may be among them.")
    new = [row for row, digest in enumerate(digests(pictures)) if seen.get(digest) != "train"]
    if left_out := len(pictures) - len(new):
        remark(f"{count(left_out, 'picture')} left out, since the adapter was trained on them.")
    return pictures.select(new) if new else None


def describe(
    calibration: Calibration, logits: torch.Tensor, labels: torch.Tensor, class_names: list[str]
) -> dict[str, Any]:
    """What a calibration reports about the pictures that it was made with."""
    before, after = (
        classification_metrics(values.double().numpy(), labels.numpy())["expected_calibration_error"]
        for values in (logits, calibration.scaled(logits))
    )
    number = calibration.count
    facts: dict[str, Any] = {"pictures": calibration.pictures, "images": number}
    facts |= {"temperature": calibration.temperature, "error_before": before, "error_after": after}
    facts["largest_coverage"] = calibration.largest_coverage
    if facts["largest_coverage"] >= _SHOWN:
        facts["mean_labels"] = float(calibration.answers(logits, class_names, _SHOWN).sum(-1).double().mean())
    return facts | {
        "kept": calibration.kept, "reject_below": calibration.reject_below, "strangers": calibration.strangers
    }  # fmt: skip


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
    parser.set_defaults(dataset=None, classes=None)
    for action in parser._actions:
        if action.dest in ("dataset", "classes"):
            action.help = f"{action.help} (default: the run's own)"
    parser.add_argument("adapter", help="a folder that training wrote")
    add_dtype(parser)
    parser.add_argument(
        "--reject", type=share, nargs="?", const=KEPT, metavar="SHARE",
        help=f"share of right answers to keep when pictures of none of the classes are rejected (default: {KEPT})"
    )  # fmt: skip
    parser.add_argument(
        "--unknown", metavar="FOLDER", help="pictures of none of the classes, to measure how well they are told apart"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    add_set(parser)
    add_json(parser)
    parser.lead_with("dataset", "reject", "unknown", "json")
    return parser


def _relabelled(pictures: Dataset, model: AdaptedModel) -> Dataset:
    """The pictures, with labels as the model numbers its classes."""
    numbers = {composed(name): number for number, name in enumerate(model.class_names)}
    names = class_names(pictures)
    labels = pictures["label"][:]
    unknown = sorted({names[label] for label in labels if composed(names[label]) not in numbers})
    if unknown:
        raise ValueError(
            f"`dataset` has pictures of {unknown[0]!r} ({len(unknown)} such classes), which is no class of the "
            "adapter; leave them out, or rename the classes by `class_names_file`."
        )
    return replace_labels(pictures, np.array([numbers[composed(names[label])] for label in labels]), model.class_names)


@torch.inference_mode()
def _logits_of_files(model: AdaptedModel, folder: str, transform: ImageTransform) -> torch.Tensor:
    """Logits (m, c) of all pictures in a folder that can be read."""

    def read(path: str) -> torch.Tensor | ValueError:
        try:
            return transform(load_image(path))
        except ValueError as error:
            return error

    found, device = [], next(model.parameters()).device
    for batch in read_batches(read, find_files([folder]), 32):
        for _, pixels in batch:
            if isinstance(pixels, ValueError):
                remark(str(pixels))
            else:
                found.append(model(pixels[None].to(device)).logits.float().cpu())
    if not found:
        raise ValueError(f"`unknown`={folder!r} has no picture that can be read; name another folder.")
    return torch.cat(found)


def _in_words(facts: dict[str, Any]) -> str:
    lines = {
        "made with": facts["pictures"],
        "temperature": f"{facts['temperature']:.3g}",
        "calibration error": f"{facts['error_before']:.3f} before, {facts['error_after']:.3f} after, on these pictures",
        "coverage": f"{facts['largest_coverage']:.3f} at most, in steps of 1/{facts['images'] + 1}",
    }
    if "mean_labels" in facts:
        lines["coverage"] += f"; {_SHOWN} takes {facts['mean_labels']:.1f} classes per answer"
    below = facts["reject_below"]
    kept = f"{facts['kept']} of the right answers"
    lines["none of these"] = f"keeps {kept}" if below is not None else f"too few right answers to keep {kept}"
    if strangers := facts["strangers"]:
        lines["strangers"] = (
            f"AUROC {strangers['auroc']:.3f}, FPR95 {strangers['fpr95']:.3f} on {strangers['pictures']} pictures"
        )
    return "\n".join([facts["output"], *(f"{name:20} {value}" for name, value in lines.items())])
