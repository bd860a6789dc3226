"""The rows of `hf-tgpt predict`: JSON lines, CSV or Parquet, in a file that a later call can continue."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from ..inference.answers import Answer, labels_of, row_of
from ..utils.files import parse_json, put_in_place, read_json, write_json
from .output import make_room_for

_KINDS = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
_BYTE_ORDER_MARK = "\ufeff"  # by which Excel recognises UTF-8
_BEGINNING = ["image", "label", "score"]
_BEGINS = {"csv": ",".join(_BEGINNING).encode(), "jsonl": b'{"image": '}
_BATCH = 10_000  # rows in memory at a time
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
    kind = format or _KINDS[suffix]
    _check_is_ours(Path(output), kind)
    return kind


def _check_is_ours(path: Path, kind: str) -> None:
    """Raises ValueError for a file that no call of this kind has written, such as a table of labels."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        begins = file.read(40).removeprefix(_BYTE_ORDER_MARK.encode())
    try:
        ours = pq.read_schema(path).names[:3] == _BEGINNING if kind == "parquet" else begins.startswith(_BEGINS[kind])
    except (pa.ArrowException, OSError):
        ours = False
    if not ours:
        raise ValueError(
            f"`output`={str(path)!r} is there already and holds no predictions as {kind}, so it is not replaced; name "
            "another file, or remove it."
        )


