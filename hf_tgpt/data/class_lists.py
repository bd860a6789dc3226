"""Class names: cleaned, read from a file, recognised in other spellings."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
from datasets import DatasetDict

from ..utils.files import parse_json, read_text
from ..utils.names import check_class_names, composed
from .fewshot import read_labels, replace_labels
from .remarks import count, remark

# Unicode's spaces, "_", dashes, brackets and quotes.
_SEPARATORS = ("Zs", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf")


def clean_class_name(name: str) -> str:
    """A folder's or label's name as words: "_" a space, no parentheses, single spaces."""
    return " ".join(re.sub(r"[_()]", " ", name).split())


def clean_class_names(names: list[str], keep_twins: bool = False) -> list[str]:
    """All names as words. Raises ValueError for names that become the same, unless `keep_twins` leaves them alone."""
    words = [clean_class_name(name) for name in names]
    count = Counter(words)
    twins = [name for name, word in zip(names, words, strict=True) if count[word] > 1]
    if keep_twins:
        return [name if count[word] > 1 else word for name, word in zip(names, words, strict=True)]
    if twins:
        raise ValueError(
            f"`label` has classes that differ only in '_', ' ' and parentheses: {', '.join(twins[:10])}; rename one."
        )
    return words


def normalized_name(name: str) -> str:
    """What "polka-dotted", "Polka_dotted" and "polka dotted" share: everything but case, spaces, dashes and the like.

    Other signs stay, so that "C", "C++" and "C#" are three names.
    """
    return "".join(
        character
        for character in composed(name).casefold()
        if unicodedata.category(character) not in _SEPARATORS and character not in "'\".,:;/\\\t\n"
    )


def read_class_names(file: str | os.PathLike[str]) -> list[str] | dict[str, str]:
    """The class names in a file: a list in the order of the labels, or {name in the data: name to use} in that order.

    A text file has one class per line, `name` or `name in the data<TAB>name to use`; CoOp's "n01440764 tench" for
    ImageNet is read as the latter, and lines that begin with "# " are comments. A .json file holds a list or an object.

    Raises FileNotFoundError, and ValueError for a file without distinct names.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"`class_names_file`={str(file)!r} does not exist; correct the path.")
    try:
        text = read_text(file)
        if file.suffix.lower() == ".json":
            given = parse_json(text, file.name)
            if not isinstance(given, dict | list):
                raise ValueError(f"it holds a {type(given).__name__}, neither a list nor an object")
        else:
            lines = [line.strip() for line in text.split("\n") if line.strip() and not line.startswith("# ")]
            pairs = [re.split(r"\t|(?<=^n\d{8}) ", line, maxsplit=1) for line in lines]
            given = [pair[0] for pair in pairs]
            if any(len(pair) == 2 for pair in pairs):
                if len(set(given)) < len(given):
                    raise ValueError("it names a class of the data twice")
                given = {pair[0]: pair[-1].strip() for pair in pairs}
        check_class_names(list(given.values()) if isinstance(given, dict) else given)
    except ValueError as error:
        raise ValueError(f"`class_names_file`={str(file)!r} cannot be used: {error}") from error
    return given


def rename_classes(splits: DatasetDict, given: list[str] | dict[str, str]) -> DatasetDict:
    """The splits with other class names, from `read_class_names`.

    With a mapping, a class is found by either of its names, however spelled, and labels follow the mapping's order;
    classes that the data lack are left out. A list in which all classes of the data occur is such a mapping, from each
    name to itself; any other list renames the labels in their order, with a warning that lists the new names.

    Raises ValueError for a list of another length, for one that holds a class of the data in another one's place, and
    for a class that the mapping does not name.
    """
    first = next(iter(splits.values()))
    names = first.features["label"].names
    if isinstance(given, list) and {normalized_name(name) for name in names} <= {
        normalized_name(name) for name in given
    }:
        given = {name: name for name in given}
    if isinstance(given, list):
        if len(given) != len(names):
            raise ValueError(
                f"`class_names_file` lists {len(given)}, but the classes of the data are {len(names)} "
                f"({', '.join(names[:3])}{', ...' * (len(names) > 3)}); give one for each, in the order of the labels."
            )
        _check_places(names, given)
        return rename_by_position(splits, given)
    places = _places(names, given)
    labels = [places[normalized_name(name)] for name in names]
    if len(set(labels)) < len(labels):
        twins = [name for name, place in zip(names, labels, strict=True) if labels.count(place) > 1]
        raise ValueError(f"`class_names_file` gives one name to several classes of the data: {', '.join(twins[:5])}.")
    order, new_label = np.unique(labels, return_inverse=True)
    words = list(given.values())
    return _relabelled(splits, new_label, [words[place] for place in order])


