"""How objects look in a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping


def html_table(title: str, rows: Mapping[str, str]) -> str:
    """A table of names and values with a title; all of them are text, never markup."""
    lines = [
        f"<tr><th>{html.escape(name)}</th><td style='text-align: left'>{html.escape(value)}</td></tr>"
        for name, value in rows.items()
    ]
    return f"<table><caption>{html.escape(title)}</caption>{''.join(lines)}</table>"
