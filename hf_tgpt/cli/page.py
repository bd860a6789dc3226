"""Shared by the HTML pages of the commands: their templates, and embedded thumbnails."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jinja2

from ..data.images import decode_image
from ..inference.pictures import small_address


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
    return small_address(decode_image(record))
