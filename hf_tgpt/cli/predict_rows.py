"""The rows of `hf-tgpt predict`: JSON lines, CSV or Parquet, in a file that a later call can continue."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from ..inference.answers import Answer, labels_of, row_of
from ..utils.files import parse_json, read_json, write_json
from .output import make_room_for

_KINDS = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
_BYTE_ORDER_MARK = "\ufeff"  # by which Excel recognises UTF-8
_BATCH = 10_000  # rows that are held at a time
Writer = Callable[[str, Answer | None, str], None]


def kind_of(output: str | None, format: str | None) -> str:
    """The format of the rows. Raises ValueError if the output's name does not define one."""
    if output is None:
        if format == "parquet":
            raise ValueError("`format`='parquet' needs a file; name one as `output`.")
        return format or "jsonl"
    make_room_for(output)
    suffix = Path(output).suffix.lower()
    if format is None and suffix not in _KINDS:
        raise ValueError(
            f"`output`={output!r} ends with neither .csv, which spreadsheets open, nor .jsonl or .parquet; name such a "
            "file, or set `format`."
        )
    return format or _KINDS[suffix]


@contextmanager
def open_output(path: str | None, about: dict) -> Iterator[tuple[TextIO, set[str]]]:
    """stdout, or a file that gets its name when it is complete; and the pictures that an earlier call has written.

    `about` is what the rows depend on: rows of a call with other arguments are written again. Parquet is drafted as
    JSON lines, since a file of it cannot be continued.
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
    if about["kind"] == "parquet":
        _to_parquet(draft, about["columns"], about)
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


def _to_parquet(draft: Path, columns: int, asked: Mapping[str, Any]) -> None:
    """Makes a table of JSON lines, with the columns of the CSV."""
    names = [("label", "score"), *((f"label_{i}", f"score_{i}") for i in range(2, columns + 1))]
    fields = [field for label, score in names for field in ((label, pa.string()), (score, pa.float64()))]
    fields += [(name, pa.list_(pa.string()) if name == "labels" else pa.string()) for name in _beside(asked)]
    schema = pa.schema([("image", pa.string()), *fields, ("error", pa.string())])
    table = draft.with_name(draft.name + ".table")
    with draft.open(encoding="utf-8") as lines, pq.ParquetWriter(table, schema) as writer:
        while batch := list(islice(lines, _BATCH)):
            rows: list[dict[str, Any]] = []
            for line in batch:
                row = parse_json(line, str(draft))
                flat = {name: row.get(name) for name in ("image", "error", *_beside(asked))}
                for (label, score), guess in zip(names, row.get("top_k", []), strict=False):
                    flat |= {label: guess["label"], score: guess["score"]}
                rows.append(flat)
            writer.write_table(pa.Table.from_pylist(rows, schema))
    os.replace(table, draft)


def _beside(asked: Mapping[str, Any]) -> list[str]:
    """The columns beside classes and scores; `asked` holds what was asked of a calibration."""
    return [column for name, column in (("coverage", "labels"), ("reject", "nearest")) if name in asked]


def list_writer(rows: list[dict], asked: Mapping[str, Any]) -> Writer:
    """Appends to `rows`."""
    return lambda image, answer, error: rows.append(row_of(image, answer, error, asked))


def jsonl_writer(file: TextIO, asked: Mapping[str, Any]) -> Writer:
    """Writes a JSON object on each line."""

    def write(image: str, answer: Answer | None, error: str) -> None:
        file.write(json.dumps(row_of(image, answer, error, asked), ensure_ascii=False) + "\n")
        file.flush()

    return write


def csv_writer(file: TextIO, columns: int, asked: Mapping[str, Any], begun: bool) -> Writer:
    """Writes the best classes beside each other; `begun`: the head is written."""
    rows = csv.writer(file, lineterminator="\n")
    others = [f"{name}_{i}" for i in range(2, columns + 1) for name in ("label", "score")]
    if not begun:
        rows.writerow(["image", "label", "score", *others, *_beside(asked), "error"])

    def write(image: str, answer: Answer | None, error: str) -> None:
        cells = [(guess["label"] or "", f"{guess['score']:.4f}") for guess in (answer or [])[:columns]]
        cells += [("", "")] * (columns - len(cells))
        row = row_of(image, answer, error, asked) | {"labels": "; ".join(labels_of(answer))}
        beside = [row.get(name, "") for name in _beside(asked)]
        rows.writerow([image, *(value for pair in cells for value in pair), *beside, error])
        file.flush()

    return write
