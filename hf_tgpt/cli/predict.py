"""`hf-tgpt predict`: writes the classes of pictures, one line each."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

from ..adapters.folder import CALIBRATION
from ..data.readers.folders import kinds_left_out, pictures_below
from ..hub.run import local_folder
from ..inference.answers import Answer
from ..utils.names import unreadable_name
from .loaded import class_names_of, classifier_of
from .options import DTYPES
from .output import tidy_output
from .predict_processes import Processes, Progress
from .predict_rows import Output, Writer, csv_writer, jsonl_writer, kind_of, list_writer
from .sorting import Sorter

SOME_SKIPPED = 3
URLS = ("http://", "https://")


def main(args: argparse.Namespace) -> int:
    """Writes a line for each picture. One that cannot be read gets a line with the reason, and is listed on stderr."""
    tidy_output()
    if args.json and args.format == "csv" and not args.output:
        raise ValueError("`json` prints JSON, not CSV; leave out `format` or name an `output`.")
    kind = kind_of(args.output, args.format)
    _check_sorting(args)
    processes = Processes()
    processes.check(args)
    files = find_files([*args.images, *listed(args.list)]) if processes.is_main else []
    names = class_names_of(args)
    args.device = args.device or processes.device
    args.dtype = processes.precision(args.dtype)
    classifier = classifier_of(args)
    columns = 1 if args.coverage else min(args.top_k, len(names or classifier.class_names))
    asked = {name: value for name, value in (("coverage", args.coverage), ("reject", args.reject)) if value}
    # Refuses impossible options before a file is made.
    classifier.question(args.top_k, class_names=names, scores=args.scores, **asked)
    sort = None
    if args.sort_into:
        sort = Sorter(args.sort_into, names or classifier.class_names, args.min_score or 0.0, args.copy)
    about = {"adapter": _content(local_folder(args.adapter, revision=args.revision)), "model": args.model}
    about |= (
        {"kind": kind, "top_k": args.top_k, "class_names": names, "scores": args.scores}
        | ({"set": args.set} if args.set else {})
        | ({"dtype": args.dtype} if args.dtype != DTYPES[0] else {})
        | asked
    )
    if sort is not None:
        about["sort"] = [os.path.abspath(args.sort_into), sort.min_score, sort.copy]

    def classify(pictures: list[str], write: Writer, progress: Progress) -> None:
        def skip(image: str, error: ValueError) -> None:
            write(image, None, str(error))
            progress.update()

        options = {"class_names": names, "scores": args.scores, "batch_size": args.batch_size, **asked}
        for image, answer in classifier.stream(pictures, args.top_k, skip=skip, **options):
            if sort is not None and not image.startswith(URLS):  # first, so that a continued call misses none
                sort(image, answer[0]["label"], answer[0]["score"])
            write(image, answer, "")
            progress.update()
        progress.close()

    rows: list[dict] = []
    if args.output:
        output = Output(args.output, about)
        skipped = processes.run(output, files, classify, columns, asked)
        if not processes.is_main:
            return 0
    else:
        write = csv_writer(sys.stdout, columns, asked) if kind == "csv" else jsonl_writer(sys.stdout, asked)
        keep = list_writer(rows, asked)
        skipped = []

        def write_or_keep(image: str, answer: Answer | None, error: str) -> None:
            (keep if args.json else write)(image, answer, error)
            if error:
                skipped.append((image, error))

        classify(files, write_or_keep, Progress(len(files), 0))
    if skipped:
        print(f"{len(skipped)} of {len(files)} files could not be read and were skipped:", file=sys.stderr)
        for _, error in skipped:
            print(f"  {error}", file=sys.stderr)
    if sort is not None and (urls := sum(image.startswith(URLS) for image in files)):
        print(f"Note: {urls} of {len(files)} pictures are URLs, not files, and are not sorted.",
              file=sys.stderr)  # fmt: skip
    if args.json:
        facts = {"output": args.output, "images": len(files), "skipped": len(skipped)}
        print(json.dumps(facts if args.output else facts | {"rows": rows}, indent=2, ensure_ascii=False))
    # The launcher of several processes takes any other status for a crash; the manifest lists what was skipped.
    return SOME_SKIPPED if skipped and processes.count == 1 else 0


def _check_sorting(args: argparse.Namespace) -> None:
    """Raises ValueError for sorting options without --sort_into, and for a folder among the pictures."""
    if not args.sort_into:
        for name in ("min_score", "copy"):
            if getattr(args, name) not in (None, False):
                raise ValueError(f"`{name}` is for `sort_into`; name a folder there.")
        return
    folder = Path(args.sort_into).resolve()
    for path in args.images:
        if os.path.isdir(path) and folder.is_relative_to(Path(path).resolve()):
            raise ValueError(
                f"`sort_into`={args.sort_into!r} is in {path!r}, so a later call would take what is sorted for "
                "pictures; choose a folder elsewhere."
            )


def find_files(paths: list[str]) -> list[str]:
    """The pictures in folders, at any depth and sorted by name; files and URLs in the given order, each once.

    Files in folders that are not pictures are counted on stderr. Raises ValueError for a path that does not exist, and
    if there is no picture.
    """
    if not paths:
        raise ValueError("No picture is given; name files, folders, or a `list` of them.")
    found: list[str] = []
    for path in paths:
        if name := unreadable_name(path):
            print(f"Note: {name} is left out: the name is not UTF-8; rename it.", file=sys.stderr)
        elif os.path.isdir(path):
            pictures, left_out = pictures_below(path)
            found += pictures
            if left_out:
                print(f"Note: {path}: {kinds_left_out(left_out)}", file=sys.stderr)
        elif os.path.exists(path) or path.startswith(URLS):
            found.append(path)
        else:
            raise ValueError(f"{path!r} does not exist; correct the path.")
    if not found:
        given = ", ".join(unreadable_name(path) or path for path in paths)
        raise ValueError(f"There is no picture in {given}; name others.")
    return list(dict.fromkeys(found))


def listed(name: str | None) -> list[str]:
    """The lines of a file, or of standard input."""
    if name is None:
        return []
    try:
        text = sys.stdin.read() if name == "-" else Path(name).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`list`={name!r} cannot be read ({error}); name a text file of paths, a line each.") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _content(folder: str) -> str:
    """A hash of an adapter's files, so that its rows are not mixed with those of another adapter."""
    files = [file for file in sorted(Path(folder).iterdir())
             if file.suffix == ".safetensors" or "config" in file.name or file.name == CALIBRATION]  # fmt: skip
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()[:16]
