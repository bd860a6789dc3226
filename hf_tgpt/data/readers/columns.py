"""The columns `image`, `label` and `caption`, found in any dataset and converted to a common form."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value

from ..fewshot import replace_labels
from ..remarks import count

_LABEL_NAMES = ("label", "labels", "class", "class_name", "fine_label", "category", "cls")
_CAPTION_NAMES = ("caption", "txt")
STRINGS = (Value("string"), Value("large_string"))


def find_columns(
    dataset: Dataset, image_column: str | None, label_column: str | None, caption_column: str | None
) -> dict[str, str]:
    """The dataset's names for `image`, `label` and, if it has one, `caption`: as asked for, else by type and name."""
    features = dataset.features
    named = {"image": image_column, "label": label_column, "caption": caption_column}
    for role, column in named.items():
        if column is not None and column not in features:
            raise ValueError(
                f"`{role}_column`={column!r} is not a column of the dataset; available: {', '.join(features)}."
            )
    if image_column is not None and not isinstance(features[image_column], Image):
        raise ValueError(f"`image_column`={image_column!r} holds {features[image_column]}; choose a column of images.")
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if caption_column is not None and features[caption_column] not in STRINGS:
        raise ValueError(
            f"`caption_column`={caption_column!r} holds {features[caption_column]}; choose a column of strings."
        )
    by_name = {name.lower(): name for name in features}
    labels = labels or [by_name[name] for name in _LABEL_NAMES if name in by_name]
    columns = {
        "image": image_column or _only_one("image", images, list(features)),
        "label": label_column or _only_one("label", labels, list(features)),
    }
    captions = [by_name[name] for name in _CAPTION_NAMES if name in by_name]
    captions = [name for name in captions if features[name] in STRINGS and columns["label"] != name]
    if caption_column or captions:
        columns["caption"] = caption_column or captions[0]
    if len(set(columns.values())) < len(columns):
        asked_for = ", ".join(f"`{role}_column`={column!r}" for role, column in columns.items())
        raise ValueError(f"{asked_for} name one column twice; choose different ones.")
    return columns


def _only_one(role: str, candidates: list[str], available: list[str]) -> str:
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise ValueError(f"`{role}_column`=None but several columns fit: {', '.join(candidates)}; name one of them.")
    raise ValueError(f"`{role}_column`=None and no column holds the {role}; name one of: {', '.join(available)}.")


def label_names(dataset: Dataset, column: str, numbered: list[str] | None) -> list[str]:
    """The classes as the source writes them: a ClassLabel's own, the sorted strings, or for numbers `numbered`."""
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return feature.names
    if numbered is not None and pa.types.is_integer(dataset.data.schema.field(column).type):
        return numbered
    if feature not in STRINGS:
        raise ValueError(
            f"`label_column`={column!r} holds {feature}, which does not name classes; choose class labels or strings, "
            "or list the names of the numbers as `class_names_file`."
        )
    names = [name for name in dataset.unique(column) if name is not None and name.strip()]
    numbers = all(name.isdecimal() for name in names)  # folders 0 to 10, in the order of a list of names
    return sorted(names, key=(lambda name: (int(name), name)) if numbers else None)


def is_labelled(dataset: Dataset, column: str) -> bool:
    """False for a split whose labels are secret, as in benchmarks with a leaderboard: on the Hub they are -1."""
    return column not in dataset.column_names or not set(dataset.unique(column)) <= {-1, None}


def to_canonical(dataset: Dataset, split: str, columns: dict[str, str], names: list[str], words: list[str]) -> Dataset:
    """One split with our columns: `names` are the source's class names, `words` the names used here.

    Raises ValueError for a missing column or a class that `names` lacks.
    """
    columns = {new: old for new, old in columns.items() if new != "caption" or old in dataset.column_names}
    missing = [column for column in columns.values() if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"the {split} split has no column {missing[0]!r}; available: {', '.join(dataset.column_names)}."
        )
    dataset = dataset.select_columns(list(columns.values())).rename_columns({old: new for new, old in columns.items()})
    feature = dataset.features["label"]
    # In Arrow and numpy: a million labels would be a million Python objects.
    written = dataset.select_columns("label").with_format("arrow")[:]["label"]
    empty = written.is_null()
    if pa.types.is_string(written.type) or pa.types.is_large_string(written.type):
        empty = pc.or_kleene(empty, pc.equal(pc.utf8_trim_whitespace(written), ""))
    if rows := int(pc.sum(empty).as_py() or 0):
        first = pc.index(empty, True).as_py()
        raise ValueError(
            f"`label`={written[first].as_py()!r} in row {first} of the {split} split, counted from 0 without a header: "
            f"{count(rows, 'row')} without a label in {columns['label']!r}; fill in labels, or remove these rows."
        )
    if pa.types.is_integer(written.type):
        own = feature.names if isinstance(feature, ClassLabel) else names
        known = {name: label for label, name in enumerate(names)}
        place = np.array([known.get(name, -1) for name in own] + [-1])  # the last is for labels that mean nothing
        labels = pc.fill_null(written, -1).to_numpy()
        labels = place[np.where((labels >= 0) & (labels < len(own)), labels, len(own))]
    else:
        labels = pc.fill_null(pc.index_in(written, pa.array(names, written.type)), -1).to_numpy().astype(np.int64)
    if len(unknown := np.flatnonzero(labels < 0)):
        row = int(unknown[0])
        name = written[row].as_py()
        if isinstance(feature, ClassLabel) and name is not None and 0 <= name < feature.num_classes:
            name = feature.names[name]
        raise ValueError(
            f"`label`={name!r} in row {row} of the {split} split is not a class of the train split; "
            "add such images to train or remove these."
        )
    return replace_labels(dataset, labels, words)


def check_captions(splits: DatasetDict) -> None:
    """Drops incomplete captions outside the train split. Raises ValueError if train lacks any."""
    for split, data in splits.items():
        if "caption" not in data.column_names:
            continue
        captions = data.select_columns("caption").with_format("arrow")[:]["caption"]
        if not captions.null_count:
            continue
        if split != "train":
            splits[split] = data.remove_columns("caption")
            continue
        row = pc.index(captions.is_null(), True).as_py()
        raise ValueError(
            f"`caption`=None in row {row} of the {split} split, as in {captions.null_count} of {len(captions)}; "
            "caption all images or drop the column."
        )
