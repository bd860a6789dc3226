"""The model card of an adapter: a Jinja document filled from its config and, after training, from its results."""

from __future__ import annotations

import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..adapters.config import PromptConfig
from ..evaluation.calibration import Calibration, read_calibration
from ..utils.files import read_json
from ..utils.names import in_a_line, is_toy_clip, public_name
from .client import CARD, PLOTS

# Instead of a path, which is meaningless to others.
LOCAL = "a local folder"
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
# The heading of PEFT's empty form, which is removed when it is filled in.
_EMPTY = "# Model Card for Model ID"
_OURS = "<!-- Written by hf-tgpt, and again at every save; take this line out to keep your own words. -->"
# In the order of the recipe's row.
_RECIPE = {
    "optimizer": "{}",
    "learning_rate": "learning rate {:g}",
    "weight_decay": "weight decay {:g}",
    "batch_size": "batches of {}",
    "max_steps": "{} steps",
    "epochs": "{} epochs",
    "warmup_steps": "{} warm-up steps",
    "warmup_epochs": "{} warm-up epochs",
}


def write_card(
    folder: str | os.PathLike[str],
    config: PromptConfig,
    results: dict[str, Any] | None = None,
    repository: str | None = None,
    base_licence: str | list[str] | None = None,
    data_licence: str | list[str] | None = None,
) -> None:
    """Writes README.md for the adapter in `folder`, whose other facts are in `config`. Unknown facts are left out.

    `results` is the content of results.json (see `training.results.summarise`), `repository` where it is published.
    """
    known = results or config.trained_on or {}
    base, toy = public_name(config.base_model_name_or_path), is_toy_clip(config.base_model_name_or_path)
    dataset = hub_dataset(known)
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="image-classification",
        base_model=base,
        datasets=[dataset] if dataset else None,
        tags=list(dict.fromkeys(["hf-tgpt", config.method.lower(), "clip", config.kind, "few-shot"])),
        model_name=f"{config.method} adapter" if results else None,
        eval_results=_eval_results(results) if results else None,
    )
    content: dict[str, Any] = dict(
        config=config,
        base_model=base,
        toy_clip=toy,
        revision=config.revision,
        results=known | {"dataset": dataset_title(known)},
        recipe=_recipe(known.get("recipe", {})),
        licences=_licences(base_licence or ("apache-2.0" if toy else None), data_licence or known.get("data_licence")),
        repository=repository or "this-repository",
        mark=_OURS,
        in_a_line=in_a_line,
        calibration=_calibration(folder),
        plots={words: name for name, words in PLOTS.items() if (Path(folder) / name).exists()},
    )
    ModelCard.from_template(data, template_path=str(_TEMPLATE), **content).save(Path(folder) / CARD)


def _calibration(folder: str | os.PathLike[str]) -> Calibration | None:
    """The calibration of these weights. Saving must not fail because it is damaged or belongs to other weights."""
    with suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_calibration(folder)
    return None


def replace_empty_card(folder: str | os.PathLike[str], config: PromptConfig) -> None:
    """Writes our card in place of PEFT's empty form or PEFT's changes to our card; a card that somebody wrote stays."""
    readme, results = Path(folder) / CARD, Path(folder) / "results.json"
    if readme.exists() and (is_ours(readme) or _EMPTY in readme.read_text(encoding="utf-8")):
        write_card(folder, config, read_json(results) if results.exists() else None)


def is_ours(card: str | os.PathLike[str]) -> bool:
    """Whether the card is generated and has not been rewritten."""
    return _OURS in Path(card).read_text(encoding="utf-8")


def dataset_title(results: dict[str, Any]) -> str | None:
    """The name of the data, without local paths."""
    name = results.get("dataset")
    if name is None or name.startswith("toyworld") or hub_dataset(results):
        return results.get("dataset_title", name)
    return results.get("dataset_title", LOCAL)


def hub_dataset(results: dict[str, Any]) -> str | None:
    """The id on the Hub of the data set that a run was trained on."""
    if "dataset_title" in results:  # one of hf_tgpt.data.BENCHMARKS
        return results.get("dataset_id")
    name = results.get("dataset") or ""
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not os.path.exists(name) else None


def _recipe(recipe: dict[str, Any]) -> str:
    return ", ".join(words.format(recipe[name]) for name, words in _RECIPE.items() if recipe.get(name))


def _licences(base: str | list[str] | None, data: str | list[str] | None) -> dict[str, str]:
    licences = {"the base model": base, "the data": data}
    return {of: ", ".join([name] if isinstance(name, str) else name) for of, name in licences.items() if name}


def _eval_results(results: dict[str, Any]) -> list[EvalResult] | None:
    measured = {
        "accuracy": "Accuracy",
        "wise_ft_accuracy": "Accuracy with WiSE-FT",
        "zero_shot_accuracy": "Zero-shot accuracy of the base model",
    }
    title = dataset_title(results)
    if title is None:  # the data set is unknown
        return None
    metrics = [
        EvalResult(
            task_type="image-classification",
            dataset_type=hub_dataset(results) or title.replace(" ", "-"),
            dataset_name=title,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(results[key], 4),
        )
        for key, name in measured.items()
        if results.get(key) is not None
    ]
    return metrics or None
