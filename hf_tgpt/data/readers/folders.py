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
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from tqdm.auto import tqdm

from ...utils.files import read_json
from ...utils.names import composed, unreadable_name
from ..images import HEIC_REMEDY, reads_heic
from ..remarks import count, remark

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".webp", ".gif", ".tif", ".tiff", ".avif",
    ".jp2", ".ppm", ".pgm",
)  # fmt: skip
HEIC_SUFFIXES = (".heic", ".heif")  # if a library for them is installed
# The names that a split goes by, without words such as "set" and "images" after them.
_SPLIT_NAMES = {
    "train": ("train", "training", "trn"),
    "validation": ("val", "valid", "validation", "validate", "validating", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst", "holdout", "heldout"),
}
_SPLIT_WORDS = r"(set|sets|split|data|images|imgs|pictures|pics)*$"
# Folders that operating systems and programs leave among pictures; in lower case.
_SYSTEM_FOLDERS = {
    "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "lost+found", "__macosx",
    "__pycache__", "system volume information",
}  # fmt: skip
_BY_PRODUCTS = ("thumbs.db", "desktop.ini")
_INDEX_VERSION = 3
# Of a training, a check, an evaluation or a suggestion; such a folder is its output.
_RUN_FILES = ("run.json", "adapter_config.json", "check.json", "evaluation.json", "suggest.json")
_FEATURES = Features({"image": Image(), "label": Value("string")})
_BATCH = 10_000
_KINDS = 20  # of files left out, that a remark lists
# A folder that changes within its file system's clock tick after it was listed has the same time stamp as before; the
# coarsest clock, FAT's, ticks every two seconds.
_CLOCK_TICK = 2.0


def split_of(name: str) -> str | None:
    """The split that a folder, file or column value is named after: "Testing" and "test_set" are "test"."""
    word = re.sub(_SPLIT_WORDS, "", re.sub(r"[\W_]", "", name.casefold()))
    return next((split for split, names in _SPLIT_NAMES.items() if word in names), None)


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Whether a file counts as a picture: by its suffix or, if it has none, by its first bytes."""
    return os.path.isfile(path) and _looks_like_a_picture(path)


def _looks_like_a_picture(path: str | os.PathLike[str]) -> bool:
    if suffix := os.path.splitext(path)[1].lower():
        return suffix in IMAGE_SUFFIXES or (suffix in HEIC_SUFFIXES and reads_heic())
    try:
        with PILImage.open(path):
            return True
    except Exception:  # Pillow raises nearly anything
        return False


def load_folder(root: Path) -> dict[str, Dataset]:
    """The splits of a folder with the columns `image` (a path) and `label` (the class folder's name in Unicode's NFC).

    A folder without splits is one split, train. Raises ValueError for any other layout.
    """
    split_folders: dict[str, Path] = {}
    for folder in subfolders(root):
        split = split_of(folder.name)
        if split is None or not subfolders(folder):  # a class may be called "train": it has images, not class folders
            continue
        if split in split_folders:
            raise ValueError(
                f"{root} has two {split} folders, {split_folders[split].name} and {folder.name}; keep one."
            )
        split_folders[split] = folder
    if not split_folders and all(split_of(folder.name) for folder in subfolders(root)):
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
    if not split_folders:
        return {"train": _load_class_folders(root, "train")}
    if others := [folder.name for folder in subfolders(root) if folder not in split_folders.values()]:
        remark(f"{root}: beside the folders of its splits, these are left out: {', '.join(others[:10])}.")
    return {split: _load_class_folders(folder, split) for split, folder in split_folders.items()}


def _load_class_folders(folder: Path, split: str) -> Dataset:
    index = image_index(folder)
    separator = re.escape(os.sep)
    in_train = f"(?i)^{re.escape(str(folder))}{separator}[^{separator}]+{separator}train{separator}"
    for chunk in index.with_format("arrow")["image"][:].chunks:
        split_again = pc.index(pc.match_substring_regex(chunk.field("path"), in_train), True).as_py()
        if split_again >= 0:
            name = Path(chunk.field("path")[split_again].as_py()).relative_to(folder).parts[0]
            raise ValueError(
                f"{folder / name} has splits of its own, so it is not a class; pass one such folder as `source`."
            )
    labels = set(index.unique("label"))
    empty = [class_folder for class_folder in subfolders(folder) if composed(class_folder.name) not in labels]
    if not labels - {""}:
        raise ValueError(
            f"{folder} has no images in class folders ({', '.join(IMAGE_SUFFIXES)}); put those of each class into a "
            "folder of its own."
        )
    if empty:
        remark(
            f"{folder}: {count(len(empty), 'class folder')} left out, for lack of a picture: "
            f"{', '.join(class_folder.name for class_folder in empty[:10])}."
        )
    _judge_inner_folders(folder)
    if left_out := _read_record(folder)["left_out"]:
        remark(f"{folder}: {kinds_left_out(left_out)}")
    if "" in labels:
        loose = index.with_format("arrow")["label"][:].to_numpy(zero_copy_only=False) == ""
        remark(f"{folder}: {count(loose.sum(), 'picture')} left out, outside the class folders.")
        index = index.select((~loose).nonzero()[0])
    return index


def kinds_left_out(counts: dict[str, int]) -> str:
    """How many files of which kinds are left out because they are not pictures, and what to do about it."""
    ordered = sorted(counts.items())
    kinds = ", ".join(f"{count} {kind}" for kind, count in ordered[:_KINDS])
    kinds += f", and {rest} of other kinds" if (rest := sum(count for _, count in ordered[_KINDS:])) else ""
    heic = "" if reads_heic() or not counts.keys() & set(HEIC_SUFFIXES) else f" ({HEIC_REMEDY} reads .heic)"
    return f"left out: {kinds}{heic}; save pictures of other kinds as JPEG or PNG to have them read."


def _judge_inner_folders(folder: Path) -> None:
    """Remarks that folders within class folders are not classes of their own.

    Raises ValueError if several of them contain the same folders: these are splits, whatever their names.
    """
    inner: dict[str, list[str]] = {}
    for path in _read_record(folder)["folders"]:
        if len(parts := Path(os.path.relpath(path, folder)).parts) == 2:
            inner.setdefault(parts[0], []).append(parts[1])
    with_same: dict[tuple[str, ...], list[str]] = {}
    for outer, names in inner.items():
        with_same.setdefault(tuple(sorted(composed(name).casefold() for name in names)), []).append(outer)
    for classes, outer_names in with_same.items():
        if len(classes) > 1 and len(outer_names) > 1:
            raise ValueError(
                f"{folder}: {', '.join(outer_names[:5])} contain the same folders ({', '.join(classes[:5])}), so they "
                "look like splits, not classes. If they are splits, call them train, val and test; if they are "
                "classes, put their pictures directly into them."
            )
    if len({name for names in inner.values() for name in names}) > 1:
        examples = "; ".join(f"{outer}: {', '.join(names[:3])}" for outer, names in list(inner.items())[:3])
        remark(
            f"{folder}: {len(inner)} class folders contain folders themselves ({examples}), whose pictures count as "
            "the outer folder's class. If the inner folders are the classes, move them up one level."
        )


def subfolders(parent: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones, system folders and the output of training runs."""
    with os.scandir(parent) as listing:  # which tells folders from files without a system call for each
        folders = [entry for entry in listing if entry.is_dir() and not _is_no_data(entry)]
    return sorted(Path(entry.path) for entry in folders if not unreadable_name(entry.name))


def _is_no_data(entry: os.DirEntry[str]) -> bool:
    """Whether a folder or file is not the user's own: hidden, the system's, or a training run's output."""
    if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FOLDERS:
        return True
    if not entry.is_dir():
        return False
    places = [Path(entry.path)]
    if entry.name == "runs":
        places += Path(entry.path).iterdir()
    return any((place / name).is_file() for place in places for name in _RUN_FILES)


def pictures_below(folder: str) -> tuple[list[str], dict[str, int]]:
    """The pictures in a folder at any depth, in the order of their names, by the same rule as in training.

    Hidden files and system folders are left out. Also returns how many files of which kinds are not pictures.
    """
    left_out: Counter[str] = Counter()
    return [path for path, _ in _walk(folder, {}, left_out, label="")], dict(left_out)


def image_index(root: Path) -> Dataset:
    """All images below a folder, sorted: `image` (the absolute path) and `label` (the first folder's name, or "").

    No image is opened. Hidden files and folders are left out, such as the "._*.jpg" that macOS leaves behind, and so
    are those of systems. The index comes from the cache unless a folder below `root` has changed since.
    """
    if name := unreadable_name(str(root)):
        raise ValueError(f"The path {name} is not UTF-8; rename its folders.")
    index, record = _cache_files(root)
    if not _is_current(index, record):
        index.parent.mkdir(parents=True, exist_ok=True)
        started = time.time()
        folders: dict[str, int] = {}
        left_out: Counter[str] = Counter()
        # Written to another name and moved, so that another process reads either the old index or the new one.
        draft = index.with_suffix(f".{os.getpid()}")
        schema = _FEATURES.arrow_schema
        with pa.OSFile(str(draft), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in _batches(_walk(str(root), folders, left_out), f"indexing {root}"):
                paths = pa.array([path for path, _ in batch], pa.string())
                images = pa.StructArray.from_arrays([pa.nulls(len(batch), pa.binary()), paths], ["bytes", "path"])
                labels = pa.array([label for _, label in batch], pa.string())
                writer.write_batch(pa.record_batch([images, labels], schema=schema))
        os.replace(draft, index)
        about = {"started": started, "bytes": index.stat().st_size, "folders": folders, "left_out": left_out}
        draft.write_text(json.dumps(about))
        os.replace(draft, record)
    return Dataset.from_file(str(index))


def _cache_files(root: Path) -> tuple[Path, Path]:
    """Where a folder's index is stored, and the record of what it was made from."""
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "hf_tgpt"
    name = hashlib.sha256(f"{root} {_INDEX_VERSION} {reads_heic()}".encode(errors="surrogateescape")).hexdigest()[:24]
    return cache / f"{name}.arrow", cache / f"{name}.json"


def _read_record(root: Path) -> dict[str, Any]:
    return read_json(_cache_files(root)[1])


def _is_current(index: Path, record: Path) -> bool:
    """Whether no folder that was listed has changed since."""
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


def _walk(
    folder: str, folders: dict[str, int], left_out: Counter[str], label: str | None = None
) -> Iterator[tuple[str, str]]:
    """Paths and labels of the images below a folder.

    Notes in `folders` when each one last changed, and in `left_out` how many files of a kind are not images.
    """
    folders[folder] = os.stat(folder).st_mtime_ns
    with os.scandir(folder) as listing:
        entries = sorted((entry for entry in listing if not _is_no_data(entry)), key=lambda entry: entry.name)
    for entry in entries:
        if name := unreadable_name(entry.name):
            left_out[f"{name} (its name is not UTF-8; rename it)"] += 1
        elif entry.is_dir(follow_symlinks=label is None):  # a class may be a link; deeper links may form a loop
            inner_label = composed(entry.name) if label is None else label
            yield from _walk(entry.path, folders, left_out, inner_label)
        elif entry.is_file() and _looks_like_a_picture(entry.path):
            yield entry.path, label or ""
        elif label is not None and not entry.is_file():
            left_out[f"{entry.name!r} (a pipe, a device or a link that leads nowhere)"] += 1
        elif label is not None and entry.name.lower() not in _BY_PRODUCTS:
            left_out[os.path.splitext(entry.name)[1].lower() or "without suffix"] += 1


def _batches(rows: Iterator[tuple[str, str]], description: str) -> Iterator[list[tuple[str, str]]]:
    """Lists of rows, with a progress bar on a terminal if it takes longer than a second."""
    batch = []
    for row in tqdm(rows, desc=description, unit=" images", delay=1, disable=None):
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch
