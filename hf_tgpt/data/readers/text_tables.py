"""CSV, TSV and JSONL files as people and spreadsheets write them, every cell unchanged."""

from __future__ import annotations

import codecs
import csv
import io
import re
from pathlib import Path
from typing import Any

from datasets import Dataset

from ...utils.files import parse_json
from ..remarks import remark

_DELIMITERS = (",", ";", "\t", "|")
_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_INTEGER = re.compile(r"0|-?[1-9]\d{0,17}")


def read_delimited(file: Path) -> Dataset:
    """The rows of a .csv or .tsv file.

    Delimited by comma, semicolon, tab or "|", whichever the first line has the most of; in UTF-8, UTF-16 or, with a
    remark, Windows' code page. Blank lines and empty columns at the end are left out. Cells are strings without spaces
    around them, so "None", "007" and "1.0" stay what they are; an empty one is None, and a column of whole numbers
    holds integers.

    Raises ValueError that names file and line for a file without rows, a row that does not fit the header, and a
    repeated column name.
    """
    text = _decoded(file)
    first_line = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(_DELIMITERS, key=first_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    lines: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                lines.append((reader.line_num, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}; correct it.") from error
    if len(lines) < 2:
        raise ValueError(f"{file} holds no rows below a line with the names of its columns; add both.")
    (_, header), *rows = lines
    width = max(number for number, name in enumerate(header, 1) if name)
    if "" in header[:width]:
        raise ValueError(f"{file}: column {header.index('') + 1} has no name in the first line; give it one.")
    if twins := [name for name in header[:width] if header[:width].count(name) > 1]:
        raise ValueError(f"{file}: two columns are called {twins[0]!r}; rename one.")
    for number, cells in rows:
        if len(cells) < width or any(cells[width:]):
            raise ValueError(
                f"{file}, line {number}: it has {len(cells)} cells and the first line {width} names; correct it, and "
                f'put a cell that holds {delimiter!r} into "quotes".'
            )
    columns: dict[str, list[Any]] = {
        name: [cells[place] or None for _, cells in rows] for place, name in enumerate(header[:width])
    }
    for name, cells in columns.items():
        if any(cells) and all(cell is None or _INTEGER.fullmatch(cell) for cell in cells):
            columns[name] = [None if cell is None else int(cell) for cell in cells]
    return Dataset.from_dict(columns)


def _decoded(file: Path) -> str:
    data = file.read_bytes()
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} cannot be read as text ({error}); save it as CSV in UTF-8.") from error
        remark(f"{file} is not UTF-8 and is read as Windows-1252; if letters are wrong, save it as UTF-8.")
    if "\0" in text:
        raise ValueError(f"{file} is not a text file; save the table as CSV in UTF-8.")
    return text


def read_json_lines(file: Path) -> Dataset:
    """The rows of a .jsonl file: one JSON object per line, strings unchanged, null as None.

    Raises ValueError that names file and line for anything else.
    """
    rows = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                row = parse_json(line, f"{file}, line {number}")
                if not isinstance(row, dict):
                    raise ValueError(f"{file}, line {number}: {line[:80]!r} is not a JSON object; correct it.")
                rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
