"""Pictures listed or packed in files: CSV, TSV, JSONL, Parquet and tar archives in WebDataset's form."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from datasets import Dataset, Image, concatenate_datasets, load_dataset

from ...utils.files import file_digest
from .columns import STRINGS
from .folders import split_of, subfolders
from .text_tables import read_delimited, read_json_lines

_PACKED = {".parquet": "parquet", ".tar": "webdataset"}  # what `datasets` calls the readers
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", *_PACKED)
_SPLIT_COLUMNS = ("split", "splits", "subset", "partition")
_PATH_COLUMNS = ("image", "file_name", "filename", "image_path", "path", "file", "filepath", "img")
_CLASS_LISTS = ("classnames.txt", "class_names.txt", "classes.txt")  # CLIP benchmark's archives have the first


def find_tables(root: Path) -> dict[str, list[Path]]:
    """The files of each split in a folder, by file or folder name; empty if there is no train file.

    Found are "train.csv", "train-00000-of-00002.parquet" and "data/train-0001.tar", and archives "train/0.tar".
    """
    files: dict[str, list[Path]] = {}
    for folder in (root, *(inner for inner in subfolders(root) if inner.name == "data" or split_of(inner.name))):
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() not in TABLE_SUFFIXES or not file.is_file():
                continue
            first_word = file.stem.lower().replace("-", "_").replace(".", "_").split("_")[0]
            split = split_of(first_word) or split_of(folder.name)
            if split:
                files.setdefault(split, []).append(file)
    in_order: dict[str, list[Path]] = {
        split: files[split] for split in ("train", "validation", "test") if split in files
    }
    return in_order if "train" in files else {}


def load_tables(files: dict[str, list[Path]], image_column: str | None = None) -> dict[str, Dataset]:
    """The rows of the files of each split, read through Arrow, with their paths turned into images.

    `image_column`, or else a column of strings named `image`, `file_name`, `path` or the like, holds paths, absolute or
    from the file's own folder (from the folder above for "data/train.csv").

    Raises ValueError for files of several kinds, a file that cannot be read, and paths that lead to no file.
    """
    suffixes = {file.suffix.lower() for part in files.values() for file in part}
    if len(suffixes) > 1:
        raise ValueError(f"the splits come in files of several kinds, {', '.join(sorted(suffixes))}; keep one kind.")
    suffix = suffixes.pop()
    folder = next(iter(files.values()))[0].parent
    loaded = _load_packed(files, suffix) if suffix in _PACKED else _load_text(files, suffix)
    if len(loaded) == 1:
        loaded = _by_split_column(loaded["train"])
    return {split: _with_images(data, folder, image_column) for split, data in loaded.items()}


def _load_text(files: dict[str, list[Path]], suffix: str) -> dict[str, Dataset]:
    read = read_json_lines if suffix == ".jsonl" else read_delimited
    parts = {split: [read(file) for file in part] for split, part in files.items()}
    try:
        return {split: concatenate_datasets(part) for split, part in parts.items()}
    except Exception as error:  # Arrow has errors of its own for columns of several types
        raise ValueError(f"the files {_listed(files)} do not match ({error}); give all the same columns.") from error


def _load_packed(files: dict[str, list[Path]], suffix: str) -> dict[str, Dataset]:
    """Files that may contain the pictures themselves, which `datasets` converts to Arrow files in its cache."""
    content = hashlib.sha256()
    for file in (file for part in files.values() for file in part):
        if suffix == ".tar":
            _check_end(file)
        content.update(file_digest(file))
    try:
        with _uncounted():
            loaded = load_dataset(
                _PACKED[suffix],
                content.hexdigest()[:16],  # else old content with the same time stamp would come from the cache
                data_files={split: [glob.escape(str(file)) for file in part] for split, part in files.items()},
            )
        for part in loaded.values():
            part.data.table.validate(full=True)  # Parquet's strings may not be UTF-8
    except Exception as error:  # every reader has errors of its own, and `datasets` wraps them
        cause = error.__cause__ or error
        raise ValueError(
            f"{_listed(files)} could not be read ({type(cause).__name__}: {cause}); a file may be damaged or cut off: "
            "download or pack it again."
        ) from error
    return dict(loaded)


def _listed(files: dict[str, list[Path]]) -> str:
    return ", ".join(str(file) for part in files.values() for file in part[:3])


def _by_split_column(data: Dataset) -> dict[str, Dataset]:
    """A table's rows by the split that one of its columns names. Raises ValueError for a value that names none."""
    column = next((name for name in data.column_names if name.lower() in _SPLIT_COLUMNS), None)
    if column is None:
        return {"train": data}
    values = data.select_columns(column)[:][column]
    unknown = [value for value in dict.fromkeys(values) if not isinstance(value, str) or split_of(value) is None]
    if unknown:
        raise ValueError(
            f"column {column!r} holds {unknown[0]!r}, which is not a split; write train, val or test in every row, or "
            "rename the column if it is about something else."
        )
    splits = [split_of(value) for value in values]
    if "train" not in splits:
        raise ValueError(f"column {column!r} has no row of the split 'train'; add some.")
    return {
        split: data.select([row for row, own in enumerate(splits) if own == split]).remove_columns(column)
        for split in ("train", "validation", "test")
        if split in splits
    }


