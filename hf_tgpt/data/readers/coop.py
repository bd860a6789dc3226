"""Published partitions: the `split_zhou_*.json` files of CoOp and fixed few-shot draws from them.

Source: CoOp (Zhou et al., IJCV 2022) and its release, https://github.com/KaiyangZhou/CoOp.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from ...utils.files import read_json
from ...utils.names import composed
from ..class_lists import normalized_name
from ..remarks import remark
from .folders import image_index

_SPLITS = ("train", "val", "test")
_Entry = tuple[str, int, str]  # path, label, class name


def load_coop_split(split_file: str | os.PathLike[str], images: str | os.PathLike[str]) -> DatasetDict:
    """CoOp's partition of the pictures in a folder: those of the splits `train`, `val` and `test` that the file has.

    `split_file` contains {"train": [[path, label, class name], ...], "val": ..., "test": ...}; a few-shot draw in the
    form {"train": {"data": [{"impath", "label", "classname"}, ...]}, "val": ...} is also accepted. `images` is a folder
    with the pictures at any depth. Where folders were renamed or files moved, a picture is found by its file name and
    class: "Faces/image_0012.jpg" of the class "face" is also "train/face/image_0012.jpg" and
    "train/face/Faces_image_0012.jpg".

    The columns are `image` and `label`, a ClassLabel with the file's own class names in the file's label order; rows
    are in the file's order.

    Raises FileNotFoundError for a missing file or folder, and ValueError for a damaged file, labels and class names
    that do not match, class names without a matching folder, and pictures that are missing or ambiguous.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> cut = {"train": [["cat/0.jpg", 0, "cat"]], "test": [["dog/1.jpg", 1, "dog"], ["cat/1.jpg", 0, "cat"]]}
        >>> written = Path("split.json").write_text(json.dumps(cut))
        >>> splits = hf_tgpt.data.load_coop_split("split.json", "pictures/train")
        >>> splits["test"]["label"][:]
        [1, 0]
    """
    split_file, images = Path(split_file).expanduser(), Path(images).expanduser().absolute()
    if not images.is_dir():
        raise FileNotFoundError(f"`images`={str(images)!r} is not a folder; correct the path.")
    entries = _read_split_file(split_file)
    names = _class_names(entries, split_file)
    _warn_of_repeated_paths(entries, split_file)
    everything = [entry for split in entries.values() for entry in split]
    index = image_index(images)
    files = index.with_format("arrow")["image"][:]
    files = (
        pa.chunked_array([chunk.field("path") for chunk in files.chunks]) if len(index) else pa.array([], pa.string())
    )
    wanted = [(path, name) for path, _, name in everything]
    rows = match_images(wanted, split_file, _strings(files), root=str(images))
    _require_all(everything, rows, split_file, images, index)

    splits, start = {}, 0
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    for split, part in entries.items():
        paths = files.take(pa.array(rows[start : start + len(part)], pa.int64())).to_pylist()
        labels = [label for _, label, _ in part]
        splits[split] = Dataset.from_dict({"image": paths, "label": labels}, features=features)
        start += len(part)
    return DatasetDict(splits)


def select_draw(draw_file: str | os.PathLike[str], splits: DatasetDict) -> DatasetDict:
    """The splits with `train` and `validation` reduced to a published few-shot draw; other splits are unchanged.

    `draw_file` has either of the forms that `load_coop_split` accepts. Its pictures are found in the splits by path,
    or by file name and class, and keep the splits' labels. A draw has k pictures of every class for training and
    min(4, k) for validation.

    Raises FileNotFoundError for a missing file and ValueError for pictures that are not in the splits.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> draw = {"data": [{"impath": "train/cat/0.jpg", "label": 0, "classname": "cat"}]}
        >>> written = Path("draw.json").write_text(json.dumps({"train": draw, "val": {"data": []}}))
        >>> drawn = hf_tgpt.data.select_draw("draw.json", hf_tgpt.data.load_splits("pictures"))
        >>> len(drawn["train"]), len(drawn["test"])
        (1, 4)
    """
    draw_file = Path(draw_file).expanduser()
    drawn = _read_split_file(draw_file)
    chosen = dict(splits)
    for file_split, split in {"train": "train", "val": "validation"}.items():
        if file_split not in drawn or split not in splits:
            continue
        names = splits[split].features["label"].names
        paths = image_paths(splits[split])
        classes = [names[label] for label in splits[split]["label"]]
        wanted = [(path, name) for path, _, name in drawn[file_split]]
        rows = match_images(wanted, draw_file, paths, classes=classes)
        missing = [entry[0] for entry, row in zip(drawn[file_split], rows, strict=True) if row is None]
        if missing:
            raise ValueError(
                f"{draw_file} draws {len(missing)} of {len(rows)} pictures that the {split} split does not have, the "
                f"first are {', '.join(missing[:5])}; use the draw with the split that it was made from."
            )
        chosen[split] = splits[split].select(rows)
    return DatasetDict(chosen)


def image_paths(dataset: Dataset) -> list[str]:
    """The path of every image, "" for one without."""
    images = dataset.select_columns("image").cast_column("image", Image(decode=False)).with_format("arrow")
    return [path or "" for chunk in images["image"][:].chunks for path in chunk.field("path").to_pylist()]


# Finding pictures ----------------------------------------------------------------------------------------------------


def match_images(
    wanted: Sequence[tuple[str, str | None]],
    listed_in: Path,
    files: Iterable[str],
    root: str = "",
    classes: list[str] | None = None,
) -> list[int | None]:
    """For each (path, class name or None) that a file lists, the position in `files` of the picture it means, or None.

    A file fits if it has the same name and parent folder, or "folder_name" as its name, or the same name and a folder
    (with `classes`, a class) named like the wanted class. A bare file name alone fits too. Of several, the one that
    shares the most folders is chosen, then the one of the right class.

    Raises ValueError where several fit equally well.
    """
    keys: dict[str, list[int]] = defaultdict(list)
    parts = [Path(composed(path)).parts for path, _ in wanted]
    for position, part in enumerate(parts):
        for key in {part[-1], "_".join(part[-2:])} if part else ():
            keys[key].append(position)
    best: list[tuple[tuple[int, bool], list[int]]] = [((0, False), []) for _ in wanted]
    root = composed(root)
    for row, file in enumerate(map(composed, files)):
        name = os.path.basename(file)
        for position in keys.get(name, ()):
            part, class_name = parts[position], wanted[position][1]
            folders = Path(os.path.relpath(file, root) if root else file).parts
            shared = 0
            while shared < min(len(part), len(folders)) and part[-1 - shared] == folders[-1 - shared]:
                shared += 1
            if name != part[-1]:  # "folder_name"
                shared = 2
            around = [classes[row]] if classes else folders[:-1]
            right = class_name is not None and normalized_name(class_name) in map(normalized_name, around)
            if shared >= min(2, len(part)) or right:
                score = (shared, right)
                if score > best[position][0]:
                    best[position] = (score, [row])
                elif score == best[position][0]:
                    best[position][1].append(row)
    for (path, _), (_, rows) in zip(wanted, best, strict=True):
        if len(rows) > 1:
            raise ValueError(
                f"{str(listed_in)!r}: {path} could be any of {len(rows)} pictures; keep its folder's name in the path."
            )
    return [rows[0] if rows else None for _, rows in best]


def _strings(column: pa.ChunkedArray | pa.Array) -> Iterable[str]:
    """The strings of a column, one batch at a time."""
    for start in range(0, len(column), 10_000):
        yield from column.slice(start, 10_000).to_pylist()


def _require_all(entries: list[_Entry], rows: list[int | None], split_file: Path, images: Path, index: Dataset) -> None:
    """Raises ValueError for pictures that were not found, in terms of classes if whole classes are missing."""
    lost = [entry for entry, row in zip(entries, rows, strict=True) if row is None]
    if not lost:
        return
    classes_found = {name for (_, _, name), row in zip(entries, rows, strict=True) if row is not None}
    strangers = sorted({name for _, _, name in lost} - classes_found)
    # Pictures' parent folders that match no class or folder in the split file.
    known = {normalized_name(word) for path, _, name in entries for word in (name, *Path(path).parts[-2:-1])}
    paths = _strings(pa.chunked_array([c.field("path") for c in index.with_format("arrow")["image"][:].chunks]))
    unused = sorted({folder for path in paths if normalized_name(folder := Path(path).parent.name) not in known})
    unused = [folder for folder in unused if folder != images.name]
    problem = (
        f"{split_file} names {len(lost)} of {len(entries)} images that are not in {images}; the first are "
        f"{', '.join(path for path, _, _ in lost[:5])}."
    )
    if strangers and unused:
        problem += (
            f" Class names differ: no folder is named like the file's {', '.join(strangers[:5])}, and no class like "
            f"the folder's {', '.join(unused[:5])}; rename the folders."
        )
    else:
        problem += " Add them, or pass the folder that the split file was made for."
    raise ValueError(problem)


# Reading split files -------------------------------------------------------------------------------------------------


def _read_split_file(file: Path) -> dict[str, list[_Entry]]:
    if not file.is_file():
        raise FileNotFoundError(f"The split file {str(file)!r} does not exist; correct the path.")
    try:
        content = read_json(file)
        splits: dict[str, list[_Entry]] = {}
        for split in _SPLITS:
            if split not in content:
                continue
            rows = content[split]
            if isinstance(rows, dict):
                rows = [(row["impath"], row["label"], row["classname"]) for row in rows["data"]]
            splits[split] = [(str(path), int(label), str(name)) for path, label, name in rows]
        if not splits.get("train"):
            raise ValueError("there are no training images")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f'{file} is not a split file ({error}); it must hold {{"train": [[path, label, class name], ...], '
            '"val": ..., "test": ...}.'
        ) from error
    return splits


def _class_names(entries: dict[str, list[_Entry]], file: Path) -> list[str]:
    """The class names in label order."""
    names: dict[int, str] = {}
    for part in entries.values():
        for path, label, name in part:
            if names.setdefault(label, name) != name:
                raise ValueError(f"{file} calls label {label} both {names[label]!r} and {name!r} ({path}); correct it.")
    if sorted(names) != list(range(len(names))):
        raise ValueError(
            f"{file} has {len(names)} classes but labels from {min(names)} to {max(names)}; number from 0."
        )
    if len(set(names.values())) < len(names):
        twin = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise ValueError(f"{file} gives several labels to the class {twin!r}; give it one.")
    return [names[label] for label in range(len(names))]


def _warn_of_repeated_paths(entries: dict[str, list[_Entry]], file: Path) -> None:
    train = {path for path, _, _ in entries["train"]}
    repeated = sum(path in train for path, _, _ in entries.get("test", []))
    if repeated:
        remark(f"{file} has {repeated} images both in train and in test: the test accuracy will be too high.")
