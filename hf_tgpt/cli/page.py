"""Shared by the HTML pages of the commands: their templates, and embedded thumbnails."""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image as PILImage

from ..data.images import decode_image

_SIDE = 160  # of a small picture, in pixels


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def write_page(path: Path, template: str, **facts: Any) -> None:
    """Fills in a template of this folder and writes it; file names may not be valid Unicode."""
    html = _environment().get_template(template).render(facts)
    path.write_text(html, encoding="utf-8", errors="backslashreplace")


def thumbnail(record: dict[str, Any]) -> str:
    """A thumbnail of a stored picture as a data URI. Raises ValueError if it cannot be read."""
    return address(decode_image(record))


def address(image: PILImage.Image) -> str:
    """A small copy of an RGB picture as a data URI."""
    image, file = image.copy(), io.BytesIO()
    image.thumbnail((_SIDE, _SIDE), PILImage.Resampling.BICUBIC)
    image.save(file, "jpeg", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
