"""Where images come from: the toy world, a local folder or the Hub, all brought into one form by `load_splits`."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from .fewshot import read_labels, replace_labels, split_each_class
from .toyworld import load_toyworld

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
CAPTIONS_FILE = "captions.jsonl"
# The name that a split gets here, and the names that it goes by elsewhere.
_SPLIT_NAMES = {
    "train": "train",
    "val": "validation",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}
_LABEL_NAMES = ("label", "labels", "class", "class_name", "fine_label", "category")
_STRINGS = (Value("string"), Value("large_string"))


def load_splits(
    source: str | os.PathLike,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    seed: int = 0,
) -> DatasetDict:
    """The splits `train`, `test` and, where there is one, `validation`, with the columns `image`, `label`[, `caption`].

    `source` is one of
    - "toyworld", "toyworld:TASK" or "toyworld:TASK/DOMAIN";
    - a folder `<dir>/{train,val,test}/<class>/*.jpg`, or `<dir>/<class>/*.jpg` without splits, in both cases with an
      optional `captions.jsonl` of lines {"file_name": path within <dir>, "caption": text} that covers every image;
    - the id of a dataset on the Hub. Its columns are found by their types unless they are named.

    `label` is a ClassLabel whose names are those of the train split, "_" written as a space. Without a test split the
    validation split serves as test, with a warning. Without either, every class is split by `seed` into 50% train,
    20% validation and 30% test, the proportions of CoOp (Zhou et al., IJCV 2022) for datasets without a split.

    Raises FileNotFoundError for a folder that does not exist and ValueError for data that fits none of this.
    """
    source = os.fspath(source)
    if source == "toyworld" or source.startswith("toyworld:"):
        task, _, domain = source.removeprefix("toyworld").removeprefix(":").partition("/")
        raw = dict(load_toyworld(task or "coloured_shapes", domain or "photo"))
    elif source and Path(source).expanduser().is_dir():
        raw = _load_folder(Path(source).expanduser().absolute())
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"`source`={source!r} is not a folder; correct the path, or name a dataset on the Hub.")
    else:
        raw = _load_from_hub(source)

    columns = _find_columns(raw["train"], image_column, label_column, caption_column)
    raw = {split: data for split, data in raw.items() if split == "train" or _is_labelled(data, columns["label"])}
    names = _label_names(raw["train"], columns["label"])
    splits = {split: _to_canonical(raw[split], split, columns, names) for split in raw}
    if "test" not in splits and "validation" in splits:
        warnings.warn(
            f"{source!r} has no test split: its validation split serves as test, so choose no settings by it.",
            stacklevel=2,
        )
        splits["test"] = splits.pop("validation")
    if "test" not in splits:
        splits = split_each_class(splits["train"], seed)
    return DatasetDict({split: splits[split] for split in ("train", "validation", "test") if split in splits})


def class_names(dataset: Dataset) -> list[str]:
    """The class names in label order."""
    return list(dataset.features["label"].names)


# Local folders -------------------------------------------------------------------------------------------------------


def _load_folder(root: Path) -> dict[str, Dataset]:
    """Splits with `image` (a path), `label` (the class folder's name) and, with a captions file, `caption`."""
    split_folders: dict[str, Path] = {}
    for folder in _folders(root):
        split = _SPLIT_NAMES.get(folder.name.lower())
        if split is None or not _folders(folder):  # a class may be called "train": it has images, not class folders
            continue
        if split in split_folders:
            raise ValueError(
                f"{root} has two {split} folders, {split_folders[split].name} and {folder.name}; keep one."
            )
        split_folders[split] = folder
    if not split_folders and all(folder.name.lower() in _SPLIT_NAMES for folder in _folders(root)):
        raise ValueError(f"{root} has no class folders; put the images of each class into a folder of its own.")
    if split_folders and "train" not in split_folders:
        raise ValueError(
            f"{root} has a {next(iter(split_folders))} folder but no train folder with class folders; add it."
        )
    if len(split_folders) == 1:
        raise ValueError(
            f"{root} has a train folder but neither a test nor a val folder with class folders; add one, or pass the "
            "train folder itself to have it split."
        )
    captions = _read_captions(root / CAPTIONS_FILE) if (root / CAPTIONS_FILE).exists() else None
    split_folders = split_folders or {"train": root}
    return {split: _load_class_folders(folder, root, captions) for split, folder in split_folders.items()}


def _load_class_folders(folder: Path, root: Path, captions: dict[str, str] | None) -> Dataset:
    class_folders = _folders(folder)
    if not class_folders:
        raise ValueError(f"{folder} has no class folders; put the images of each class into a folder of its own.")
    paths: list[Path] = []
    labels: list[str] = []
    for class_folder in class_folders:
        if any(_SPLIT_NAMES.get(inner.name.lower()) == "train" for inner in _folders(class_folder)):
            raise ValueError(
                f"{class_folder} has splits of its own, so it is no class; pass one such folder as `source`."
            )
        found = _images(class_folder)
        if not found:
            raise ValueError(
                f"{class_folder} has no images ({', '.join(IMAGE_SUFFIXES)}); add some or remove the folder."
            )
        paths += found
        labels += [class_folder.name] * len(found)
    columns = {"image": [str(path) for path in paths], "label": labels}
    features = {"image": Image(), "label": Value("string")}
    if captions is not None:
        files = [path.relative_to(root).as_posix() for path in paths]
        missing = [file for file in files if file not in captions]
        if missing:
            raise ValueError(
                f"{root / CAPTIONS_FILE} has no caption for {len(missing)} of {len(files)} images in {folder}, the "
                f"first is {missing[0]}; add them or remove the file."
            )
        columns["caption"] = [captions[file] for file in files]
        features["caption"] = Value("string")
    return Dataset.from_dict(columns, features=Features(features))


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """Images at any depth, without hidden ones such as the "._*.jpg" that macOS leaves behind."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _read_captions(file: Path) -> dict[str, str]:
    captions: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, caption = Path(entry["file_name"]).as_posix(), entry["caption"].strip()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{file}, line {number}: {line[:80]!r} is not {{"file_name": path, "caption": text}}; correct it.'
            ) from error
        if not caption or name in captions:
            problem = "is there twice" if caption else "has an empty caption"
            raise ValueError(f"{file}, line {number}: {name} {problem}; give every image one caption.")
        captions[name] = caption
    return captions


# The Hub -------------------------------------------------------------------------------------------------------------


def _load_from_hub(source: str) -> dict[str, Dataset]:
    """The splits under the names that they have here; a split that stands alone is train."""
    try:
        loaded = datasets.load_dataset(source)
    except Exception as error:  # the Hub client, the network and every file format have errors of their own
        raise ValueError(
            f"`source`={source!r} could not be loaded from the Hub ({type(error).__name__}: {error}); it must be "
            "'toyworld:TASK', a folder that exists or the id of a dataset on the Hub."
        ) from error
    if len(loaded) == 1:
        return {"train": next(iter(loaded.values()))}
    splits = {_SPLIT_NAMES[split]: loaded[split] for split in loaded if split in _SPLIT_NAMES}
    if "train" not in splits:
        raise ValueError(f"`source`={source!r} has no split 'train', only {', '.join(loaded)}; use another dataset.")
    return splits


# One form for all ----------------------------------------------------------------------------------------------------


def _find_columns(
    dataset: Dataset, image_column: str | None, label_column: str | None, caption_column: str | None
) -> dict[str, str]:
    """The dataset's names for `image`, `label` and, if it has one, `caption`: as asked for, else by type and name."""
    features = dataset.features
    asked = {"image": image_column, "label": label_column, "caption": caption_column}
    for role, column in asked.items():
        if column is not None and column not in features:
            raise ValueError(
                f"`{role}_column`={column!r} is not a column of the dataset; available: {', '.join(features)}."
            )
    if image_column is not None and not isinstance(features[image_column], Image):
        raise ValueError(f"`image_column`={image_column!r} holds {features[image_column]}; choose a column of images.")
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if caption_column is not None and features[caption_column] not in _STRINGS:
        raise ValueError(
            f"`caption_column`={caption_column!r} holds {features[caption_column]}; choose one of strings."
        )
    labels = labels or [name for name in _LABEL_NAMES if name in features]
    columns = {
        "image": image_column or _only_one("image", images, list(features)),
        "label": label_column or _only_one("label", labels, list(features)),
    }
    if caption_column or (features.get("caption") in _STRINGS and columns["label"] != "caption"):
        columns["caption"] = caption_column or "caption"
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


def _label_names(train: Dataset, column: str) -> list[str]:
    """The classes as the source writes them: a ClassLabel's own, else the sorted strings of the train split."""
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        return feature.names
    if feature not in _STRINGS:
        raise ValueError(
            f"`label_column`={column!r} holds {feature}, which name no classes; choose class labels or strings."
        )
    return sorted(name for name in train.unique(column) if name is not None)


def _is_labelled(dataset: Dataset, column: str) -> bool:
    """False for a split whose labels are kept back, as benchmarks with a leaderboard do: the Hub writes them as -1."""
    return column not in dataset.column_names or not set(dataset.unique(column)) <= {-1, None}


def _to_canonical(dataset: Dataset, split: str, columns: dict[str, str], names: list[str]) -> Dataset:
    missing = [column for column in columns.values() if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"the {split} split has no column {missing[0]!r}; available: {', '.join(dataset.column_names)}."
        )
    dataset = dataset.select_columns(list(columns.values())).rename_columns({old: new for new, old in columns.items()})
    feature = dataset.features["label"]
    if isinstance(feature, ClassLabel):
        written = [feature.names[label] for label in read_labels(dataset)]
    else:
        written = dataset["label"][:]
    known = {name: label for label, name in enumerate(names)}
    for row, name in enumerate(written):
        if name not in known:
            raise ValueError(
                f"`label`={name!r} in row {row} of the {split} split is no class of the train split; "
                "add such images to train or remove these."
            )
    if "caption" in dataset.column_names and None in (captions := dataset["caption"][:]):
        raise ValueError(
            f"`caption`=None in row {captions.index(None)} of the {split} split; caption all images or drop the column."
        )
    words = [name.replace("_", " ") for name in names]
    twins = [name for name, word in zip(names, words, strict=True) if words.count(word) > 1]
    if twins:
        raise ValueError(f"`label` has classes that differ only in '_' and ' ': {', '.join(twins)}; rename one.")
    return replace_labels(dataset, np.array([known[name] for name in written], dtype=np.int64), words)
