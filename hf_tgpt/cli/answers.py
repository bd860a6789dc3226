"""Merges labels for suggested pictures with the pictures of a run into the next data set."""

from __future__ import annotations

import argparse
import csv
import difflib
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data import choose_classes, class_names, load_splits
from ..data.class_lists import clean_class_name, normalized_name
from ..data.duplicates import digests
from ..data.readers.captions import undecoded_images
from ..data.readers.folders import is_picture
from ..data.readers.text_tables import read_delimited
from ..data.remarks import count, remark
from ..hub.run import local_folder, results_of, seen_pictures
from ..inference.pictures import load_image
from ..utils.files import put_in_place, read_json, write_json
from .arguments import DataArguments
from .loaded import data_of_run, remark_on_cut_off
from .output import list_remarks

LABELLED, RECIPE = "labelled.csv", "train.json"
_FILES = ("file", "image", "path", "file_name")  # names of the column of files; the first one found is used
_NEAR = 0.8  # difflib's ratio from which a new name may be a misspelled known one
_SHOTS = 16  # of training, unless a class has more


@dataclass
class Answers:
    """The labels of a table: {file: label} for the usable rows, and the other rows with the reason."""

    labels: dict[str, str] = field(default_factory=dict)
    empty: int = 0
    passed_over: list[str] = field(default_factory=list)
    new_classes: list[str] = field(default_factory=list)


def take_in(args: argparse.Namespace, output: Path) -> int:
    """Writes a table of the run's pictures and the labelled ones, and a recipe to train on it; trains nothing."""
    run = local_folder(args.adapter, revision=args.revision)
    with list_remarks():
        remark_on_cut_off(run)
        former, names = _former(run)
        answers = read_answers(Path(args.answers), names, args.images)
        _leave_out_known(answers, seen_pictures(run), args.answers)
    if not answers.labels:
        raise ValueError(f"`answers`={args.answers!r} has no new label: {answers.empty} empty, "
                         f"{len(answers.passed_over)} passed over; fill in the column 'label'.")  # fmt: skip
    rows = [*former, *((file, label, "train") for file, label in answers.labels.items())]
    output.mkdir(parents=True, exist_ok=True)
    table = output / LABELLED
    _write(table, rows, with_splits=bool(former))
    largest = max(Counter(label for _, label, split in rows if split == "train").values())
    write_json(output / RECIPE, _recipe(run, args.model, table, largest))
    command = f"hf-tgpt train --config {shlex.quote(str(output / RECIPE))} --output_dir runs/next"
    facts = {"output": str(table), "answers": len(answers.labels), "empty": answers.empty,
             "passed_over": answers.passed_over, "new_classes": answers.new_classes,
             "pictures": dict(Counter(split for _, _, split in rows)), "command": command}  # fmt: skip
    if answers.passed_over:
        print(f"{len(answers.passed_over)} answers were passed over:", file=sys.stderr)
        print("\n".join(f"  {each}" for each in answers.passed_over), file=sys.stderr)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else _in_words(facts))
    return 0


def read_answers(file: Path, names: Sequence[str], folders: Sequence[str] = ()) -> Answers:
    """The answers in a table with the columns `file` and `label`, among or beside the classes `names`.

    Relative paths are looked up from here, beside the table and in `folders`. A name that differs from a class only in
    spelling is that class; a name close to a class causes a remark. Raises ValueError for other tables.
    """
    if not file.is_file():
        raise ValueError(f"`answers`={str(file)!r} does not exist; name the CSV file with the labels.")
    rows = read_delimited(file)
    column = next((name for name in _FILES if name in rows.column_names), None)
    if column is None or "label" not in rows.column_names:
        raise ValueError(f"`answers`={str(file)!r} has the columns {', '.join(rows.column_names)}; it needs 'file' and "
                         "'label'.")  # fmt: skip
    answers, classes = Answers(), {normalized_name(name): name for name in names}
    twice: set[str] = set()
    for row in rows:
        if row["label"] is None:
            answers.empty += 1
            continue
        written, name = str(row[column] or ""), clean_class_name(str(row["label"]))
        path = _find(written, file, folders)
        if path is None:
            answers.passed_over.append(f"{written or 'a row without a file'}: there is no such picture")
            continue
        if normalized_name(name) not in classes:
            _remark_on_new(name, list(classes.values()))
            answers.new_classes.append(name)
        label = classes.setdefault(normalized_name(name), name)
        if answers.labels.setdefault(path, label) != label:
            twice.add(path)
    for path in sorted(twice):
        del answers.labels[path]
        answers.passed_over.append(f"{path}: it has two labels")
    answers.new_classes = [name for name in answers.new_classes if name in answers.labels.values()]
    return answers


