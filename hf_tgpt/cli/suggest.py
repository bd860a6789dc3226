"""`hf-tgpt suggest`: chooses which pictures to label next."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.duplicates import digests
from ..data.readers.text_tables import read_delimited
from ..hub.run import local_folder, seen_pictures
from ..inference.suggest import suggest_pictures
from ..training.run_folder import check_output_dir
from ..utils.files import write_json
from .answers import LABELLED, RECIPE, take_in
from .loaded import classifier_of
from .options import TO_LABEL
from .output import tidy_output
from .predict import SOME_SKIPPED, URLS, find_files, listed
from .sorting import put_into
from .spreadsheet import write_table
from .suggest_page import write_suggest_page

ANSWERS, NOTE, LINKS = "answers.csv", "suggest.json", "pictures"
_COLUMNS = ("file", "suggested", "score", "label")


def main(args: argparse.Namespace) -> int:
    """Writes the page, the table and the links, and prints a summary; with --answers, takes labels in."""
    tidy_output()
    start = time.perf_counter()
    output = Path(args.output)
    _check_folder(output)
    if args.answers:
        return take_in(args, output)
    files = [os.path.abspath(file) for file in find_files([*args.images, *listed(args.list)]) if not _is_url(file)]
    run = local_folder(args.adapter, revision=args.revision)
    known = {*seen_pictures(run), *_taken_in(output)}
    _check_answers(output, known)
    classifier = classifier_of(args)
    output.mkdir(parents=True, exist_ok=True)
    facts = suggest_pictures(
        classifier,
        files,
        args.count,
        known=known,
        folder=args.cache_dir or output / "features",
        num_workers=args.num_workers,
    )
    places = {"page": str(output / "suggest.html"), "csv": str(output / ANSWERS), "links": str(output / LINKS)}
    facts = {"adapter": args.adapter, "output": str(output), **places} | facts
    facts["command"] = shlex.join(["hf-tgpt", "suggest", args.adapter, "--answers", places["csv"],
                                   *(["--output", str(output)] if args.output != TO_LABEL else [])])  # fmt: skip
    (output / ANSWERS).unlink(missing_ok=True)
    if facts["suggestions"]:
        empty = ({**each, "score": f"{each['score']:.4f}", "label": ""} for each in facts["suggestions"])
        write_table(output / ANSWERS, _COLUMNS, empty)
    facts["links"] = _link(output / LINKS, facts["suggestions"])
    write_suggest_page(Path(places["page"]), facts, classifier.class_names)
    facts["seconds"] = round(time.perf_counter() - start, 1)
    write_json(output / NOTE, facts)
    if facts["unreadable"]:
        print(f"{len(facts['unreadable'])} of {len(files)} files could not be read and were skipped:", file=sys.stderr)
        print("\n".join(f"  {found['file']} ({found['problem']})" for found in facts["unreadable"]), file=sys.stderr)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else _in_words(facts))
    return SOME_SKIPPED if facts["unreadable"] else 0


def _is_url(file: str) -> bool:
    """Whether it is a URL. Raises ValueError for one, since a label needs a file to stand for."""
    if file.startswith(URLS):
        raise ValueError(f"{file!r} is an address, and a picture to label must be a file here; download it first.")
    return False


def _taken_in(output: Path) -> set[str]:
    """The files whose labels an earlier call for the same folder has taken in."""
    table = output / LABELLED
    return set(read_delimited(table)["file"]) if table.is_file() else set()


def _check_folder(output: Path) -> None:
    """Raises ValueError for an unsuitable path. Files from an earlier call are replaced."""
    if not output.is_dir() or not any(output.iterdir()):
        check_output_dir(output, resume=False)
    elif not any((output / name).is_file() for name in (NOTE, RECIPE)):
        raise ValueError(f"`output`={str(output)!r} holds other files; choose a new folder, or that of earlier "
                         "suggestions.")  # fmt: skip


def _check_answers(output: Path, known: set[str]) -> None:
    """Raises ValueError if answers would be lost."""
    if not (output / ANSWERS).is_file():
        return
    rows = read_delimited(output / ANSWERS)
    files = [str(row["file"]) for row in rows if row.get("label") is not None]
    open_ = [file for file in files if file not in known and os.path.isfile(file)]
    images = Dataset.from_dict({"image": [{"bytes": None, "path": file} for file in open_]})
    lost = sum(digest not in known for digest in digests(images)) if open_ else 0
    if lost:
        raise ValueError(
            f"`output`={str(output)!r} holds {lost} labels in {ANSWERS} that were not taken in; take them in first "
            f"(--answers {output / ANSWERS}), or choose a new folder."
        )


def _link(folder: Path, suggestions: list[dict[str, Any]]) -> str | None:
    """Links to the pictures, in place of an earlier call's; None if the system cannot make links."""
    for old in folder.iterdir() if folder.is_dir() else ():
        if old.is_symlink():
            old.unlink()
    try:
        for each in suggestions:
            put_into(folder, each["file"])
    except (OSError, NotImplementedError) as error:
        print(f"Note: no links in {folder} ({error}).", file=sys.stderr)
        return None
    return str(folder)


def _in_words(facts: dict[str, Any]) -> str:
    left_out = {"known": "labelled already", "copies": "copies of others", "blank": "of one colour or nearly black"}
    counts = [f"{facts[kind]} {words}" for kind, words in left_out.items() if facts[kind]]
    lines = [f"{facts['pictures']} pictures" + (f", without {', '.join(counts)}" if counts else "")]
    for each in facts["suggestions"]:
        lines.append(f"{each['score']:.3f} {each['suggested']:20} {each['file']}")
    if not facts["suggestions"]:
        return "\n".join([*lines, "There is nothing left to label."])
    if len(facts["suggestions"]) == facts["candidates"]:
        lines.append("These are all that are left.")
    lines.append(
        f"{facts['seconds']:.0f} s; label them in {facts['page']}, or in a spreadsheet in {facts['csv']}, then"
    )
    return "\n".join([*lines, f"  {facts['command']}"])
