"""Names of classes and base models: which are valid, and what a name means on another machine."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TypeVar

# The toy CLIP made by examples/pretrain_tiny_clip.py; it is trained on the toy world only.
TOY_CLIP = Path(__file__).parents[1] / "assets" / "tiny-clip"
# Its name in files, because its folder differs between machines, and for display.
TOY_NAME = "hf-tgpt-toy-clip"
TOY = "toy"
_Name = TypeVar("_Name", str, str | None)


def is_toy_clip(name: str | None) -> bool:
    """Whether a base model's name means the toy CLIP of this package."""
    return bool(name) and (name == TOY_NAME or Path(str(name)).resolve() == TOY_CLIP.resolve())


def name_in_files(name: str | None) -> str | None:
    """A base model's name in a file: the toy CLIP's name, a folder's absolute path, which is valid wherever the file is
    read, and any other name unchanged.
    """
    if is_toy_clip(name):
        return TOY_NAME
    return os.path.abspath(name) if name and os.path.isdir(name) else name


def name_here(name: _Name) -> _Name:
    """The local path of the base model that a file or a user names."""
    return str(TOY_CLIP) if name in (TOY_NAME, TOY) else name


def public_name(name: str | None) -> str | None:
    """A Hub id; None for a path, which is meaningless elsewhere, and for the toy CLIP."""
    return name if name and name.count("/") == 1 and not os.path.exists(name) and ":" not in name else None


def composed(name: str) -> str:
    """A name in Unicode's NFC: macOS writes "é" in file names as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def unreadable_name(path: str) -> str | None:
    r"""A path whose bytes are not UTF-8, as old archives leave behind, with these as \xe9; None for any other path.

    Tables, JSON and most libraries can only hold UTF-8.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        return os.fsencode(path).decode(errors="backslashreplace")
    return None


def in_a_line(names: Iterable[str]) -> str:
    """Names in a row; those read from right to left are isolated, so that they do not reorder their neighbours."""
    other_way = {"R", "AL", "RLE", "RLO", "RLI"}
    return ", ".join(
        f"\u2068{name}\u2069" if other_way & set(map(unicodedata.bidirectional, name)) else name for name in names
    )


def check_class_names(class_names: Sequence[str] | None) -> None:
    """Raises ValueError unless these are distinct, non-empty names in an order."""
    no_list = isinstance(class_names, str | bytes | Mapping | Set) or not hasattr(class_names, "__len__")
    if class_names is None or no_list or len(class_names) == 0:
        raise ValueError(
            f"`class_names`={class_names!r}: pass a list with the name of every class in the order of the labels, "
            'for example class_names=["cat", "dog"].'
        )
    for label, name in enumerate(class_names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"`class_names[{label}]`={name!r} is not a name; give every class a word or more.")
    first_label: dict[str, int] = {}
    for label, name in enumerate(class_names):
        text = " ".join(composed(name).lower().split())  # CLIP's tokenizer ignores case and spaces
        if text in first_label:
            raise ValueError(
                f"`class_names` holds {name!r} twice, as labels {first_label[text]} and {label}; two classes with "
                "the same name cannot be told apart by text; rename one."
            )
        first_label[text] = label


def check_templates(templates: list[str] | None) -> None:
    """Raises ValueError unless these are sentences with a place for a class name."""
    if not templates or isinstance(templates, str) or not all("{}" in template for template in templates):
        raise ValueError(
            f"`templates`={templates!r}: give a list of sentences, each with {{}} where the class name goes."
        )
