"""Finds what is wrong with labelled pictures, before any training on them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..adapters.fitting import Features
from ..data.class_lists import clean_class_name, normalized_name
from ..data.images import ImageTransform
from ..data.looks import connected, equal_pictures, similar_pairs
from ..encoders import DualEncoder, encoder_of
from ..encoders.loading import check_picture_size, load_image_processor
from ..evaluation.label_errors import LabelError, cross_validated, label_errors, outliers
from ..methods.gda import GDA, GDAConfig
from ..methods.zero_shot import zero_shot_beside
from ..training.config import TrainingConfig, steps_of
from .encoded import Encoded, encode_splits

_MOST_COMPARED = 50_000  # pictures; comparing more of them would take longer than everything else
_FEW = 4  # pictures of a class
_TINY = 4  # times smaller than what the model sees
_TAKEN = 0.5  # of a class's pictures that are taken for another class
Facts = dict[str, Any]


def check_pictures(
    splits: Mapping[str, Dataset],
    clip: Any,
    *,
    templates: list[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    num_workers: int = 0,
) -> tuple[Facts, Encoded]:
    """What is odd about the pictures and classes of `load_splits`, as JSON-like data, and the encoded pictures.

    The lists are `label_errors` (the worst first), `duplicates`, `outliers`, `unreadable`, `blank`, `tiny`,
    `spelled_alike`, `unknown_by_name` and `confused_by_name`; `imbalance` and `per_class` count. `clip` is a base
    model, `templates` are its sentences for zero-shot; features are stored in `folder`.

    Raises ValueError if no picture can be read.

    Example:
        >>> from hf_tgpt.data import load_splits
        >>> facts, _ = check_pictures(load_splits("pictures"), clip)
        >>> facts["pictures"], facts["unreadable"], facts["duplicates"]
        (8, [], [])
    """
    names = next(iter(splits.values())).features["label"].names
    transform = ImageTransform.from_processor(load_image_processor(clip.name_or_path), train=False)
    check_picture_size(clip, transform.size)
    clip.requires_grad_(False)
    tower = zero_shot_beside(clip, ["photo"])  # for its image tower alone
    encoded = encode_splits(splits, tower, transform, folder, num_workers)
    facts: Facts = {
        "pictures": len(encoded.looks),
        "splits": {split: len(data) for split, data in splits.items()},
        "classes": len(names),
    }
    facts |= _of_files(encoded, names, transform.size) | {"duplicates": _duplicates(encoded, names)}
    return facts | _of_classes(encoded, names, clip, templates), encoded


def _named(encoded: Encoded, row: int, names: list[str], **more: Any) -> Facts:
    place = encoded.place(row)
    return {"file": place["file"], "label": names[encoded.labels[row]], **more, **place}


def _of_files(encoded: Encoded, names: list[str], seen: int) -> Facts:
    """Files that cannot be read, show nothing, or are far smaller than the model's input."""
    looks = list(enumerate(encoded.looks))
    return {
        "unreadable": [_named(encoded, i, names, problem=look.problem) for i, look in looks if look.problem],
        "blank": [_named(encoded, i, names) for i, look in looks if look.blank],
        "tiny": [
            _named(encoded, i, names, width=look.size[0], height=look.size[1])
            for i, look in looks
            if not look.problem and min(look.size) < seen / _TINY
        ],
    }


def _duplicates(encoded: Encoded, names: list[str]) -> list[Facts]:
    """Groups of equal or nearly equal pictures: first those in several classes, then those in several splits."""
    equal = equal_pictures(encoded.dataset)
    readable = set(encoded.readable.tolist())
    equal = [rows for rows in equal if readable.issuperset(rows)]
    pairs = [(rows[0], row, 1.0) for rows in equal for row in rows[1:]]
    if len(readable) <= _MOST_COMPARED:
        small = np.stack([encoded.looks[row].small for row in encoded.readable])
        found = similar_pairs(small, encoded.features)
        pairs += [(int(encoded.readable[i]), int(encoded.readable[j]), likeness) for i, j, likeness in found]
    likeness_of: dict[int, float] = {}
    for i, j, likeness in pairs:
        for row in (i, j):
            likeness_of[row] = min(likeness, likeness_of.get(row, 1.0))
    exact = {tuple(rows) for rows in equal}
    groups = []
    for rows in connected([(i, j) for i, j, _ in pairs]):
        files = [_named(encoded, row, names) for row in rows]
        groups.append(
            {
                "kind": "exact" if tuple(rows) in exact else "near",
                "score": min(likeness_of[row] for row in rows),
                "across_classes": len({file["label"] for file in files}) > 1,
                "across_splits": len({file["split"] for file in files}) > 1,
                "files": files,
            }
        )
    return sorted(groups, key=lambda group: (group["across_classes"], group["across_splits"]), reverse=True)


