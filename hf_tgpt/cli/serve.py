"""`hf-tgpt serve`: adapters behind HTTP, for other programs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path

from ..adapters.config import change_config
from ..hub.run import local_folder
from ..inference.demo import listen
from ..inference.loading import load_classifiers
from .loaded import fields_of, remark_on_cut_off
from .output import list_remarks, tidy_output

_NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def main(args: argparse.Namespace) -> int:
    """Serves until Ctrl-C or SIGTERM."""
    tidy_output()
    if any(importlib.util.find_spec(name) is None for name in _NEEDED):
        raise ValueError('The server needs FastAPI and more: pip install "hf-tgpt[serve]".')
    from ..inference.requests import Limits
    from ..inference.server import Service, make_app, serve, warm_up

    adapters = named(args.adapters)
    limits = Limits(
        body=args.max_body * 2**20,
        pictures=args.max_pictures,
        pixels=args.max_megapixels * 1_000_000,
        queue=args.max_queue,
        timeout=args.timeout,
    )
    if limits.queue < limits.pictures:
        raise ValueError(
            f"`max_queue`={limits.queue} has no room for a request of `max_pictures`={limits.pictures}; set it to "
            f"{limits.pictures} or more."
        )
    with listen(args.host, args.port) as listener:
        with list_remarks():
            for place in adapters.values():
                remark_on_cut_off(local_folder(place, revision=args.revision))
        classifiers = load_classifiers(
            adapters, args.device, base_model=args.model, revision=args.revision, dtype=args.dtype
        )
        for classifier in classifiers.values() if args.set else ():
            change_config(classifier.model, fields_of(args.set))
        warm_up(classifiers)
        app = make_app(Service(classifiers, limits, args.max_batch, args.max_wait_ms / 1000))
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        facts = {"url": url, "models": list(classifiers)}
        print(json.dumps(facts, ensure_ascii=False) if args.json else f"{url}  (Ctrl-C stops it)", flush=True)
        serve(app, listener, limits.timeout)
    return 0


def named(adapters: list[str]) -> dict[str, str]:
    """{name: folder or Hub id} from NAME=PLACE, or from places named by their last part.

    Raises ValueError for two with the same name.

    Example:
        >>> named(["cats=runs/my-run", "me/dogs"])
        {'cats': 'runs/my-run', 'dogs': 'me/dogs'}
    """
    found: dict[str, str] = {}
    for each in adapters:
        name, equals, place = ("", "", each) if os.path.isdir(each) else each.partition("=")
        if not equals:
            name, place = Path(each).resolve().name if os.path.isdir(each) else each.rpartition("/")[2], each
        if not name or not place:
            raise ValueError(f"{each!r} is not of the form NAME=ADAPTER; write it so, or name the adapter alone.")
        if name in found:
            raise ValueError(
                f"Two adapters are named {name!r}, {found[name]!r} and {place!r}; name them, as in {name}2={place}."
            )
        found[name] = place
    return found
