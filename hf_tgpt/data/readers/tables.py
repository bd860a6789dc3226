"""Pictures listed or packed in files: CSV, TSV, JSONL, Parquet and tar archives in WebDataset's form."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from datasets import Dataset, Image, load_dataset

from ...utils.files import parse_json
from .columns import STRINGS
from .folders import split_of, subfolders

# What `datasets` calls the readers.
_READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".parquet": "parquet", ".tar": "webdataset"}
TABLE_SUFFIXES = tuple(_READERS)
_PATH_COLUMNS = ("image", "file_name", "filename", "image_path", "path", "file", "filepath", "img")
_CLASS_LISTS = ("classnames.txt", "class_names.txt", "classes.txt")  # CLIP benchmark's archives have the first


def find_tables(root: Path) -> dict[str, list[Path]]:
    """The files of each split in a folder, by its own and its folder's name; empty if there is no train file.

    Found are "train.csv", "train-00000-of-00002.parquet" and "data/train-0001.tar", and archives "train/0.tar".
    """
    found: dict[str, list[Path]] = {}
    for folder in (root, *(inner for inner in subfolders(root) if inner.name == "data" or split_of(inner.name))):
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() not in TABLE_SUFFIXES or not file.is_file():
                continue
            first_word = file.stem.lower().replace("-", "_").replace(".", "_").split("_")[0]
            split = split_of(first_word) or split_of(folder.name)
            if split:
                found.setdefault(split, []).append(file)
    in_order: dict[str, list[Path]] = {
        split: found[split] for split in ("train", "validation", "test") if split in found
    }
    return in_order if "train" in found else {}


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
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    listed = {split: [str(file) for file in part] for split, part in files.items()}
    check = {".tar": _check_end, ".jsonl": _check_lines}.get(suffix, lambda file: None)
    for file in (file for part in files.values() for file in part):
        check(file)
    try:
        with _uncounted():
            loaded = load_dataset(_READERS[suffix], data_files=listed, **options)
        for part in loaded.values():
            part.data.table.validate(full=True)  # Parquet's strings may be no UTF-8
    except Exception as error:  # every reader has errors of its own, and `datasets` wraps them
        cause = error.__cause__ or error
        raise ValueError(
            f"{', '.join(file for part in listed.values() for file in part[:3])} could not be read "
            f"({type(cause).__name__}: {cause}); a file may be damaged or cut off: download or pack it again."
        ) from error
    return {split: _with_images(data, files[split][0].parent, image_column) for split, data in loaded.items()}


@contextmanager
def _uncounted() -> Iterator[None]:
    """Keeps `datasets` from telling a server of a load, which it does of local files too."""
    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


def _check_end(archive: Path) -> None:
    """Raises ValueError unless a tar archive is whole: cut off between two members it would read as a smaller one."""
    with archive.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 512))
        if not compressed and (size % 512 or file.read() != bytes(512)):
            raise ValueError(
                f"{archive} could not be read: it does not end as a tar archive does, so it is damaged or cut off; "
                "download or pack it again."
            )


def _check_lines(file: Path) -> None:
    """Raises ValueError for a line that is no JSON object: of those some crash Arrow's reader, as deep nesting does."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip() and not isinstance(parse_json(line, f"{file}, line {number}"), dict):
                raise ValueError(f"{file}, line {number}: {line[:80]!r} is no JSON object; correct it.")


def class_list(files: dict[str, list[Path]]) -> Path | None:
    """The list of class names that lies beside the files or in the folder above."""
    folder = next(iter(files.values()))[0].parent
    candidates = [place / name for place in (folder, folder.parent) for name in _CLASS_LISTS]
    return next((file for file in candidates if file.is_file()), None)


def _with_images(dataset: Dataset, folder: Path, image_column: str | None) -> Dataset:
    if any(isinstance(feature, Image) for feature in dataset.features.values()):
        return dataset
    strings = [
        name for name in ((image_column,) if image_column else _PATH_COLUMNS) if dataset.features.get(name) in STRINGS
    ]
    if not strings:
        return dataset  # the columns are judged where all sources' are
    column = strings[0]
    if not any((folder / path).is_file() for path in dataset[column][:5] if path):
        folder = folder.parent
    missing = 0
    first: list[str] = []
    for batch in dataset.select_columns(column).iter(10_000):
        lost = [path for path in batch[column] if not path or not os.path.isfile(folder / path)]
        missing, first = missing + len(lost), [*first, *lost][:5]
    if missing:
        raise ValueError(
            f"column {column!r} names {missing} of {len(dataset)} images that are not in {folder}; the first are "
            f"{', '.join(map(str, first))}; add them or correct the paths."
        )
    root = str(folder)
    dataset = dataset.map(
        lambda paths: {column: [os.path.join(root, path) for path in paths]},
        batched=True, input_columns=column, desc="reading paths",
    )  # fmt: skip
    return dataset.cast_column(column, Image())
