"""`hf-tgpt embed`: the image features of pictures, for other programs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.images import ImageTransform
from ..encoders.loading import check_picture_size, load_image_processor
from ..inference.encoded import encode_splits
from ..inference.loading import load_classifier
from ..methods.zero_shot import zero_shot_beside
from ..utils.files import put_in_place
from .output import make_room_for, tidy_output
from .pictures import load_base, read_splits_or_files
from .predict import SOME_SKIPPED

_SUFFIXES = (".npz", ".parquet")


def main(args: argparse.Namespace) -> int:
    """Writes a row for each picture that can be read, and lists the others on stderr."""
    tidy_output()
    output = Path(args.output)
    if output.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"`output`={args.output!r} ends with neither .npz nor .parquet; name such a file.")
    make_room_for(output)
    splits, labelled = read_splits_or_files(args)
    model, transform = _tower(args)
    encoded = encode_splits(splits, model, transform, num_workers=args.num_workers)
    names = next(iter(splits.values())).features["label"].names
    columns: dict[str, Any] = {
        "file": [encoded.looks[row].file for row in encoded.readable],
        "label": [names[encoded.labels[row]] if labelled else None for row in encoded.readable],
        "split": [encoded.splits[row] or None for row in encoded.readable],
    }
    _write(output, columns, encoded.features.numpy())
    skipped = [f"{look.file} ({look.problem})" for look in encoded.looks if look.problem]
    if skipped:
        print(f"{len(skipped)} of {len(encoded.looks)} files could not be read and were skipped:", file=sys.stderr)
        print("\n".join(f"  {each}" for each in skipped), file=sys.stderr)
    facts = {"output": args.output, "pictures": len(encoded.readable), "width": encoded.features.shape[1]}
    facts |= {"labelled": labelled, "skipped": len(skipped)}
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        print(f"{facts['pictures']} pictures, {facts['width']} numbers of each, are in {args.output}")
    return SOME_SKIPPED if skipped else 0


def _tower(args: argparse.Namespace) -> tuple[Any, ImageTransform]:
    """The model whose image tower is used, and its image transform."""
    if args.adapter:
        classifier = load_classifier(args.adapter, args.device, base_model=args.model, dtype=args.dtype)
        return classifier.model, classifier.transform
    clip = load_base(args)
    transform = ImageTransform.from_processor(load_image_processor(clip.name_or_path), train=False)
    check_picture_size(clip, transform.size)
    return zero_shot_beside(clip, ["photo"]), transform


def _write(output: Path, columns: dict[str, list], features: np.ndarray) -> None:
    """The columns and features (n, d), float32 at unit length; the file appears whole or not at all."""
    draft = output.with_name(output.name + ".part")
    if output.suffix.lower() == ".npz":
        arrays: dict[str, Any] = {
            f"{name}s": np.array([each or "" for each in values]) for name, values in columns.items()
        }
        with draft.open("wb") as file:
            np.savez(file, features=features, **arrays)
    else:
        flat = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
        table = {name: pa.array(values, pa.string()) for name, values in columns.items()}
        pq.write_table(pa.table(table | {"features": flat}), draft)
    put_in_place(draft, output)
