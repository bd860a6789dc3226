"""`hf-tgpt predict`: the classes of pictures, a line each."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tqdm.auto import tqdm

from ..data.readers.folders import kinds_left_out, pictures_below
from ..hub.run import local_folder
from ..inference.classifier import Answer
from ..utils.files import parse_json, read_json, write_json
from .loaded import class_names_of, classifier_of
from .output import make_room_for, tidy_output

SOME_SKIPPED = 3
URLS = ("http://", "https://")
_KINDS = {".csv": "csv", ".jsonl": "jsonl"}
_SECONDS = 30  # between two lines of progress where there is no terminal
_BYTE_ORDER_MARK = "\ufeff"  # by which Excel recognises UTF-8


def main(args: argparse.Namespace) -> int:
    """Writes a line for each picture. One that cannot be read gets a line with the reason, and is listed on stderr."""
    tidy_output()
    if args.json and args.format == "csv" and not args.output:
        raise ValueError("`json` prints JSON, not CSV; leave out `format` or name an `output`.")
    kind = _kind(args.output, args.format)
    files = find_files([*args.images, *_listed(args.list)])
    names = class_names_of(args)
    classifier = classifier_of(args)
    columns = min(args.top_k, len(names or classifier.class_names))
    about = {"adapter": _content(local_folder(args.adapter, revision=args.revision)), "model": args.model}
    about |= {"kind": kind, "top_k": args.top_k, "class_names": names, "scores": args.scores} | (
        {"set": args.set} if args.set else {}
    )
    rows: list[dict] = []
    with _output(args.output, about) as (file, done):
        remaining = [path for path in files if path not in done]
        write = _csv_writer(file, columns, begun=bool(done)) if kind == "csv" else _jsonl_writer(file)
        if args.json and not args.output:
            write = _list_writer(rows)
        skipped: list[str] = []
        progress = _Progress(len(files), len(files) - len(remaining))

        def skip(image: str, error: ValueError) -> None:
            skipped.append(str(error))
            write(image, None, str(error))
            progress.update()

        options = {"class_names": names, "scores": args.scores, "batch_size": args.batch_size}
        answers = classifier.stream(remaining, args.top_k, skip=skip, **options)
        for image, answer in answers:
            write(image, answer, "")
            progress.update()
        progress.close()
    if skipped:
        print(f"{len(skipped)} of {len(files)} files could not be read and were skipped:", file=sys.stderr)
        for error in skipped:
            print(f"  {error}", file=sys.stderr)
    if args.json:
        facts = {"output": args.output, "images": len(files), "skipped": len(skipped)}
        print(json.dumps(facts if args.output else facts | {"rows": rows}, indent=2, ensure_ascii=False))
    return SOME_SKIPPED if skipped else 0


def find_files(paths: list[str]) -> list[str]:
    """The pictures in folders, at any depth and sorted by name; files and URLs in the given order, each once.

    Files in folders that are not pictures are counted on stderr. Raises ValueError for a path that does not exist and
    where there is no picture.
    """
    if not paths:
        raise ValueError("No picture is given; name files, folders, or a `list` of them.")
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            pictures, left_out = pictures_below(path)
            found += pictures
            if left_out:
                print(f"Note: {path}: {kinds_left_out(left_out)}", file=sys.stderr)
        elif os.path.exists(path) or path.startswith(URLS):
            found.append(path)
        else:
            raise ValueError(f"{path!r} does not exist; correct the path.")
    if not found:
        raise ValueError(f"There is no picture in {', '.join(paths)}; name others.")
    return list(dict.fromkeys(found))


def _listed(name: str | None) -> list[str]:
    """The lines of a file, or of standard input."""
    if name is None:
        return []
    try:
        text = sys.stdin.read() if name == "-" else Path(name).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`list`={name!r} cannot be read ({error}); name a text file of paths, a line each.") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _kind(output: str | None, format: str | None) -> str:
    """The format of the rows. Raises ValueError if the output's name does not define one."""
    if output is None:
        return format or "jsonl"
    make_room_for(output)
    suffix = Path(output).suffix.lower()
    if format is None and suffix not in _KINDS:
        raise ValueError(
            f"`output`={output!r} ends with neither .csv, which spreadsheets open, nor .jsonl; name such a file, or "
            "set `format`."
        )
    return format or _KINDS[suffix]


