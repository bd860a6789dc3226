"""Text, JSON and digests of files: errors name damaged files, and what is written appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(file: str | os.PathLike) -> str:
    """A file in UTF-8, with or without a byte order mark.

    Raises OSError if it cannot be opened, ValueError for bytes that are not UTF-8.
    """
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(file)} is not UTF-8 text ({error}); save it as UTF-8.") from error


def file_digest(file: str | os.PathLike) -> bytes:
    """The SHA-256 (32 bytes) of a file's content. Raises OSError if it cannot be opened."""
    content = hashlib.sha256()
    with open(file, "rb") as stream:
        while part := stream.read(1 << 20):
            content.update(part)
    return content.digest()


def read_json(file: str | os.PathLike) -> Any:
    """What a JSON file holds. Raises OSError if it cannot be opened, ValueError for anything but JSON in UTF-8."""
    return parse_json(read_text(file), os.fspath(file))


def parse_json(text: str | bytes, place: str) -> Any:
    """The JSON value in `text`; the ValueError for anything else names `place`."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        content = json.loads(text)
        if _SURROGATE.search(text):  # halves of a character, which JSON may contain but no file or tokenizer accepts
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}); correct it.") from error


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes JSON, whole or not at all, with text in any language unescaped."""
    temporary = Path(path).with_suffix(".tmp")
    text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
    except UnicodeEncodeError:  # the path of a file whose name is not UTF-8
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    put_in_place(temporary, Path(path))


def put_in_place(temporary: Path, path: Path) -> None:
    """Renames a file or folder once its content is on disk; replaces an existing file."""
    for file in (temporary, *temporary.rglob("*")):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    os.replace(temporary, path)
