"""`hf-tgpt demo`: a web page that classifies the pictures dropped on it."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from ..inference.demo import Demonstration, listen, make_page, require_gradio, serve
from .loaded import classifier_of
from .output import tidy_output


def main(args: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C."""
    tidy_output()
    require_gradio()
    with listen(args.host, args.port) as listener:
        title = Path(args.adapter).resolve().name if os.path.isdir(args.adapter) else args.adapter
        page = make_page(Demonstration(classifier_of(args)), title)
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(json.dumps({"url": url}) if args.json else f"{url}  (Ctrl-C stops it)", flush=True)
        serve(page, listener)
    return 0
