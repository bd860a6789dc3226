"""Chooses which pictures to label next, among many without labels."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..data import FewShotImages
from ..data.duplicates import digests
from ..data.looks import connected, equal_pictures, similar_pairs
from ..data.read_ahead import pixel_batches
from ..evaluation.acquisition import next_to_label
from ..methods.zero_shot import zero_shot_beside
from .classifier import Classifier
from .encoded import Encoded, encode_splits, unlabelled

_MOST_COMPARED = 50_000  # pictures; comparing more of them would take longer than everything else
_BATCH = 256
_PAIRS = 65_536  # class texts of image-conditioned prompts in memory at a time
_GUESSES = 5  # of each picture
Facts = dict[str, Any]


def suggest_pictures(
    classifier: Classifier,
    files: Sequence[str],
    count: int = 20,
    *,
    known: Collection[str] = (),
    folder: str | os.PathLike[str] | None = None,
    num_workers: int = 0,
    seed: int = 0,
) -> Facts:
    """The `count` pictures among `files` whose labels would help the classifier most, as JSON-like data.

    `suggestions` are {"file", "suggested", "score", "guesses"}, the most uncertain first: the predicted label, its
    probability, and the five likeliest labels. The other facts count what was left out: `known` pictures (by
    `data.duplicates.digests` or by file) with their copies, files that show nothing, and `copies` of others;
    `unreadable` are {"file", "problem"}. Features are stored in `folder`. See `evaluation.acquisition`.

    Raises ValueError if no picture can be read, and for a `count` below 1.

    Example:
        >>> classifier = hf_tgpt.load_classifier("runs/my-run")
        >>> facts = suggest_pictures(classifier, ["cat.jpg"], count=1)
        >>> facts["suggestions"][0]["file"]
        'cat.jpg'
    """
    model = classifier.model
    splits = unlabelled(files)
    tower = model if model.learner.vision_is_frozen else zero_shot_beside(model, ["photo"])
    encoded = encode_splits(splits, tower, classifier.transform, folder, num_workers)
    content = digests(splits[""].select(encoded.readable))
    is_known = np.array([digest in known or encoded.looks[row].file in known
                         for digest, row in zip(content, encoded.readable, strict=True)], dtype=bool)  # fmt: skip
    blank = np.array([encoded.looks[row].blank for row in encoded.readable], dtype=bool)
    is_known, copies = _with_copies(encoded, is_known)
    free = np.flatnonzero(~(is_known | blank | copies))
    probabilities = _probabilities(classifier, encoded, free, num_workers)
    chosen = next_to_label(encoded.features[torch.from_numpy(free)], probabilities, count, seed=seed)
    return {
        "pictures": len(files),
        "known": int(is_known.sum()),
        "blank": int((blank & ~is_known).sum()),
        "copies": int((copies & ~is_known & ~blank).sum()),
        "unreadable": [{"file": look.file, "problem": look.problem} for look in encoded.looks if look.problem],
        "candidates": len(free),
        "suggestions": [
            _answer(encoded.looks[encoded.readable[free[place]]].file, probabilities[place], classifier.class_names)
            for place in chosen
        ],
    }


def _answer(file: str, probabilities: torch.Tensor, class_names: list[str]) -> Facts:
    scores, labels = probabilities.topk(min(_GUESSES, len(class_names)))
    guesses = [{"label": class_names[label], "score": round(score, 4)}
               for label, score in zip(labels.tolist(), scores.tolist(), strict=True)]  # fmt: skip
    return {"file": file, "suggested": guesses[0]["label"], "score": guesses[0]["score"], "guesses": guesses}


def _with_copies(encoded: Encoded, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the readable pictures are known or nearly equal to a known one, and which to an earlier one."""
    place = {row: i for i, row in enumerate(encoded.readable.tolist())}
    pairs = [(place[rows[0]], place[row]) for rows in equal_pictures(encoded.dataset) for row in rows[1:]
             if rows[0] in place and row in place]  # fmt: skip
    if len(place) <= _MOST_COMPARED:
        small = np.stack([encoded.looks[row].small for row in encoded.readable])
        pairs += [(i, j) for i, j, _ in similar_pairs(small, encoded.features)]
    known, copies = known.copy(), np.zeros(len(place), dtype=bool)
    for group in connected(pairs):
        known[group] |= known[group].any()
        copies[group[1:]] = True
    return known, copies


@torch.inference_mode()
def _probabilities(classifier: Classifier, encoded: Encoded, chosen: np.ndarray, num_workers: int) -> torch.Tensor:
    """The calibrated probabilities (n, c) of some of the readable pictures, float32 on the CPU."""
    names = classifier.class_names
    parts = []
    for answer in _answers(classifier, encoded, chosen, num_workers):
        parts.append((answer.float() / classifier.temperature(names)).softmax(-1).cpu())
    return torch.cat(parts) if parts else torch.zeros(0, len(names))


def _answers(classifier: Classifier, encoded: Encoded, chosen: np.ndarray, num_workers: int) -> Iterator[torch.Tensor]:
    """Logits (b, c), from the image states if they are the adapter's own, else from the pictures."""
    model, size = classifier.model, _BATCH
    if not len(chosen):
        return
    device = next(model.parameters()).device
    if model.learner.texts_per_image:
        size = max(1, min(size, _PAIRS // len(classifier.class_names)))
    if model.learner.vision_is_frozen:
        for states in encoded.states[torch.from_numpy(chosen)].split(size):
            yield model(image_states=states.to(device)).logits
        return
    images = FewShotImages(encoded.dataset.select(encoded.readable[chosen]), classifier.transform)
    for pixels in pixel_batches(images, min(size, 32), num_workers):
        yield model(pixels.to(device)).logits
