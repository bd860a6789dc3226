"""The page of `hf-tgpt suggest`: one HTML file in which pictures get their labels, without a server or a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from .page import thumbnail

_TEMPLATE = Path(__file__).with_name("suggest.html.jinja")


def page(facts: dict[str, Any], class_names: Sequence[str]) -> str:
    """The page for the facts of `suggest_pictures`; its button saves the answers as the table that is taken in."""
    shown = [
        each | {"address": thumbnail({"bytes": None, "path": each["file"]}), "name": Path(each["file"]).name}
        for each in facts["suggestions"]
    ]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(facts=facts, shown=shown, class_names=class_names)
