"""`hf-tgpt predict`: the classes of pictures, a line each."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tqdm.auto import tqdm

from ..inference.classifier import Answer
from .loaded import class_names_of, classifier_of
from .output import tidy_output

SOME_SKIPPED = 3
URLS = ("http://", "https://")


def main(args: argparse.Namespace) -> int:
    """A line for each picture that can be read; the others are counted and named on stderr."""
    tidy_output()
    files = find_files(args.images)
    kind = args.format or ("csv" if Path(args.output or "").suffix.lower() == ".csv" else "jsonl")
    classifier = classifier_of(args)
    skipped: list[tuple[str, ValueError]] = []
    bar = tqdm(total=len(files), desc="predicting", unit=" images", disable=None)  # None: only on a terminal

    def skip(image: str, error: ValueError) -> None:
        skipped.append((image, error))
        bar.update()

    names = class_names_of(args)
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


def find_files(paths: list[str]) -> list[str]:
    """All files in folders, at any depth and in the order of their names, without hidden ones; files and URLs as named.

    Raises ValueError for a path that does not exist and where there is no file.
    """
    paths_found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            for folder, folders, files in os.walk(path):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                paths_found += [os.path.join(folder, name) for name in sorted(files) if not name.startswith(".")]
        elif os.path.exists(path) or path.startswith(URLS):
            paths_found.append(path)
        else:
            raise ValueError(f"{path!r} does not exist; correct the path.")
    if not paths_found:
        raise ValueError(f"There is no file in {', '.join(paths)}.")
    return paths_found


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
