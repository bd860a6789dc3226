"""The page of `hf-tgpt check`: one HTML file with all its pictures, which needs no network and no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Image

from ..inference.encoded import Encoded
from .page import thumbnail, write_page

_OF_A_GROUP = 6  # pictures that are shown


def write_check_page(path: Path, facts: dict[str, Any], encoded: Encoded, count: int) -> None:
    """Writes the page for the facts of `check_pictures`, with the first `count` of each list."""
    undecoded = encoded.dataset.select_columns("image").cast_column("image", Image(decode=False))
    start = {split: encoded.splits.index(split) for split in set(encoded.splits)}

    def small(found: dict[str, Any]) -> dict[str, str]:
        """A picture's data URI and its caption."""
        record = undecoded[start[found["split"]] + found["row"]]["image"]
        split = f" ({found['split']})" if found["split"] else ""
        return {"address": thumbnail(record), "name": found["file"], "label": f"{found['label']}{split}"}

    def cards(kind: str) -> Sequence[dict[str, Any]]:
        """The first pictures of a list, or groups of pictures, with what was found."""
        return [
            found | {"pictures": [small(each) for each in found.get("files", [found])[:_OF_A_GROUP]]}
            for found in facts[kind][:count]
        ]

    # Unreadable files have no picture.
    shown = {kind: cards(kind) for kind in ("label_errors", "duplicates", "outliers", "blank", "tiny")}
    classes = _hardest_first(facts["per_class"])[:count]
    write_page(path, "check.html.jinja", facts=facts, shown=shown, count=count, classes=classes)


def _hardest_first(per_class: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(per_class, key=lambda one: (one.get("cross_validated_recall", 1), one.get("zero_shot_recall", 1)))
