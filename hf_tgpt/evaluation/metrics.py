"""Classification metrics on logits, as reported in few-shot evaluation of CLIP, and calibration error.

Each is an `evaluate.Metric` that is constructed directly, so nothing is loaded from the Hub. They work wherever
`evaluate` does: with `add_batch`, in `evaluate.combine` and across processes (`num_process`, `process_id`).
`classification_metrics` computes the same values from arrays. All values are fractions in 0..1, not percents.

`evaluate` keeps logits as float32 and hands them back as Python lists, with `keep_in_memory=True` too. For a large
test set (50000 images x 1000 classes) gather arrays and call `classification_metrics` instead.
"""

from __future__ import annotations

import inspect
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Sequence, Value
from numpy.typing import ArrayLike
from transformers import EvalPrediction

Logits = np.ndarray | list[list[float]]  # (n, c)


class _LogitsMetric(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.getdoc(self),
            citation="",
            inputs_description="\nPredictions are rows of c logits, references are integer labels in 0..c-1.\n",
            features=Features({"predictions": Sequence(Value("float32")), "references": Value("int64")}),
        )

    def _compute(self, predictions: Logits, references: ArrayLike) -> dict[str, Any]:
        return self._score(*_checked(predictions, references))


class Accuracy(_LogitsMetric):
    """Share of images whose highest logit is that of their label: `accuracy`. Of equal logits the first wins."""

    @staticmethod
    def _score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"accuracy": float((logits.argmax(axis=1) == labels).mean())}


class TopKAccuracy(_LogitsMetric):
    """Share of images whose label is among the k highest logits: `top5_accuracy`, named after k.

    With k classes or fewer every answer would count as right, so the result is then `{}` rather than 1.0.

    Args:
        k: How many of the highest logits count, at least 1. Of equal logits the first win.
    """

    def __init__(self, *args: Any, k: int = 5, **kwargs: Any) -> None:
        self.k = _positive_int("k", k)
        super().__init__(*args, **kwargs)

    def _compute(self, predictions: Logits, references: ArrayLike) -> dict[str, float]:
        return self._score(*_checked(predictions, references), k=self.k)

    @staticmethod
    def _score(logits: np.ndarray, labels: np.ndarray, k: int = 5) -> dict[str, float]:
        classes = logits.shape[1]
        if classes <= k:
            return {}
        labels = labels[:, None]  # (n, 1)
        own = np.take_along_axis(logits, labels, axis=1)  # (n, 1)
        ahead = (logits > own) | ((logits == own) & (np.arange(classes) < labels))  # (n, c)
        return {f"top{k}_accuracy": float((ahead.sum(axis=1) < k).mean())}


class PerClassAccuracy(_LogitsMetric):
    """Accuracy of each class: `per_class_accuracy`, a list of c values, None for a class without images."""

    @staticmethod
    def _score(logits: np.ndarray, labels: np.ndarray) -> dict[str, list[float | None]]:
        classes = logits.shape[1]
        images = np.bincount(labels, minlength=classes)
        hits = np.bincount(labels[logits.argmax(axis=1) == labels], minlength=classes)
        return {"per_class_accuracy": [float(h / i) if i else None for h, i in zip(hits, images, strict=True)]}


class MeanPerClassAccuracy(_LogitsMetric):
    """Mean of the per-class accuracies over the classes that have images: `mean_per_class_accuracy`.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021),
    appendix A: the metric of Oxford Pets, Caltech101, Flowers102 and FGVC Aircraft.
    """

    @staticmethod
    def _score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        per_class = PerClassAccuracy._score(logits, labels)["per_class_accuracy"]
        return {"mean_per_class_accuracy": float(np.mean([value for value in per_class if value is not None]))}


class ExpectedCalibrationError(_LogitsMetric):
    """Gap between top-1 confidence and accuracy, over bins of confidence: `expected_calibration_error`.

    A bin counts by its share of the images. The confidence is the highest value of the softmax, so the logits must
    include CLIP's logit scale.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), section 2, equation 3.

    Args:
        n_bins: Number of bins of equal width, at least 1. A bin contains its upper edge.
    """

    def __init__(self, *args: Any, n_bins: int = 15, **kwargs: Any) -> None:
        self.n_bins = _positive_int("n_bins", n_bins)
        super().__init__(*args, **kwargs)

    def _compute(self, predictions: Logits, references: ArrayLike) -> dict[str, float]:
        return self._score(*_checked(predictions, references), n_bins=self.n_bins)

    @staticmethod
    def _score(logits: np.ndarray, labels: np.ndarray, n_bins: int = 15) -> dict[str, float]:
        # The softmax at its highest logit is 1 / sum(exp(logit - highest)), which cannot overflow.
        confidence = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)  # (n,)
        bins = np.digitize(confidence, np.linspace(0, 1, n_bins + 1)[1:-1], right=True)  # (n,)
        hit = logits.argmax(axis=1) == labels  # (n,)
        # |B| / n * |acc(B) - conf(B)| of a bin B is the absolute sum of its images' hit - confidence, over n.
        gaps = np.bincount(bins, weights=hit - confidence)
        return {"expected_calibration_error": float(np.abs(gaps).sum() / len(labels))}


