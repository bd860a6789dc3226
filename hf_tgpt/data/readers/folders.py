"""Pictures in folders: `<dir>/{train,val,test}/<class>/*.jpg`, or `<dir>/<class>/*.jpg` without splits.

A folder's list of files is kept as an Arrow file in the cache of `datasets` and read from there memory-mapped, so a
million paths are neither listed twice nor held in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, Value
from tqdm.auto import tqdm

from ...utils.files import read_json

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
# The name that a split gets here, and the names that it goes by elsewhere.
SPLIT_NAMES = {
    "train": "train",
    "val": "validation",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}
_FEATURES = Features({"image": Image(), "label": Value("string")})
_BATCH = 10_000
# A folder that changes within its file system's clock tick after it was listed has the same time stamp as before; the
# coarsest clock, FAT's, ticks every two seconds.
_CLOCK_TICK = 2.0


def load_folder(root: Path) -> dict[str, Dataset]:
    """The splits of a folder with the columns `image` (a path) and `label` (the class folder's name).

    A folder without splits is one split, train. Raises ValueError for a folder that is laid out otherwise.
    """
    split_folders: dict[str, Path] = {}
    for folder in subfolders(root):
        split = SPLIT_NAMES.get(folder.name.lower())
        if split is None or not subfolders(folder):  # a class may be called "train": it has images, not class folders
            continue
        if split in split_folders:
            raise ValueError(
                f"{root} has two {split} folders, {split_folders[split].name} and {folder.name}; keep one."
            )
        split_folders[split] = folder
    if not split_folders and all(folder.name.lower() in SPLIT_NAMES for folder in subfolders(root)):
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
    split_folders = split_folders or {"train": root}
    return {split: _load_class_folders(folder) for split, folder in split_folders.items()}


def _load_class_folders(folder: Path) -> Dataset:
    index = image_index(folder)
    separator = re.escape(os.sep)
    in_train = f"(?i)^{re.escape(str(folder))}{separator}[^{separator}]+{separator}train{separator}"
    for chunk in index.with_format("arrow")["image"][:].chunks:
        split_again = pc.index(pc.match_substring_regex(chunk.field("path"), in_train), True).as_py()
        if split_again >= 0:
            name = Path(chunk.field("path")[split_again].as_py()).relative_to(folder).parts[0]
            raise ValueError(
                f"{folder / name} has splits of its own, so it is no class; pass one such folder as `source`."
            )
    found = set(index.unique("label"))
    for class_folder in subfolders(folder):
        if class_folder.name not in found:
            raise ValueError(
                f"{class_folder} has no images ({', '.join(IMAGE_SUFFIXES)}); add some or remove the folder."
            )
    if "" in found:  # pictures beside the class folders
        loose = index.with_format("arrow")["label"][:].to_numpy(zero_copy_only=False) == ""
        index = index.select((~loose).nonzero()[0])
    return index


def subfolders(parent: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones."""
    with os.scandir(parent) as listing:  # which knows folders from files without a look at each
        return sorted(Path(entry.path) for entry in listing if entry.is_dir() and not entry.name.startswith("."))


def image_index(root: Path) -> Dataset:
    """All images below a folder, sorted: `image` (the absolute path) and `label` (the first folder's name, or "").

    No image is opened. Hidden files and folders are left out, such as the "._*.jpg" that macOS leaves behind. The index
    comes from the cache unless a folder below `root` has changed since.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "hf_tgpt"
    name = hashlib.sha256(str(root).encode()).hexdigest()[:24]
    index, record = cache / f"{name}.arrow", cache / f"{name}.json"
    if not _is_current(index, record):
        cache.mkdir(parents=True, exist_ok=True)
        started = time.time()
        folders: dict[str, int] = {}
        # Written beside and moved, so that another process reads either the old index or the new one.
        draft = index.with_suffix(f".{os.getpid()}")
        schema = _FEATURES.arrow_schema
        with pa.OSFile(str(draft), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in _batches(_walk(str(root), folders), f"indexing {root}"):
                paths = pa.array([path for path, _ in batch], pa.string())
                images = pa.StructArray.from_arrays([pa.nulls(len(batch), pa.binary()), paths], ["bytes", "path"])
                labels = pa.array([label for _, label in batch], pa.string())
                writer.write_batch(pa.record_batch([images, labels], schema=schema))
        os.replace(draft, index)
        draft.write_text(json.dumps({"started": started, "bytes": index.stat().st_size, "folders": folders}))
        os.replace(draft, record)
    return Dataset.from_file(str(index))


def _is_current(index: Path, record: Path) -> bool:
    """Whether every folder that was listed is as old as it was then."""
    if not index.exists() or not record.exists():
        return False
    try:
        known = read_json(record)
        return index.stat().st_size == known.get("bytes") and all(
            os.stat(folder).st_mtime_ns == changed and changed / 1e9 < known["started"] - _CLOCK_TICK
            for folder, changed in known["folders"].items()
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
    ):  # a folder is gone, or the record damaged
        return False


def _walk(folder: str, folders: dict[str, int], label: str | None = None) -> Iterator[tuple[str, str]]:
    """Paths and labels of the images below a folder; notes in `folders` when each one last changed."""
    folders[folder] = os.stat(folder).st_mtime_ns
    with os.scandir(folder) as listing:
        entries = sorted((entry for entry in listing if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=label is None):  # a class may be a link to a folder; deeper, links may go round
            yield from _walk(entry.path, folders, entry.name if label is None else label)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
            yield entry.path, label or ""


def _batches(rows: Iterator[tuple[str, str]], description: str) -> Iterator[list[tuple[str, str]]]:
    """Lists of rows, with a progress bar on a terminal if it takes longer than a second."""
    batch = []
    for row in tqdm(rows, desc=description, unit=" images", delay=1, disable=None):
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch
