"""Labelled pictures and a base model for the commands that train nothing."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..data import find_benchmark, load_splits
from ..data.readers.folders import is_picture, subfolders
from ..data.readers.tables import find_tables
from ..encoders.loading import check_device, load_clip
from ..encoders.precision import read_dtype
from ..inference.encoded import unlabelled
from ..utils.names import TOY_CLIP
from .arguments import base_model_of
from .output import list_remarks
from .predict import find_files


def load_base(args: argparse.Namespace) -> Any:
    """The base model of --model, or training's default for such pictures, on its device."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    name = base_model_of(args.model, args.pictures) or str(TOY_CLIP)
    return load_clip(name, dtype=read_dtype(args.dtype, device)).to(device).eval()


def read_splits(args: argparse.Namespace) -> dict[str, Dataset]:
    """The splits of the data set as they are, after a list of remarks; data without splits are the split ""."""
    with list_remarks():
        splits = load_splits(
            args.pictures,
            args.image_column,
            args.label_column,
            seed=None,
            splits=args.splits,
            class_names_file=args.class_names_file,
            any_names=True,
        )
    benchmark, _ = find_benchmark(args.pictures)
    if list(splits) == ["test"] and not (benchmark and benchmark.only_tested):
        return {"": splits["test"]}
    return dict(splits)


def read_splits_or_files(args: argparse.Namespace) -> tuple[dict[str, Dataset], bool]:
    """The same, and whether labels are known: not for one picture or for a folder without class folders."""
    place = Path(args.pictures)
    flat = place.is_dir() and not args.splits and not subfolders(place) and not find_tables(place)
    if not flat and not is_picture(place):
        return read_splits(args), True
    return unlabelled([os.path.abspath(file) for file in find_files([args.pictures])]), False