class HarmonicMean(evaluate.Metric):
    """Harmonic mean 2bn / (b + n) of the accuracies on base and on new classes: `harmonic_mean`, 0 if both are 0.

    Several pairs (data sets, seeds) are averaged before: the average row of the paper's table is the harmonic mean
    of the averages, not the average of the harmonic means.

    Source: Khattak et al., "MaPLe: Multi-modal Prompt Learning" (CVPR 2023), table 3.

    Example:
        >>> HarmonicMean(keep_in_memory=True).compute(base=[0.75], new=[0.5])
        {'harmonic_mean': 0.6}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.getdoc(self),
            citation="",
            inputs_description="\nBase and new are lists of accuracies in 0..1, one pair per data set or seed.\n",
            features=Features({"base": Value("float64"), "new": Value("float64")}),
        )

    def _compute(self, base: ArrayLike, new: ArrayLike) -> dict[str, float]:
        b, n = _mean_fraction("base", base), _mean_fraction("new", new)
        return {"harmonic_mean": 2 * b * n / (b + n) if b + n else 0.0}


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The values of all metrics on logits, with their default settings, without `evaluate` storing anything.

    Shapes: logits (n, c); labels (n,), integers in 0..c-1. `top5_accuracy` is left out if c <= 5.

    Errors: `ValueError` if either is empty or of another shape, a logit is not finite or a label not in 0..c-1.
    """
    logits, labels = _checked(logits, labels)
    metrics = (Accuracy, TopKAccuracy, PerClassAccuracy, MeanPerClassAccuracy, ExpectedCalibrationError)
    return {key: value for metric in metrics for key, value in metric._score(logits, labels).items()}


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The metrics of `classification_metrics` that are numbers, for `Trainer(..., compute_metrics=compute_metrics)`.

    Shapes: `predictions` (n, c), logits; `label_ids` (n,). Raises ValueError as `classification_metrics`.

    Example:
        >>> prediction = EvalPrediction(np.array([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0]]), np.array([0, 0, 0]))
        >>> round(hf_tgpt.compute_metrics(prediction)["accuracy"], 3)
        0.667
    """
    metrics = classification_metrics(prediction.predictions, prediction.label_ids)
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def _checked(logits: Logits, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The inputs as arrays (n, c) and (n,); errors name them as `evaluate` and as `classification_metrics` do."""
    if len(logits) == 0 or np.size(logits[0]) == 0:
        raise ValueError("`predictions` (logits) is empty; pass at least one row with one float per class.")
    if np.ndim(logits[0]) != 1:
        raise ValueError(f"`predictions` (logits) has first entry {logits[0]}; pass logits (n, c), not class ids.")
    classes = len(logits[0])
    for row, width in enumerate(map(len, logits)):
        if width != classes:
            problem = f"{width} values and row 0 has {classes}"
            raise ValueError(f"`predictions` (logits) row {row} has {problem}; score all against the same classes.")
    scores, answers = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    for row, column in np.argwhere(~np.isfinite(scores))[:1]:
        problem = f"{scores[row, column]} for class {column}"
        raise ValueError(f"`predictions` (logits) row {row} has {problem}; look for divergence or half precision.")
    if answers.shape != (len(scores),) or answers.dtype.kind not in "iu":
        problem = f"shape {answers.shape} and type {answers.dtype}"
        raise ValueError(f"`references` (labels) has {problem}; pass one integer for each of {len(scores)} images.")
    for row in np.flatnonzero((answers < 0) | (answers >= classes))[:1]:
        problem = f"{answers[row]} but there are {classes} classes"
        raise ValueError(f"`references` (labels) row {row} is {problem}; number the labels 0 to {classes - 1}.")
    return scores, answers.astype(np.int64)


def _mean_fraction(field: str, values: ArrayLike) -> float:
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError(f"`{field}` is empty; pass at least one accuracy.")
    for value in values[~((values >= 0) & (values <= 1))][:1]:  # nan too
        raise ValueError(f"`{field}`={value} is not an accuracy in 0..1; divide percents by 100.")
    return float(values.mean())


def _positive_int(field: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"`{field}`={value!r} is not a count; choose an integer of at least 1.")
    return value