class Output:
    """A file that gets its final name once all rows are in it, in the order of the pictures.

    Until then they are JSON lines beside it, since these can be continued after a kill: in a file with .part after its
    name and, while several processes write, in one per process, with .part.0, .part.1 and so on. `about` is what the
    rows depend on: rows from a call with other arguments are written again.

    Example:
        >>> output = Output("rows.csv", {"kind": "csv"})
        >>> pictures = ["cat.jpg", "no.jpg"]
        >>> output.begin(pictures)
        ['cat.jpg', 'no.jpg']
        >>> with output.part() as file:
        ...     write = jsonl_writer(file, {})
        ...     write("no.jpg", None, "cannot read no.jpg")
        ...     write("cat.jpg", [{"label": "cat", "score": 0.9}], "")
        >>> output.finish(pictures, columns=1, asked={})
        [('no.jpg', 'cannot read no.jpg')]
        >>> Path("rows.csv").read_text(encoding="utf-8-sig").splitlines()[1]
        'cat.jpg,cat,0.9000,'
    """

    def __init__(self, path: str | os.PathLike[str], about: dict[str, Any]):
        self.path, self.about = Path(path), about
        self.draft = self.path.with_name(self.path.name + ".part")
        self._note = self._beside("json")
        self.list = self._beside("list")  # of the pictures that the processes share

    def _beside(self, ending: str) -> Path:
        return self.draft.with_name(f"{self.draft.name}.{ending}")

    def _parts(self) -> list[Path]:
        """The existing drafts, the common one first."""
        others = [file for file in self.path.parent.iterdir()
                  if file.name.startswith(f"{self.draft.name}.") and file.suffix[1:].isdigit()]  # fmt: skip
        return [file for file in (self.draft, *sorted(others)) if file.exists()]

    def lock(self) -> FileLock:
        """A lock held while a call writes, also by processes that outlive a killed launcher. Raises ValueError."""
        lock = FileLock(self._beside("lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"`output`={str(self.path)!r} is being written by another call; wait for its end."
            ) from None
        return lock

    def begin(self, pictures: Sequence[str]) -> list[str]:
        """The pictures that earlier calls have not written; their rows are merged into one file."""
        done: set[str] = set()
        try:
            known = read_json(self._note) == self.about
        except (OSError, ValueError):  # no note, or a damaged one
            known = False
        parts = self._parts() if known else []
        gathered = self._beside("new")
        with gathered.open("wb") as file:
            for part in parts:
                for line in _whole_lines(part):
                    image = _image_of(line, part)
                    if image is not None:
                        done.add(image)
                        file.write(line)
        put_in_place(gathered, self.draft)
        for other in self._parts()[1:]:
            other.unlink()
        write_json(self._note, self.about)
        return [picture for picture in pictures if picture not in done]

    def part(self, number: int | None = None) -> TextIO:
        """The file to append rows to, for `jsonl_writer`; each of several processes has its own, by `number`."""
        return (self.draft if number is None else self._beside(str(number))).open("a", encoding="utf-8", newline="")

    def finish(self, pictures: Iterable[str], columns: int, asked: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Puts the file in place, and returns the pictures that could not be read, each with the reason."""
        parts, whole, skipped = self._parts(), self._beside("whole"), []
        places: dict[str, tuple[int, int]] = {}
        for number, part in enumerate(parts):
            start = 0
            for line in _whole_lines(part):
                if (image := _image_of(line, part)) is not None:
                    places.setdefault(image, (number, start))
                start += len(line)

        pictures = list(pictures)
        if missing := [picture for picture in pictures if picture not in places]:
            raise ValueError(f"{len(missing)} pictures have no row, such as {missing[0]}; give the same command again.")

        def rows() -> Iterator[dict[str, Any]]:
            with ExitStack() as stack:
                files = [stack.enter_context(part.open("rb")) for part in parts]
                for picture in pictures:
                    number, start = places[picture]
                    files[number].seek(start)
                    row = parse_json(files[number].readline(), str(parts[number]))
                    if row.get("error"):
                        skipped.append((picture, row["error"]))
                    yield row

        if self.about["kind"] == "parquet":
            _write_parquet(whole, rows(), columns, asked)
        else:
            with whole.open("w", encoding="utf-8", newline="") as file:
                if self.about["kind"] == "csv":
                    file.write(_BYTE_ORDER_MARK)
                write = csv_writer(file, columns, asked) if self.about["kind"] == "csv" else jsonl_writer(file, asked)
                for row in rows():
                    write(row["image"], row.get("top_k"), row.get("error", ""))
        put_in_place(whole, self.path)
        for part in parts:
            part.unlink()
        self._note.unlink()
        self.list.unlink(missing_ok=True)
        return skipped


def _whole_lines(part: Path) -> Iterator[bytes]:
    """The lines of an unfinished file, without the last one if it was cut off."""
    with part.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def _image_of(line: bytes, part: Path) -> str | None:
    """The picture of a row; None for a line that is not a row, as in drafts of an earlier version."""
    try:
        return parse_json(line, str(part))["image"]
    except (ValueError, KeyError, TypeError):
        return None


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], columns: int, asked: Mapping[str, Any]) -> None:
    """Writes a table with the columns of the CSV."""
    names = [("label", "score"), *((f"label_{i}", f"score_{i}") for i in range(2, columns + 1))]
    fields = [field for label, score in names for field in ((label, pa.string()), (score, pa.float64()))]
    fields += [(name, pa.list_(pa.string()) if name == "labels" else pa.string()) for name in _beside(asked)]
    schema = pa.schema([("image", pa.string()), *fields, ("error", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        while batch := list(islice(rows, _BATCH)):
            flat: list[dict[str, Any]] = []
            for row in batch:
                cells = {name: row.get(name) for name in ("image", "error", *_beside(asked))}
                for (label, score), guess in zip(names, row.get("top_k", []), strict=False):
                    cells |= {label: guess["label"], score: guess["score"]}
                flat.append(cells)
            writer.write_table(pa.Table.from_pylist(flat, schema))


def _beside(asked: Mapping[str, Any]) -> list[str]:
    """The columns beside classes and scores; `asked` has the calibration options in use."""
    return [column for name, column in (("coverage", "labels"), ("reject", "nearest")) if name in asked]


def list_writer(rows: list[dict], asked: Mapping[str, Any]) -> Writer:
    """Appends to `rows`."""
    return lambda image, answer, error: rows.append(row_of(image, answer, error, asked))


def jsonl_writer(file: TextIO, asked: Mapping[str, Any]) -> Writer:
    """Writes one JSON object per line."""

    def write(image: str, answer: Answer | None, error: str) -> None:
        file.write(json.dumps(row_of(image, answer, error, asked), ensure_ascii=False) + "\n")
        file.flush()

    return write


def csv_writer(file: TextIO, columns: int, asked: Mapping[str, Any]) -> Writer:
    """Writes the best classes side by side, under a header."""
    rows = csv.writer(file, lineterminator="\n")
    others = [f"{name}_{i}" for i in range(2, columns + 1) for name in ("label", "score")]
    rows.writerow(["image", "label", "score", *others, *_beside(asked), "error"])

    def write(image: str, answer: Answer | None, error: str) -> None:
        cells = [(guess["label"] or "", f"{guess['score']:.4f}") for guess in (answer or [])[:columns]]
        cells += [("", "")] * (columns - len(cells))
        row = row_of(image, answer, error, asked) | {"labels": "; ".join(labels_of(answer))}
        beside = [row.get(name, "") for name in _beside(asked)]
        rows.writerow([image, *(value for pair in cells for value in pair), *beside, error])
        file.flush()

    return write
