"""Where images come from, all brought into one form by `load_splits`."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict

from .benchmarks import Benchmark, find_benchmark, nearest_benchmarks
from .class_lists import (
    clean_class_names,
    drop_empty_classes,
    normalized_name,
    read_class_names,
    rename_by_position,
    rename_classes,
)
from .damage import without_damaged
from .duplicates import remark_on_duplicates
from .fewshot import split_each_class
from .readers.captions import caption_folder
from .readers.columns import check_captions, find_columns, is_labelled, label_names, to_canonical
from .readers.coop import load_coop_split, select_draw
from .readers.folders import load_folder, split_of, subfolders
from .readers.tables import TABLE_SUFFIXES, class_list, find_tables, load_tables
from .remarks import remark
from .toyworld.world import load_toyworld

# Decoding all of a larger set before training would take longer than most training runs.
LARGEST_CHECK = 10_000
_SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")


def load_splits(
    source: str | os.PathLike[str],
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    seed: int | None = 0,
    *,
    splits: str | os.PathLike[str] | None = None,
    draw: str | os.PathLike[str] | None = None,
    class_names_file: str | os.PathLike[str] | None = None,
    skip_damaged: bool = False,
    any_names: bool = False,
) -> DatasetDict:
    """The splits `train`, `test` and, if there is one, `validation`, with the columns `image`, `label`[, `caption`].

    `source` is one of
    - "toyworld", "toyworld:TASK" or "toyworld:TASK/DOMAIN";
    - a name in `BENCHMARKS`, such as "caltech101", for the Hub's copy, or "caltech101:FOLDER" for pictures in a folder
      in any of the following forms, with the catalogue's class names. Robustness data sets have only a test split;
    - a folder `<dir>/{train,val,test}/<class>/*.jpg`, or `<dir>/<class>/*.jpg` without splits, in both cases with an
      optional `captions.jsonl` of lines {"file_name": path within <dir>, "caption": text} for every training image;
    - a folder in CoOp's layout, with pictures at any depth and one `split_zhou_*.json`;
    - a file, or a folder with the files train.*, test.* and optionally val.*, as .csv, .tsv, .jsonl, .parquet
      or (in WebDataset's format, with .cls files) .tar. A `classnames.txt` beside them names class numbers;
    - the id of a dataset on the Hub. Columns of files and of the Hub are found by type and name unless named.

    `splits` is a CoOp split file for the pictures of a folder (see `load_coop_split`), which defines their splits and
    labels, `draw` a published few-shot draw, to which `train` and `validation` are reduced (see `select_draw`), and
    `class_names_file` renames the classes (see `read_class_names`).

    `label` is a ClassLabel. Names that come neither from the catalogue nor from a file of names are the train split's,
    with "_" and parentheses replaced by spaces. Without a test split the validation split serves as one, with a
    warning. Without either, every class is split by `seed` into 50% train, 20% validation and 30% test, the proportions
    of CoOp (Zhou et al., IJCV 2022) for datasets without a split; with `seed`=None all of it is `test`.

    With `skip_damaged` every image is decoded first, and those that cannot be read are left out with a `DataWarning`
    that lists them; another lists those that are in two classes. Data sets of more than 10,000 images are not checked;
    use `without_damaged` after choosing images. With `any_names`, classes that occur only outside the train split are
    accepted, and names that differ only in "_" and the like stay as in the source; otherwise both are errors.

    Raises FileNotFoundError for a folder or file that does not exist and ValueError for other data. Problems
    with the data are a `DataWarning`, such as images that are in train and in test.

    Example:
        >>> from hf_tgpt.data import load_splits
        >>> load_splits("toyworld:codes").num_rows
        {'train': 640, 'validation': 80, 'test': 1000}
    """
    source = os.fspath(source)
    benchmark, folder = (None, None) if Path(source).expanduser().exists() else find_benchmark(source)
    place = source
    if benchmark is not None:
        known = folder or benchmark.hub_id
        if known is None:
            raise ValueError(
                f"`source`={source!r} has no copy on the Hub that could be read; name a folder with its pictures, "
                f"'{benchmark.name}:FOLDER'."
            )
        place = known
    given = read_class_names(class_names_file) if class_names_file is not None else None
    if benchmark is not None and folder is None:
        label_column = label_column or benchmark.label_column

    raw, listed = _read(place, source, splits, image_column)
    if given is None and benchmark is None and listed is not None:
        given = read_class_names(listed)
    if benchmark is not None and benchmark.only_tested:
        raw = {"test": raw.get("test", next(iter(raw.values())))}
    first = raw["train"] if "train" in raw else next(iter(raw.values()))
    columns = find_columns(first, image_column, label_column, caption_column)
    raw = {split: data for split, data in raw.items() if data is first or is_labelled(data, columns["label"])}
    numbered = benchmark.class_names() if benchmark is not None else given if isinstance(given, list) else None
    names = label_names(first, columns["label"], numbered)
    if any_names:
        labelled = [data for data in raw.values() if columns["label"] in data.column_names]
        names = list(dict.fromkeys(name for data in [first, *labelled]
                                   for name in label_names(data, columns["label"], numbered)))  # fmt: skip
    words = names if given is not None or benchmark is not None else clean_class_names(names, keep_twins=any_names)
    loaded = DatasetDict({split: to_canonical(raw[split], split, columns, names, words) for split in raw})
    if given is not None:
        loaded = loaded if given == names else rename_classes(loaded, given)
    elif benchmark is not None:
        loaded = _name_as_catalogue(loaded, benchmark, from_hub=folder is None)
    elif lost := [f"{name!r} is {word!r}" for name, word in zip(names, words, strict=True) if "(" in name]:
        remark(f"Brackets in the names of classes become spaces: {', '.join(lost[:5])}.")

    if skip_damaged and sum(loaded.num_rows.values()) <= LARGEST_CHECK:
        loaded = drop_empty_classes(DatasetDict({split: without_damaged(data) for split, data in loaded.items()}))
    if "test" not in loaded and "validation" in loaded:
        if benchmark is None or benchmark.tested_split != "validation":
            remark(
                f"{source!r} has no test split: its validation split is used for the test, so do not "
                "choose settings by it."
            )
        loaded["test"] = loaded.pop("validation")
    if "test" not in loaded:
        whole = loaded["train"]
        loaded = DatasetDict({"test": whole} if seed is None else split_each_class(whole, seed))
    loaded = DatasetDict({split: loaded[split] for split in ("train", "validation", "test") if split in loaded})
    check_captions(loaded)
    remark_on_duplicates(loaded, between_classes=skip_damaged)
    return loaded if draw is None else select_draw(draw, loaded)


def class_names(dataset: Dataset) -> list[str]:
    """The class names in label order.

    Example:
        >>> hf_tgpt.data.class_names(hf_tgpt.data.load_splits("pictures")["train"])
        ['cat', 'dog']
    """
    return list(dataset.features["label"].names)


# Folders and the Hub -------------------------------------------------------------------------------------------------


def _read(
    place: str, source: str, splits: str | os.PathLike[str] | None, image_column: str | None
) -> tuple[dict[str, Dataset], Path | None]:
    """The splits as the source has them, and the list of class names beside them; errors name `source`."""
    here = Path(place).expanduser().absolute()
    path = here if place and here.exists() else None
    if splits is not None or (path and (splits := _coop_split_file(path)) is not None):
        return _load_coop(splits, path, source), None
    if place == "toyworld" or place.startswith("toyworld:"):
        task, _, domain = place.removeprefix("toyworld").removeprefix(":").partition("/")
        return dict(load_toyworld(task or "coloured_shapes", domain or "photo")), None
    if path and path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        files = {"train": [path]}
        return load_tables(files, image_column), class_list(files)
    if path and path.is_dir():
        files = _tables_of(path)
        if files:
            return load_tables(files, image_column), class_list(files)
        return caption_folder(load_folder(path), path), None
    if path or place.startswith((".", "/", "~")) or place.count("/") > 1 or ":" in source:
        raise FileNotFoundError(f"`source`={source!r} {_not_data(path)}, or name a dataset on the Hub.")
    return _load_from_hub(place, source), None


def _not_data(path: Path | None) -> str:
    """Why a path leads to no data."""
    if path is None:
        return "does not exist; correct the path"
    kinds = ", ".join(TABLE_SUFFIXES)
    if path.suffix.lower() in _SPREADSHEETS:
        return "is a spreadsheet; save its table as CSV and name that file"
    return f"is neither a folder nor a file of a known kind; name one of {kinds}"


def _coop_split_file(folder: Path) -> Path | None:
    """The split file of a folder that does not define its splits in another way."""
    if not folder.is_dir() or any(split_of(inner.name) == "train" for inner in subfolders(folder)):
        return None
    split_files = sorted(folder.glob("split_zhou_*.json"))
    if len(split_files) > 1:
        raise ValueError(
            f"{folder} has {len(split_files)} split files, {split_files[0].name} and others; name one as `splits`."
        )
    return split_files[0] if split_files else None


def _load_coop(split_file: str | os.PathLike[str], folder: Path | None, source: str) -> dict[str, Dataset]:
    if folder is None or not folder.is_dir():
        raise ValueError(
            f"`splits`={os.fspath(split_file)!r} needs a folder with the pictures; `source`={source!r} is not one."
        )
    # A file that is not in the current directory is looked for beside the pictures.
    file = Path(split_file).expanduser()
    file = file if file.is_file() or not (folder / file).is_file() else folder / file
    splits = {split_of(split) or split: data for split, data in load_coop_split(file, folder).items()}
    return caption_folder(splits, folder)


def _tables_of(folder: Path) -> dict[str, list[Path]]:
    """The files with a folder's data, if it is not one of class folders."""
    train = next((inner for inner in subfolders(folder) if split_of(inner.name) == "train"), None)
    return {} if train is not None and subfolders(train) else find_tables(folder)


def _load_from_hub(hub_id: str, source: str) -> dict[str, Dataset]:
    """The splits under this package's names; a single split is train."""
    try:
        loaded = datasets.load_dataset(hub_id)
    except Exception as error:  # the Hub client, the network and every file format have errors of their own
        near = nearest_benchmarks(source)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near and hub_id == source else ""
        raise ValueError(
            f"`source`={source!r} is neither a folder nor a table in {os.getcwd()}, and could not be loaded from the "
            f"Hub ({type(error).__name__}: {error}); it must be 'toyworld:TASK', a folder that exists or the id of a "
            "dataset on the Hub." + hint
        ) from error
    if len(loaded) == 1:
        return {"train": next(iter(loaded.values()))}
    splits: dict[str, Dataset] = {}
    for name in loaded:
        if (split := split_of(name)) and (split not in splits or name == split):
            splits[split] = loaded[name]
    if "train" not in splits:
        raise ValueError(f"`source`={source!r} has no split 'train', only {', '.join(loaded)}; use another dataset.")
    return splits


def _name_as_catalogue(splits: DatasetDict, benchmark: Benchmark, from_hub: bool) -> DatasetDict:
    """The catalogue's names and label order; the data's own, with a warning, if the two do not match."""
    given = benchmark.names()
    found = next(iter(splits.values())).features["label"].names
    if (
        benchmark.by_position
        and (from_hub or all(name.isdecimal() for name in found))
        and len(found) == len(given)
        and not {normalized_name(name) for name in found}
        <= {normalized_name(name) for pair in given.items() for name in pair}
    ):
        return rename_by_position(splits, list(given.values()))
    try:
        return rename_classes(splits, given)
    except ValueError as error:
        remark(f"The class names of {benchmark.title} in the data are not the catalogue's and are kept: {error}")
        return rename_by_position(splits, clean_class_names(found))