def _content(folder: str) -> str:
    """A hash of an adapter's files, so that its rows are not mixed with those of another adapter."""
    files = [file for file in sorted(Path(folder).iterdir()) if file.suffix == ".safetensors" or "config" in file.name]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()[:16]


@contextmanager
def _output(path: str | None, about: dict) -> Iterator[tuple[TextIO, set[str]]]:
    """stdout, or a file that gets its name when it is complete; and the pictures that an earlier call has written.

    `about` is what the rows depend on: rows of a call with other arguments are written again.
    """
    if path is None:
        yield sys.stdout, set()
        return
    draft = Path(path).with_name(Path(path).name + ".part")
    note = draft.with_name(draft.name + ".json")
    done: set[str] = set()
    try:
        if draft.exists() and read_json(note) == about:
            done = _whole_rows(draft, about["kind"])
    except (OSError, ValueError):  # no note, or a damaged one
        done = set()
    if not done:
        draft.write_text(_BYTE_ORDER_MARK if about["kind"] == "csv" else "", encoding="utf-8")
    write_json(note, about)
    with draft.open("a", encoding="utf-8", newline="") as file:
        yield file, done
    os.replace(draft, path)
    note.unlink()


def _whole_rows(draft: Path, kind: str) -> set[str]:
    """The pictures in an unfinished file, after removing its incomplete last row."""
    content = draft.read_bytes()
    content = content[: content.rfind(b"\n") + 1]
    text = content.decode("utf-8-sig")
    if kind == "csv":
        done = {row[0] for row in list(csv.reader(io.StringIO(text, newline="")))[1:]}
    else:
        done = {parse_json(line, str(draft))["image"] for line in text.splitlines()}
    draft.write_bytes(content)
    return done


def _row(image: str, answer: Answer | None, error: str) -> dict:
    return {"image": image, "error": error} if answer is None else {"image": image, **answer[0], "top_k": answer}


def _list_writer(rows: list[dict]) -> Callable[[str, Answer | None, str], None]:
    return lambda image, answer, error: rows.append(_row(image, answer, error))


def _jsonl_writer(file: TextIO) -> Callable[[str, Answer | None, str], None]:
    def write(image: str, answer: Answer | None, error: str) -> None:
        file.write(json.dumps(_row(image, answer, error), ensure_ascii=False) + "\n")
        file.flush()

    return write


def _csv_writer(file: TextIO, columns: int, begun: bool) -> Callable[[str, Answer | None, str], None]:
    rows = csv.writer(file, lineterminator="\n")
    others = [f"{name}_{i}" for i in range(2, columns + 1) for name in ("label", "score")]
    if not begun:
        rows.writerow(["image", "label", "score", *others, "error"])

    def write(image: str, answer: Answer | None, error: str) -> None:
        cells = [(guess["label"], f"{guess['score']:.4f}") for guess in answer] if answer else [("", "")] * columns
        rows.writerow([image, *(value for pair in cells for value in pair), error])
        file.flush()

    return write


class _Progress:
    """A progress bar on a terminal; elsewhere, such as in a log file, an occasional line."""

    def __init__(self, total: int, done: int):
        self.total, self.done, self.told = total, done, time.monotonic()
        self.bar = tqdm(total=total, initial=done, desc="predicting", unit=" images", disable=None)
        if done:
            print(f"{done} of {total} pictures are already in the output.", file=sys.stderr)

    def update(self) -> None:
        self.done += 1
        self.bar.update()
        if self.bar.disable and time.monotonic() - self.told > _SECONDS:
            self.told = time.monotonic()
            print(f"{self.done} of {self.total} pictures", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()
