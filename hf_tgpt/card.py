"""The model card of an adapter: a Jinja document filled from its config and, after training, from its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .config import PromptConfig

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
# What PEFT writes for everything it does not know; a card with it was filled in by nobody.
_EMPTY = "[More Information Needed]"


def write_card(folder: str | Path, config: PromptConfig, results: dict[str, Any] | None = None) -> None:
    """Writes README.md for the adapter in `folder`. Unknown facts are left out.

    `results` is the content of results.json (see `examples/train.py`).
    """
    results = results or {}
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="image-classification",
        base_model=_public(config.base_model_name_or_path),
        datasets=[_public(results["dataset"])] if _public(results.get("dataset")) else None,
        tags=["hf-tgpt", config.method.lower(), "clip", "prompt-learning", "few-shot"],
        model_name=f"{config.method} adapter" if results else None,
        eval_results=_eval_results(results),
    )
    content = dict(
        config=config,
        config_class=type(config).__name__,
        citation=config.learner_class.citation,
        base_model=_public(config.base_model_name_or_path),
        results=results,
        has_picture=(Path(folder) / "training.png").exists(),
    )
    ModelCard.from_template(data, template_path=str(_TEMPLATE), **content).save(Path(folder) / "README.md")


def replace_empty_card(folder: str | Path, config: PromptConfig) -> None:
    """Puts our card where PEFT has just left its empty form; a card that somebody wrote stays."""
    readme = Path(folder) / "README.md"
    if not readme.exists() or _EMPTY in readme.read_text(encoding="utf-8"):
        write_card(folder, config)


def _public(name: str | None) -> str | None:
    """A Hub id; None for a path, which means nothing to anybody else."""
    return name if name and name.count("/") == 1 and not Path(name).exists() and ":" not in name else None


def _eval_results(results: dict[str, Any]) -> list[EvalResult] | None:
    measured = {
        "accuracy": "Accuracy",
        "wise_ft_accuracy": "Accuracy with WiSE-FT",
        "zero_shot_accuracy": "Zero-shot accuracy of the base model",
    }
    found = [
        EvalResult(
            task_type="image-classification",
            dataset_type=results["dataset"],
            dataset_name=results["dataset"],
            metric_type="accuracy",
            metric_name=title,
            metric_value=round(results[name], 4),
        )
        for name, title in measured.items()
        if results.get(name) is not None
    ]
    return found or None
