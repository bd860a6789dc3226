"""Few-shot subsets and base/new class splits, chosen from the label column only: no image is ever decoded here."""

from __future__ import annotations

import math

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict

from .remarks import count, remark

CLASSES = ("all", "base", "new")
_FEW_TEST_IMAGES = 30


def sample_few_shot(
    dataset: Dataset, shots: int, seed: int = 0, label_column: str = "label", allow_fewer: bool = False
) -> Dataset:
    """`shots` images of every class, drawn without replacement and grouped by class.

    The draw of a class depends only on `seed` and on that class's own images, so adding images to one class leaves
    the draws of other classes unchanged. With the same seed, the images of fewer `shots` need not be among those of
    more. With `allow_fewer`, all images of a class with fewer are used.

    Source: the few-shot protocol of CoOp (Zhou et al., IJCV 2022, section 4.1): 1, 2, 4, 8 or 16 shots, three seeds.

    Raises ValueError if `shots` < 1, if a class has fewer images than `shots` (unless `allow_fewer`), or if a label is
    not in the ClassLabel.

    Example:
        >>> few = hf_tgpt.data.sample_few_shot(hf_tgpt.data.load_splits("pictures")["train"], shots=1, seed=0)
        >>> few["label"][:]
        [0, 1]
    """
    if shots < 1:
        raise ValueError(f"`shots`={shots} but every class needs at least one image; choose 1 or more.")
    labels = read_labels(dataset, label_column)
    names = dataset.features[label_column].names
    counts = np.bincount(labels, minlength=len(names)).tolist()
    short = [(name, count) for name, count in zip(names, counts, strict=True) if count < shots]
    if short and not allow_fewer:
        listed = ", ".join(f"class '{name}' has {count} image{'s' * (count != 1)}" for name, count in short[:5])
        if len(short) > 5:
            listed += f" and {len(short) - 5} more classes have too few"
        raise ValueError(f"`shots`={shots} but {listed}; lower `shots` or pass allow_fewer=True.")

    chosen: list[int] = []
    for label, rows in enumerate(rows_of_classes(labels, len(names))):
        draw = np.random.default_rng([seed, label]).permutation(len(rows))[:shots]
        chosen += rows[np.sort(draw)].tolist()
    return dataset.select(chosen)


def remark_on_sizes(splits: DatasetDict, shots: int) -> None:
    """Remarks on classes that have fewer training images than `shots`, or no test image, and on a small test split."""
    names = splits["train"].features["label"].names
    counts = {split: np.bincount(read_labels(data), minlength=len(names)) for split, data in splits.items()}
    if len(names) == 1:
        remark(f"There is only one class, {names[0]!r}, so every answer will be right; give pictures of another class.")
    short = [f"{name!r} ({count})" for name, count in zip(names, counts["train"], strict=True) if count < shots]
    if short:
        remark(
            f"{count(len(short), 'class')} trained on fewer than {shots} images: {', '.join(short[:10])}"
            + (", ..." if len(short) > 10 else ".")
        )
    untested = [name for name, count in zip(names, counts["test"], strict=True) if not count]
    if untested:
        remark(f"{count(len(untested), 'class')} not tested, for lack of an image: {', '.join(untested[:10])}.")
    if (tested := len(splits["test"])) < _FEW_TEST_IMAGES:
        remark(
            f"The test split has {tested} image{'s' * (tested != 1)}, so a single image changes "
            f"the accuracy by {100 / tested:.0f} points; add images before you rely on it."
        )


def split_base_new(dataset: Dataset, label_column: str = "label") -> tuple[Dataset, Dataset]:
    """The images of the base classes and those of the new ones, each half relabelled from 0 with its own class names.

    Of c classes the first ceil(c / 2), in label order, are base. This depends on the ClassLabel, not on the images,
    so the train and test splits of a dataset have the same halves.

    Source: generalisation from base to new classes, CoCoOp (Zhou et al., CVPR 2022, section 4.1).

    Raises ValueError if there are fewer than two classes or if a half has no images; warns of classes without any.

    Example:
        >>> base, new = hf_tgpt.data.split_base_new(hf_tgpt.data.load_splits("pictures")["train"])
        >>> hf_tgpt.data.class_names(base), hf_tgpt.data.class_names(new)
        (['cat'], ['dog'])
    """
    labels = read_labels(dataset, label_column)
    names = dataset.features[label_column].names
    if len(names) < 2:
        raise ValueError(f"`{label_column}` has {len(names)} class(es) but base and new need one each; add classes.")
    border = math.ceil(len(names) / 2)
    halves = []
    for half, (first, last) in {"base": (0, border), "new": (border, len(names))}.items():
        rows = np.flatnonzero((first <= labels) & (labels < last))
        if len(rows) == 0:
            raise ValueError(
                f"the {half} classes ({names[first]!r} to {names[last - 1]!r}) have no images; "
                "pass a dataset with images of both halves."
            )
        present = np.bincount(labels[rows] - first, minlength=last - first) > 0
        empty = [name for name, found in zip(names[first:last], present, strict=True) if not found]
        if empty:
            remark(f"{count(len(empty), f'{half} class')} without an image: {', '.join(empty[:5])}.")
        # Relabelling comes first, since it avoids copying pictures only while no rows are selected; labels are clipped
        # in rows that the selection drops.
        relabelled = replace_labels(
            dataset, np.clip(labels - first, 0, last - first - 1), names[first:last], label_column
        )
        halves.append(relabelled.select(rows))
    return halves[0], halves[1]