@contextmanager
def _uncounted() -> Iterator[None]:
    """Keeps `datasets` from reporting a load to a server, which it does for local files too."""
    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


def _check_end(archive: Path) -> None:
    """Raises ValueError unless a tar archive is complete: cut off between members it would read as a smaller one."""
    with archive.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 512))
        if not compressed and (size % 512 or file.read() != bytes(512)):
            raise ValueError(
                f"{archive} could not be read: it does not end like a tar archive, so it is damaged or cut off; "
                "download or pack it again."
            )


def class_list(files: dict[str, list[Path]]) -> Path | None:
    """The list of class names beside the files or in the folder above."""
    folder = next(iter(files.values()))[0].parent
    candidates = [place / name for place in (folder, folder.parent) for name in _CLASS_LISTS]
    return next((file for file in candidates if file.is_file()), None)


def _with_images(dataset: Dataset, folder: Path, image_column: str | None) -> Dataset:
    if any(isinstance(feature, Image) for feature in dataset.features.values()):
        return dataset
    by_name = {name.lower(): name for name in dataset.column_names}
    candidates = [image_column] if image_column else [by_name.get(name) for name in _PATH_COLUMNS]
    strings = [name for name in candidates if name and dataset.features.get(name) in STRINGS]
    if not strings:
        return dataset  # columns are checked later, as those of all sources
    column = strings[0]
    paths = dataset.select_columns(column)[:][column]
    if os.sep == "/" and any(path and "\\" in path for path in paths):  # written on Windows
        paths = [path and (path if (folder / path).is_file() else path.replace("\\", "/")) for path in paths]
    if not any((folder / path).is_file() for path in paths[:5] if path):
        folder = folder.parent
    missing = [path for path in paths if not path or not os.path.isfile(folder / path)]
    if missing:
        drives = any(path and re.match(r"[A-Za-z]:[\\/]", path) for path in missing)
        remedy = "write them from the table's own folder" if drives else "add them or correct the paths"
        raise ValueError(
            f"column {column!r} names {len(missing)} of {len(dataset)} images that are not in {folder}; the first are "
            f"{', '.join(map(str, missing[:5]))}; {remedy}."
        )
    images = [os.path.join(folder, path) for path in paths]
    place = dataset.column_names.index(column)
    replaced = dataset.remove_columns(column).add_column(column, images).cast_column(column, Image())
    order = [*replaced.column_names[:place], column, *replaced.column_names[place:-1]]
    return replaced.select_columns(order)