def _of_classes(encoded: Encoded, names: list[str], clip: Any, templates: list[str] | None) -> Facts:
    """The checks that need the model: label errors, outliers and its recall of each class, beside the classes' sizes.

    Classes whose names differ only in spelling count as one here, and blank pictures are left out.
    """
    counts = Counter(encoded.labels.tolist())
    alike: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        alike.setdefault(normalized_name(name), []).append(label)
    shown = {twin: max(twins, key=lambda label: counts[label]) for twins in alike.values() for twin in twins}
    facts: Facts = {
        "spelled_alike": [[names[label] for label in twins] for twins in alike.values() if len(twins) > 1],
        "imbalance": _imbalance(counts, names),
        "notes": [],
    }

    used = np.array([not encoded.looks[row].blank for row in encoded.readable], dtype=bool)
    rows, features = encoded.readable[used], encoded.features[torch.from_numpy(used)]
    present, labels = np.unique([shown[label] for label in encoded.labels[rows]], return_inverse=True)
    facts["outliers"] = []
    if len(rows) <= _MOST_COMPARED:
        facts["outliers"] = [_named(encoded, int(rows[i]), names, score=far) for i, far in outliers(features)]
    else:
        facts["notes"].append(
            f"More than {_MOST_COMPARED:,} pictures are not searched for near duplicates or outliers."
        )
    judged, errors = _judged([names[label] for label in present], clip, features, torch.from_numpy(labels), templates)
    facts["notes"] += judged.pop("notes")
    facts["label_errors"] = [
        _named(encoded, int(rows[error.row]), names, suggested=names[present[error.suggested]], score=error.score)
        for error in errors
    ]
    return facts | judged


def _imbalance(counts: Counter[int], names: list[str]) -> Facts:
    sizes = sorted(((counts[label], name) for label, name in enumerate(names)), reverse=True)
    (most, largest), (least, smallest) = sizes[0], sizes[-1]
    return {
        "largest": {"label": largest, "pictures": most},
        "smallest": {"label": smallest, "pictures": least},
        "ratio": round(most / max(1, least), 2),
        "few": [{"label": name, "pictures": count} for count, name in sizes[::-1] if count < _FEW],
    }


def _judged(
    names: list[str], clip: Any, features: torch.Tensor, labels: torch.Tensor, templates: list[str] | None
) -> tuple[Facts, list[LabelError]]:
    """The answers of zero-shot classification, and of a head that is cross-validated."""
    facts: Facts = {"notes": [], "per_class": [], "unknown_by_name": [], "confused_by_name": []}
    facts |= {"zero_shot_accuracy": None, "cross_validated_accuracy": None}
    if len(names) < 2:
        return facts, []
    encoder, errors, recalls = encoder_of(clip), list[LabelError](), dict[str, torch.Tensor]()
    features, labels = features.to(clip.device), labels.to(clip.device)
    fields: Facts = {"templates": templates} if templates else {}
    try:
        head = GDA(GDAConfig(class_names=[clean_class_name(name) for name in names], **fields), encoder)
        recalls["zero_shot_recall"] = _by_name(head, encoder, names, features, labels, facts)
    except ValueError as error:  # names that the text tower cannot take or tell apart
        facts["notes"].append(f"The base model cannot read the class names, so they are not used. {error}")
        head = GDA(GDAConfig(class_names=[f"class {label}" for label in range(len(names))]), encoder)
    logits = cross_validated(head, encoder, Features(features[None], labels), steps_of(TrainingConfig()))
    if logits is not None:
        logits, labels = logits.cpu(), labels.cpu()
        errors, judged = label_errors(logits, labels), logits.isfinite().all(-1)
        hits = (logits[judged].argmax(-1) == labels[judged]).double()
        facts["cross_validated_accuracy"] = float(hits.mean())
        recalls["cross_validated_recall"] = _means(hits, labels[judged], len(names))
    counts = labels.bincount(minlength=len(names)).tolist()
    facts["per_class"] = [
        {"label": name, "pictures": counts[label]}
        | {kind: round(float(recall[label]), 4) for kind, recall in recalls.items() if recall[label].isfinite()}
        for label, name in enumerate(names)
    ]
    return facts, errors


@torch.no_grad()
def _by_name(
    head: GDA, encoder: DualEncoder, names: list[str], features: torch.Tensor, labels: torch.Tensor, facts: Facts
) -> torch.Tensor:
    """The recall (c,) of each class in zero-shot classification; oddities are added to `facts`.

    A class is unknown by name if zero-shot classification recognises it no better than chance.
    """
    texts = head.texts(encoder)
    answers = torch.cat([head.scaled(encoder, part @ texts.T).argmax(-1) for part in features.split(4096)])
    taken = torch.stack([_means((answers == other).double(), labels, len(names)) for other in range(len(names))], 1)
    for label, other in (taken >= _TAKEN).nonzero().tolist():
        if label != other:
            pair = {"label": names[label], "taken_for": names[other], "share": float(taken[label, other])}
            facts["confused_by_name"].append(pair)
    facts["zero_shot_accuracy"] = float((answers == labels).double().mean())
    recall = taken.diagonal()
    facts["unknown_by_name"] = [names[label] for label in (recall <= 1 / len(names)).nonzero().flatten().tolist()]
    return recall.cpu()


def _means(values: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """The mean of the values (n,) of each class (c,); not finite for a class without any."""
    return values.new_zeros(classes).index_add_(0, labels, values) / labels.bincount(minlength=classes)
