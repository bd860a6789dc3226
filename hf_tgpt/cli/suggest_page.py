"""The page of `hf-tgpt suggest`: one HTML file in which pictures get their labels, without a server or a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .page import thumbnail, write_page


def write_suggest_page(path: Path, facts: dict[str, Any], class_names: Sequence[str]) -> None:
    """Writes the page for the facts of `suggest_pictures`; its button saves the answers as a table to take in."""
    shown = [
        each | {"address": thumbnail({"bytes": None, "path": each["file"]}), "name": Path(each["file"]).name}
        for each in facts["suggestions"]
    ]
    write_page(path, "suggest.html.jinja", facts=facts, shown=shown, class_names=class_names)
