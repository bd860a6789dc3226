"""The results of a run: results.json, a plot, and reasons to doubt them."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..adapters.tower_classifier import AdaptedModel
from ..data import find_benchmark
from ..evaluation.calibration import Calibration
from ..evaluation.plots import can_plot, plot_run
from ..hub.card import dataset_title
from ..utils.files import put_in_place, write_json
from ..utils.version import __version__
from .checkpoint import trained_weights
from .config import TrainingConfig

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets")


def library_versions() -> dict[str, str]:
    return {"python": platform.python_version(), "hf-tgpt": __version__} | {name: version(name) for name in _LIBRARIES}


def peak_memory_bytes() -> int:
    """The GPU's peak allocation, or without one the process's peak resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def summarise(
    about: dict[str, Any],
    config: TrainingConfig,
    model: AdaptedModel,
    zero_shot: dict[str, Any],
    adapted: dict[str, Any],
    captions: str,
    remarks: list[str],
    seconds: float,
    feature_seconds: float = 0.0,
) -> dict[str, Any]:
    """The content of results.json: accuracies are fractions, on the test split.

    `about` has the settings of the run: `method`, `model` (None: the toy CLIP), `dataset`, `classes` and `shots`,
    `dtype` of the base model and the number of `training_images`; `remarks` are those of `judge`. If stored features
    came from another run, `feature_seconds` is the time for encoding them there.
    """
    dataset = about["dataset"]
    return {
        "method": about["method"],
        "base_model": about["model"] or "the toy CLIP of hf-tgpt",
        "dataset": dataset,
        **_about(dataset),
        "toy": about["model"] is None or dataset.startswith("toyworld"),
        "classes": about["classes"],
        "shots": about["shots"],
        "training_images": about["training_images"],
        "dtype": about.get("dtype", "float32"),
        "seed": config.seed,
        "recipe": _recipe(config),
        **({"captions": captions} if model.uses_captions else {}),
        "zero_shot_accuracy": zero_shot["accuracy"],
        "class_names": model.class_names,
        **adapted,
        **({"fitted": fitted} if (fitted := model.learner.config.fitted) else {}),
        "remarks": remarks,
        "takes_new_classes": model.takes_new_classes,
        "trainable_parameters": sum(value.numel() for value in trained_weights(model).values()),
        "seconds": round(seconds, 1),
        "feature_seconds": round(feature_seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": library_versions(),
    }


def _about(source: str) -> dict[str, str | None]:
    """The known facts about a data set with a name."""
    if source.startswith("toyworld"):
        return {"data_licence": "apache-2.0"}
    benchmark, _ = find_benchmark(source)
    if benchmark is None:
        return {}
    licence = {} if benchmark.licence == "not stated" else {"data_licence": benchmark.licence}
    return {"dataset_title": benchmark.title, "dataset_id": benchmark.hub_id} | licence


def _recipe(config: TrainingConfig) -> dict[str, Any]:
    """The training settings for the pictures; the rest of the config does not change the outcome."""
    apart = {"seed", "num_workers", "save_every", "evaluate_every", "epochs" if config.max_steps else "max_steps"}
    apart |= {"adam_epsilon"} if config.optimizer == "sgd" else set()
    return {name: value for name, value in asdict(config).items() if name not in apart and value is not None}


def judge(
    zero_shot: float,
    adapted: dict[str, Any],
    answers: np.ndarray,
    history: list[dict[str, float]],
    class_names: list[str],
) -> list[str]:
    """Reasons not to use an adapter although its training was completed, as sentences.

    `zero_shot` is an accuracy, `adapted` the metrics of the adapter, `answers` (n,) are its labels for the test
    pictures, `history` is that of its training, empty where it was fitted in closed form.
    """
    remarks, accuracy = [], adapted["accuracy"]
    remedy = "lower `learning_rate`, train for longer, or give more pictures" if history else "give more pictures"
    untested = adapted["per_class_accuracy"].count(None)
    chance = 1 / len(class_names)
    if len(class_names) == 1:
        remarks.append("There is only one class, so every answer is right and the accuracy means nothing.")
    elif untested:
        remarks.append(f"Of {len(class_names)} classes {untested} could not be tested, for lack of a picture.")
    if len(class_names) - untested > 1 and len(set(answers.tolist())) == 1:
        name = class_names[answers[0]]
        remarks.append(f"Every test picture is classified as {name!r}: the training has failed; {remedy}.")
    elif history and len(class_names) > 1 and history[-1]["train_accuracy"] < 1.5 * chance:
        remarks.append(
            f"It has not learned its training pictures (accuracy {history[-1]['train_accuracy']:.3f} in the last "
            f"epoch, {chance:.3f} by chance): change `learning_rate`, or train for longer."
        )
    if accuracy < zero_shot:
        remarks.append(
            f"The adapter is worse than zero-shot ({accuracy:.3f} against {zero_shot:.3f}), so the model does better "
            f"without it: {remedy}."
        )
    return remarks


def write_run(
    folder: Path,
    model: AdaptedModel,
    history: list[dict[str, float]],
    before: dict[str, Any],
    after: dict[str, Any],
    results: dict[str, Any],
    calibration: Calibration | None = None,
) -> None:
    """Adds results.json, training_log.jsonl, training.png and the card that describes them to a trained model's folder,
    and calibration.json if there is a calibration.

    `before` and `after` are the metrics of zero-shot and of the model. The adapter's config records what it was trained
    on. All files are complete before they get their names, results.json last. Without matplotlib there is no
    training.png.
    """
    staged = folder / "results.tmp"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    if can_plot():
        plot_run(staged / "training.png", history, model.class_names, before, after)
    (staged / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    write_json(staged / "results.json", results)
    if calibration is not None:
        calibration.save(staged)
    noted = ("dataset_id", "dataset_title", "data_licence", "toy", "classes", "shots", "seed", "captions", "recipe")
    trained_on = {"dataset": dataset_title(results)} | {name: results[name] for name in noted if name in results}
    model.learner.config.trained_on = trained_on
    model.save_pretrained(staged)
    for file in sorted(staged.iterdir(), key=lambda file: file.name == "results.json"):
        put_in_place(file, folder / file.name)
    staged.rmdir()
