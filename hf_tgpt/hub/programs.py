"""The files that run an adapter on the Hub: a handler for Inference Endpoints, and the demo's page for a Space."""

from __future__ import annotations

from typing import Any

from huggingface_hub import SpaceCard, SpaceCardData

from ..utils.version import __version__

APP, REQUIREMENTS = "app.py", "requirements.txt"
# The version of gradio for a Space: the oldest that the page works with (pyproject.toml).
GRADIO = "6.31.0"
OURS = "Written by `hf-tgpt push --space`"
_HANDLER = '''"""Answers at an Inference Endpoint of the Hub."""

from hf_tgpt.inference.endpoint import EndpointHandler

__all__ = ["EndpointHandler"]
'''
_APP = '''"""{ours}, and again at every push: the page of `hf-tgpt demo`."""

import sys

from hf_tgpt.cli.main import main

sys.exit(main(["demo", "{folder}", "--host", "0.0.0.0", "--port", "7860"]))
'''
_README = """# {title}

Drop a picture, and see the likeliest of {count} classes by a {method} adapter, beside those of zero-shot CLIP.

{ours}: the adapter is in the folder `{folder}`, and `app.py` shows the page.
"""


def endpoint_files(package: str | None = None) -> dict[str, str]:
    """{name: text} of the files that Inference Endpoints need beside an adapter.

    Example:
        >>> sorted(endpoint_files())
        ['handler.py', 'requirements.txt']
    """
    return {"handler.py": _HANDLER, REQUIREMENTS: f"{package or _released('')}\n"}


def space_files(folder: str, config: Any, package: str | None = None) -> dict[str, str]:
    """{name: text} of a Space's files beside the adapter in `folder`, whose config this is; `package` as above.

    Example:
        >>> sorted(space_files("my-pictures", hf_tgpt.CoOpConfig(class_names=["cat", "dog"])))
        ['README.md', 'app.py', 'requirements.txt']
    """
    base = config.base_model_name_or_path
    facts = {"title": folder, "folder": folder, "count": len(config.class_names), "method": config.method, "ours": OURS}
    data = SpaceCardData(
        title=folder,
        emoji="🔎",
        colorFrom="blue",
        colorTo="green",
        sdk="gradio",
        sdk_version=GRADIO,
        app_file=APP,
        models=[base] if base and "/" in base else None,
        tags=["hf-tgpt", "clip", "few-shot"],
    )
    card = SpaceCard(f"---\n{data.to_yaml()}\n---\n\n{_README.format(**facts)}")
    return {
        APP: _APP.format(**facts),
        REQUIREMENTS: f"{package or _released('[demo]')}\n",
        "README.md": str(card),
    }


def _released(extra: str) -> str:
    return f"hf-tgpt{extra}>={__version__}"
