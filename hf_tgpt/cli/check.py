"""`hf-tgpt check`: finds what is wrong with pictures and their labels, before any training."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from ..data import find_benchmark
from ..inference.check import check_pictures
from ..utils.files import write_json
from .check_page import write_check_page
from .output import check_own_folder, tidy_output
from .pictures import load_base, read_splits
from .spreadsheet import write_table

_NOTE = "check.json"  # in the folder of a check
_COLUMNS = ("file", "problem", "label", "suggested", "score", "split", "detail")
_LISTS = {  # in the order of the summary
    "label_errors": "labels to look at",
    "duplicates": "groups of equal or nearly equal pictures",
    "outliers": "pictures unlike all others",
    "unreadable": "files that cannot be read",
    "blank": "pictures of one colour or nearly black",
    "tiny": "pictures much smaller than what the model sees",
    "spelled_alike": "groups of class names that differ only in spelling",
    "unknown_by_name": "classes that the base model does not recognise by name",
    "confused_by_name": "classes that, by name, the base model takes for another",
}


def main(args: argparse.Namespace) -> int:
    """Writes the page, the table and check.json into a folder, and prints a summary."""
    tidy_output()
    start = time.perf_counter()
    output_dir = Path(args.output_dir or Path("runs") / f"check-{datetime.now():%Y%m%d-%H%M%S}")
    check_own_folder(output_dir, _NOTE, "check")
    splits, clip = read_splits(args), load_base(args)
    benchmark, _ = find_benchmark(args.pictures)
    output_dir.mkdir(parents=True, exist_ok=True)
    facts, encoded = check_pictures(
        splits,
        clip,
        templates=list(benchmark.templates) if benchmark else None,
        folder=args.cache_dir or output_dir / "features",
        num_workers=args.num_workers,
    )
    files = {"page": str(output_dir / "check.html"), "csv": str(output_dir / "problems.csv")}
    about = {"dataset": args.pictures, "model": clip.name_or_path, "output_dir": str(output_dir), **files}
    facts = about | facts | {"seconds": round(time.perf_counter() - start, 1)}
    write_table(Path(files["csv"]), _COLUMNS, _rows(facts))
    write_check_page(Path(files["page"]), facts, encoded, args.count)
    write_json(output_dir / _NOTE, facts)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else _in_words(facts))
    return 0


def _rows(facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each picture and problem."""
    for row in _problems(facts):
        score = row.get("score")
        yield row | ({} if score is None else {"score": f"{score:.4f}"})


def _problems(facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for found in facts["unreadable"]:
        yield found | {"problem": "unreadable", "detail": found["problem"]}
    for found in facts["blank"]:
        yield found | {"problem": "blank"}
    for found in facts["tiny"]:
        yield found | {"problem": "tiny", "detail": f"{found['width']} x {found['height']} pixels"}
    for group in facts["duplicates"]:
        first = group["files"][0]["file"]
        for found in group["files"]:
            yield found | {
                "problem": f"{group['kind']} duplicate",
                "score": group["score"],
                "detail": "" if found is group["files"][0] else f"as {first}",
            }
    for found in facts["label_errors"]:
        yield found | {"problem": "label error"}
    for found in facts["outliers"]:
        yield found | {"problem": "outlier"}


def _in_words(facts: dict[str, Any]) -> str:
    lines = [f"{facts['pictures']} pictures of {facts['classes']} classes"]
    lines += [f"{words}: {len(facts[kind])}" for kind, words in _LISTS.items() if facts[kind]]
    if not any(facts[kind] for kind in _LISTS):
        lines.append("Nothing is wrong with them.")
    largest, smallest = (facts["imbalance"][size] for size in ("largest", "smallest"))
    if largest["pictures"] > smallest["pictures"]:
        lines.append(f"The largest class, {largest['label']}, has {largest['pictures']} pictures; the smallest, "
                     f"{smallest['label']}, has {smallest['pictures']}.")  # fmt: skip
    lines += [f"Note: {note}" for note in facts["notes"]]
    return "\n".join([*lines, f"{facts['seconds']:.0f} s; look at {facts['page']}, or filter {facts['csv']}"])