def _places(names: list[str], given: dict[str, str]) -> dict[str, int]:
    """Each data class's position in a mapping, by its old name or, if there is none, by its new name.

    Raises ValueError for classes that are in it under neither, and for names that match two positions.
    """
    old = {normalized_name(key): place for place, key in enumerate(given)}
    new = {normalized_name(name): place for place, name in enumerate(given.values())}
    known = {normalized_name(name) for name in names}
    if known <= old.keys():  # even if the mapping exchanges names: {"a": "b", "b": "a"}
        return old
    unknown = [name for name in names if normalized_name(name) not in old.keys() | new.keys()]
    if unknown:
        raise ValueError(
            f"`class_names_file` does not name {len(unknown)} of the data's {len(names)} classes "
            f"({', '.join(unknown[:5])}); add them."
        )
    both = old.keys() & new.keys() & known
    unclear = [
        name
        for name in names
        if normalized_name(name) in both and old[normalized_name(name)] != new[normalized_name(name)]
    ]
    if unclear:
        raise ValueError(
            f"`class_names_file` has {unclear[0]!r} as the old name of one class and the new name of another; give the "
            "names that the data have on the left of each pair."
        )
    return new | old


def rename_by_position(splits: DatasetDict, names: list[str]) -> DatasetDict:
    """The splits with a new name for each label, in the order of the labels."""
    return _relabelled(splits, np.arange(len(names)), names)


def drop_empty_classes(splits: DatasetDict) -> DatasetDict:
    """The splits without the classes that have no image in the first split, with a remark that names them."""
    first = next(iter(splits.values()))
    names = first.features["label"].names
    images = np.bincount(read_labels(first), minlength=len(names))
    if images.all():
        return splits
    empty = [name for name, count in zip(names, images, strict=True) if not count]
    remark(f"{count(len(empty), 'class')} left out, for lack of a readable image: {', '.join(empty[:10])}.")
    kept = {
        split: data.select(np.flatnonzero(images[read_labels(data)] > 0).tolist()) for split, data in splits.items()
    }
    return _relabelled(DatasetDict(kept), np.cumsum(images > 0) - 1, [name for name in names if name not in empty])


def _check_places(names: list[str], given: list[str]) -> None:
    """Remarks which class of the data gets which new name. Raises ValueError if it looks like another class's name."""
    pairs = list(zip(names, given, strict=True))
    shown = ", ".join(f"{old!r} -> {new!r}" for old, new in pairs[:10]) + (", ..." if len(pairs) > 10 else "")
    places = {_stem(name): place for place, name in enumerate(names)}
    for place, (old, new) in enumerate(pairs):
        other = places.get(_stem(new), place)
        if other != place and _stem(old) != _stem(new):
            raise ValueError(
                f"`class_names_file` would rename by position, {shown}, but {new!r} looks like the data's class "
                f"{names[other]!r}. Put the names into the order of the data's classes, or map them with a JSON "
                f'object {{"{old}": "its new name", ...}}.'
            )
    remark(f"The classes are renamed in the order of their labels: {shown}.")


def _stem(name: str) -> str:
    return normalized_name(name).removesuffix("s")


def _relabelled(splits: DatasetDict, new_label: np.ndarray, names: list[str]) -> DatasetDict:
    return DatasetDict(
        {split: replace_labels(data, new_label[read_labels(data)], names) for split, data in splits.items()}
    )
