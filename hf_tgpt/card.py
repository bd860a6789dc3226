"""The model card of an adapter: a Jinja document filled from its config and, after training, from its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

if TYPE_CHECKING:
    from .config import PromptConfig
    from .references import LoRA

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
# The heading of PEFT's empty form, which nobody keeps who fills it in.
_EMPTY = "# Model Card for Model ID"
_OURS = "<!-- Written by hf-tgpt, and again at every save; take this line out to keep your own words. -->"


def write_card(folder: str | Path, config: PromptConfig | LoRA, results: dict[str, Any] | None = None) -> None:
    """Writes README.md for the adapter in `folder`, of which `config` tells the rest. Unknown facts are left out.

    `results` is the content of results.json (see `examples/train.py`).
    """
    results = results or {}
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="image-classification",
        base_model=_public(config.base_model_name_or_path),
        datasets=[results["dataset"]] if _is_hub_dataset(results.get("dataset")) else None,
        tags=list(dict.fromkeys(["hf-tgpt", config.method.lower(), "clip", config.kind, "few-shot"])),
        model_name=f"{config.method} adapter" if results else None,
        eval_results=_eval_results(results),
    )
    content = dict(
        config=config,
        base_model=_public(config.base_model_name_or_path),
        results=results | {"dataset": _dataset_name(results)},
        mark=_OURS,
        has_picture=(Path(folder) / "training.png").exists(),
    )
    ModelCard.from_template(data, template_path=str(_TEMPLATE), **content).save(Path(folder) / "README.md")


def replace_empty_card(folder: str | Path, config: PromptConfig | LoRA) -> None:
    """Puts our card where PEFT has just left its empty form or changed our card; a card that somebody wrote stays."""
    readme, results = Path(folder) / "README.md", Path(folder) / "results.json"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if _EMPTY in text or _OURS in text:
        write_card(folder, config, json.loads(results.read_text()) if results.exists() else None)


def _public(name: str | None) -> str | None:
    """A Hub id; None for a path, which means nothing to anybody else."""
    return name if name and name.count("/") == 1 and not Path(name).exists() and ":" not in name else None


def _is_hub_dataset(name: str | None) -> bool:
    return bool(name) and ":" not in name and not Path(name).exists() and (name.count("/") == 0 or bool(_public(name)))


def _dataset_name(results: dict[str, Any]) -> str | None:
    """A path on somebody's disk is not for others to read."""
    name = results.get("dataset")
    return name if name is None or name.startswith("toyworld") or _is_hub_dataset(name) else "a local folder"


def _eval_results(results: dict[str, Any]) -> list[EvalResult] | None:
    measured = {
        "accuracy": "Accuracy",
        "wise_ft_accuracy": "Accuracy with WiSE-FT",
        "zero_shot_accuracy": "Zero-shot accuracy of the base model",
    }
    found = [
        EvalResult(
            task_type="image-classification",
            dataset_type=_dataset_name(results).replace(" ", "-"),
            dataset_name=_dataset_name(results),
            metric_type="accuracy",
            metric_name=title,
            metric_value=round(results[name], 4),
        )
        for name, title in measured.items()
        if results.get(name) is not None
    ]
    return found or None