def choose_classes(splits: DatasetDict, classes: str) -> DatasetDict:
    """The images of "all" classes, of the "base" or of the "new" half, as in `split_base_new`.

    Raises ValueError for another value or if a half has no images in some split.

    Example:
        >>> splits = hf_tgpt.data.choose_classes(hf_tgpt.data.load_splits("pictures"), "new")
        >>> hf_tgpt.data.class_names(splits["test"])
        ['dog']
    """
    if classes not in CLASSES:
        raise ValueError(f"`classes`={classes!r} is unknown; choose one of {', '.join(CLASSES)}.")
    if classes == "all":
        return splits
    half = CLASSES.index(classes) - 1
    return DatasetDict({split: split_base_new(dataset)[half] for split, dataset in splits.items()})


def read_labels(dataset: Dataset, label_column: str = "label") -> np.ndarray:
    """The label column as (N,) integers, without touching any other column.

    Raises ValueError if the column is missing or not a ClassLabel, or if a label is outside its class names.
    """
    if label_column not in dataset.column_names:
        raise ValueError(
            f"`label_column`={label_column!r} is not a column; available: {', '.join(dataset.column_names)}."
        )
    feature = dataset.features[label_column]
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            f"`label_column`={label_column!r} holds {feature}, not class labels; "
            f"call dataset.class_encode_column({label_column!r}) first."
        )
    values = dataset.select_columns(label_column).with_format("arrow")[:][label_column]
    labels = pc.fill_null(values, -1).to_numpy().astype(np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= feature.num_classes))
    if len(wrong):
        raise ValueError(
            f"`{label_column}`={values[int(wrong[0])].as_py()} in row {wrong[0]} is outside the {feature.num_classes} "
            f"class names (0 to {feature.num_classes - 1}); correct it or drop such rows with Dataset.filter."
        )
    return labels


def rows_of_classes(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """The rows of each class, in order, in one pass: (N,) labels -> `num_classes` arrays of rows."""
    counts = np.bincount(labels, minlength=num_classes)
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])


def replace_labels(dataset: Dataset, labels: np.ndarray, names: list[str], label_column: str = "label") -> Dataset:
    """The dataset with `labels`, (N,) integers into `names`, in its label column; the order of columns is kept."""
    beside = label_column + "_"
    while beside in dataset.column_names:
        beside += "_"
    replaced = dataset.add_column(beside, labels, feature=ClassLabel(names=names)).remove_columns(label_column)
    return replaced.rename_column(beside, label_column).select_columns(dataset.column_names)


_SHARES = {"validation": 0.2, "test": 0.3}  # and the rest for training: CoOp's proportions for datasets without a split


def split_each_class(dataset: Dataset, seed: int) -> dict[str, Dataset]:
    """Splits every class in the same proportions, with at least one image per split, independently of other classes.

    Of two images in a class, one is for training and one for testing, and a single one is for training, with a remark.
    """
    labels = read_labels(dataset)
    rows: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    names = dataset.features["label"].names
    small: list[str] = []
    for label, images in enumerate(rows_of_classes(labels, len(names))):
        if len(images) < 3:
            small.append(f"'{names[label]}' ({len(images)})")
        images = np.random.default_rng([seed, label]).permutation(images)
        validation, test = (max(1, round(share * len(images))) for share in _SHARES.values())
        if len(images) < 3:
            validation, test = 0, len(images) // 2
        cuts = [len(images) - validation - test, len(images) - test]
        for split, part in zip(rows, np.split(images, cuts), strict=True):
            rows[split] += sorted(part.tolist())
    if small:
        remark(
            f"{count(len(small), 'class')} too small to be split into train, validation and test (3 images): "
            f"{', '.join(small[:10])}. Of two images, one is for training and one for testing; "
            "a single one is for training. Add images."
        )
    if not rows["test"]:
        raise ValueError("no class has 2 images, so nothing is left to test with; add images.")
    return {split: dataset.select(chosen) for split, chosen in rows.items() if chosen}