def _find(written: str, table: Path, folders: Sequence[str]) -> str | None:
    places = [Path.cwd(), table.parent, *map(Path, folders)]
    found = next((place / written for place in places if written and is_picture(place / written)), None)
    return None if found is None else os.path.abspath(found)


def _remark_on_new(name: str, known: list[str]) -> None:
    by_case = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.casefold(), by_case, n=1, cutoff=_NEAR)
    if near:
        remark(f"{name!r} is a new class; did you mean {by_case[near[0]]!r}? Then correct it in the answers.")


def _leave_out_known(answers: Answers, seen: dict[str, str], file: str) -> None:
    """Leaves out pictures that the run already has, duplicates, and those that cannot be read."""
    paths = list(answers.labels)
    content = digests(Dataset.from_dict({"image": [{"bytes": None, "path": path} for path in paths]})) if paths else []
    first: dict[str, str] = {}
    for path, digest in zip(paths, content, strict=True):
        why = f"it is in the run's {seen[digest]} split already" if digest in seen else ""
        if digest in first:
            why = f"it is a copy of {first[digest]}"
        first.setdefault(digest, path)
        try:
            load_image(path)
        except ValueError as error:
            why = str(error).partition(": ")[2]
        if why:
            del answers.labels[path]
            answers.passed_over.append(f"{path}: {why}")


def _former(run: str) -> tuple[list[tuple[str, str, str]], list[str]]:
    """File, label and split of each picture of a run, and its classes; empty for a run that does not record them.

    Raises ValueError if its pictures are not files, so that no table can list them.
    """
    seen, names = seen_pictures(run), results_of(run).get("class_names", [])
    if not seen:
        remark(f"{run} does not record which pictures it was trained on, so the table holds the answers alone.")
        return [], names
    data = data_of_run(run, {own.name: None for own in fields(DataArguments)})
    splits = choose_classes(load_splits(**data.source, seed=None), data.classes)
    rows, names = [], class_names(next(iter(splits.values())))
    for pictures in splits.values():
        records, labels = undecoded_images(pictures), pictures["label"][:]
        for record, label, digest in zip(records, labels, digests(pictures), strict=True):
            if digest not in seen:
                continue
            if record["path"] is None or not os.path.isfile(record["path"]):
                raise ValueError(
                    f"`answers`: the pictures of {data.dataset!r}, on which the run was trained, are not files, so no "
                    "table can list them beside the answers; save them in a folder for each class and train on that."
                )
            rows.append((os.path.abspath(record["path"]), names[label], seen[digest]))
    missing = len(seen) - len({digest for pictures in splits.values() for digest in digests(pictures)} & seen.keys())
    if missing:
        remark(f"{count(missing, 'picture')} of the run no longer in {data.dataset}, and left out.")
    return list(dict.fromkeys(rows)), names


def _write(file: Path, rows: list[tuple[str, str, str]], with_splits: bool) -> None:
    """Writes the table, completely or not at all."""
    draft = file.with_name(file.name + ".part")
    with draft.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["file", "label", "split"] if with_splits else ["file", "label"])
        writer.writerows(rows if with_splits else [row[:2] for row in rows])
    put_in_place(draft, file)


def _recipe(run: str, model: str | None, table: Path, largest: int) -> dict[str, Any]:
    """The run's own options with the new data; those about the previous data are left out."""
    note = Path(run) / "run.json"
    former = read_json(note) if note.is_file() else {}
    of_data = {own.name for own in fields(DataArguments)} - {"model"}
    kept = {
        name: value for name, value in former.items() if value is not None and name not in {*of_data, "descriptions"}
    }
    kept |= {"model": model} if model else {}
    return kept | {"dataset": str(table), "shots": max(largest, kept.get("shots", _SHOTS)), "allow_fewer": True}


def _in_words(facts: dict[str, Any]) -> str:
    lines = [f"{facts['answers']} labels taken in, {facts['empty']} empty ones passed over"]
    if facts["new_classes"]:
        lines.append(f"new classes: {', '.join(facts['new_classes'])}")
    pictures = ", ".join(f"{number} {split}" for split, number in facts["pictures"].items())
    return "\n".join([*lines, f"{facts['output']} lists {pictures} pictures; train on them:", f"  {facts['command']}"])
