"""What programs print."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import datasets
import transformers


def tidy_output() -> None:
    """For programs: no bars of the libraries without a terminal, no warning that is PEFT's to mend, and all others
    without the line of code that they come from.
    """
    warnings.formatwarning = lambda message, *place, **line: f"Note: {message}\n"
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def markdown_table(header: list[str], rows: list[list]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


def accuracies(results: dict[str, Any]) -> str:
    """Lines for the terminal."""
    names = {"zero_shot_accuracy": "zero-shot accuracy", "accuracy": "adapted accuracy"}
    names["wise_ft_accuracy"] = "with WiSE-FT at 0.5"
    return "\n".join(f"{words:20} {results[name]:.3f}" for name, words in names.items() if name in results)
