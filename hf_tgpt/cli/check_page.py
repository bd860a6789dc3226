"""The page of `hf-tgpt check`: one HTML file with all its pictures, which needs no network and no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from datasets import Image
from PIL import Image as PILImage

from ..data.images import decode_image
from ..inference.encoded import Encoded

_TEMPLATE = Path(__file__).with_name("check.html.jinja")
_SIDE = 160  # of a small picture, in pixels
_OF_A_GROUP = 6  # pictures that are shown


def page(facts: dict[str, Any], encoded: Encoded, count: int) -> str:
    """The page for the facts of `check_pictures`, with the first `count` of each list."""
    undecoded = encoded.dataset.select_columns("image").cast_column("image", Image(decode=False))
    start = {split: encoded.splits.index(split) for split in set(encoded.splits)}

    def small(found: dict[str, Any]) -> dict[str, str]:
        """A picture's address and what is under it."""
        record = undecoded[start[found["split"]] + found["row"]]["image"]
        split = f" ({found['split']})" if found["split"] else ""
        return {"address": _address(record), "name": found["file"], "label": f"{found['label']}{split}"}

    def cards(kind: str) -> Sequence[dict[str, Any]]:
        """The first pictures of a list, or groups of pictures, with what was found."""
        return [
            found | {"pictures": [small(each) for each in found.get("files", [found])[:_OF_A_GROUP]]}
            for found in facts[kind][:count]
        ]

    # Of files that cannot be read there is no picture.
    shown = {kind: cards(kind) for kind in ("label_errors", "duplicates", "outliers", "blank", "tiny")}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(facts=facts, shown=shown, count=count, classes=_hardest_first(facts["per_class"])[:count])


def _hardest_first(per_class: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(per_class, key=lambda one: (one.get("cross_validated_recall", 1), one.get("zero_shot_recall", 1)))


def _address(record: dict[str, Any]) -> str:
    """A small copy as a data URI."""
    image, file = decode_image(record), io.BytesIO()
    image.thumbnail((_SIDE, _SIDE), PILImage.Resampling.BICUBIC)
    image.save(file, "jpeg", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
