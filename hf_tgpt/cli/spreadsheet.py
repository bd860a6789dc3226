"""Tables that spreadsheets open as they are."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_table(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes CSV in UTF-8 with the BOM that Excel needs; cells of other columns are left out.

    Text that begins like a formula gets an apostrophe before it, as OWASP advises (CSV Injection), since the names of
    files and classes may come from anyone.
    """
    with file.open("w", encoding="utf-8-sig", errors="backslashreplace", newline="") as stream:
        table = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows({name: _inert(cell) for name, cell in row.items()} for row in rows)


def _inert(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
