"""`hf-tgpt push`: publishes an adapter on the Hub: as a model, for Inference Endpoints, or as a Space."""

from __future__ import annotations

import argparse
import json

from ..hub.push import push_folder
from ..hub.space import push_space
from .output import tidy_output


def main(args: argparse.Namespace) -> int:
    """Publishes it and prints the address."""
    tidy_output()
    private = True if args.private else None
    if args.package and not (args.space or args.endpoint):
        raise ValueError("`package` is what `space` or `endpoint` installs; choose one of them.")
    if args.space:
        if args.revision:
            raise ValueError("`revision` is for models, and a Space shows its main branch; leave it out.")
        commit = push_space(args.adapter, args.repository, private=private, package=args.package)
    else:
        commit = push_folder(
            args.adapter, args.repository, private=private, revision=args.revision, endpoint=args.endpoint,
            package=args.package,
        )  # fmt: skip
    url = str(commit.repo_url)
    print(json.dumps({"url": url, "commit": commit.oid}) if args.json else url)
    return 0
