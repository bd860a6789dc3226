"""Loads an adapter and its data for the commands that use one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from ..adapters.config import change_config
from ..data.class_lists import read_class_names
from ..data.duplicates import digests
from ..data.fewshot import split_each_class
from ..data.looks import picture_names
from ..data.remarks import count, remark
from ..hub.run import is_cut_off, local_folder, results_of, seen_pictures
from ..inference.classifier import Classifier
from ..inference.loading import load_classifier
from ..utils.files import read_json
from .arguments import DataArguments
from .output import list_remarks


def classifier_of(args: argparse.Namespace) -> Classifier:
    """The adapter on its base model, changed by --set; warns if its training was interrupted."""
    with list_remarks():
        remark_on_cut_off(local_folder(args.adapter, revision=args.revision))
    precision = {"dtype": args.dtype} if "dtype" in args else {}
    classifier = load_classifier(args.adapter, args.device, base_model=args.model, revision=args.revision, **precision)
    if args.set:
        change_config(classifier.model, fields_of(args.set))
    return classifier


def fields_of(changes: Sequence[str]) -> dict[str, str]:
    """The fields in --set, FIELD=VALUE. Raises ValueError for anything else."""
    for change in changes:
        if "=" not in change:
            raise ValueError(f"`fields`: {change!r} is not of the form FIELD=VALUE; write it so, without spaces.")
    return dict(change.partition("=")[::2] for change in changes)


def class_names_of(args: argparse.Namespace) -> list[str] | None:
    """The class names in the arguments, if any."""
    if args.class_names_file is None:
        return args.class_names
    names = read_class_names(args.class_names_file)
    return list(names.values()) if isinstance(names, dict) else names


def data_of_run(folder: str, given: dict[str, Any]) -> DataArguments:
    """The arguments for the data, with missing ones from the run; all of the run's for the run's own data."""
    note = Path(folder) / "run.json"
    settings = read_json(note) if note.is_file() else {}
    settings = {name: value for name, value in (results_of(folder) | settings).items() if name in given}
    if given["dataset"] is None and not settings.get("dataset"):
        raise ValueError(
            f"`dataset`=None, and {folder!r} does not record which pictures it was trained on; name pictures that it "
            "was not trained on."
        )
    if given["dataset"] not in (None, settings.get("dataset")):
        settings = {}
    chosen = settings | {"model": None} | {name: value for name, value in given.items() if value is not None}
    return DataArguments(**{"classes": "all"} | chosen)


def remark_on_cut_off(folder: str) -> None:
    """Warns about an adapter whose training was interrupted."""
    if is_cut_off(folder):
        remark(f"The training in {folder} was interrupted; continue with `hf-tgpt train --resume`.")


def training_pictures(splits: DatasetDict, folder: str) -> Dataset:
    """The pictures of `load_splits`, with `seed`=None, that a run trained on; none if it has no record."""
    pictures, seen = splits.get("train", splits["test"]), seen_pictures(folder)
    return pictures.select([row for row, digest in enumerate(digests(pictures)) if seen.get(digest) == "train"])


def choose_pictures(
    splits: DatasetDict, folder: str, dataset: str, seed: int | None = None
) -> tuple[Dataset, dict[str, Any]]:
    """The pictures to test a run's adapter with, and the names of those that it has seen in training.

    `splits` are those of `load_splits` with `seed`=None. Data with a test split use it. For other data it is what the
    run held out if they are the run's own, and everything if they are not; `seed` splits any data. Remarks on pictures
    that the run has seen, or if that is unknown.
    """
    tested, seen, about = splits["test"], seen_pictures(folder), results_of(folder)
    remark_on_cut_off(folder)
    if "train" not in splits and seed is not None:
        tested = split_each_class(tested, seed)["test"]
    elif "train" not in splits and seen:
        content = digests(tested)
        in_training = {digest for digest, split in seen.items() if split != "test"}
        if 2 * len(in_training.intersection(content)) >= len(in_training):
            held_out = [row for row, digest in enumerate(content) if seen.get(digest) == "test"]
            remark(
                f"These are the run's own pictures: the {len(held_out)} of {len(content)} that it held out are tested."
            )
            tested = tested.select(held_out)
    elif "train" not in splits and about.get("dataset") == dataset:
        tested = split_each_class(tested, about["seed"])["test"]
    if not seen:
        remark(f"{folder} does not record which pictures it was trained on, so some of these may be among them.")
        return tested, {}
    named = zip(picture_names(tested), digests(tested), strict=True)
    known = [name for name, digest in named if seen.get(digest, "test") != "test"]
    if known:
        shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        words = count(len(known), "picture")
        remark(f"{words} also in the training data, so the accuracy is too high: {shown}.")
    return tested, {"seen_in_training": known}
