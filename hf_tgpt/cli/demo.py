"""`hf-tgpt demo`: a web page that classifies the pictures dropped on it."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import fields
from pathlib import Path

from ..data import choose_classes, load_splits
from ..data.remarks import remark
from ..hub.run import local_folder, results_of
from ..inference.classifier import Classifier
from ..inference.confusions import read_predictions
from ..inference.demo import Demonstration, listen, make_page, require_gradio, serve
from ..inference.examples import Examples
from .arguments import DataArguments
from .loaded import classifier_of, data_of_run, training_pictures
from .output import list_remarks, tidy_output


def main(args: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C."""
    tidy_output()
    require_gradio()
    with listen(args.host, args.port) as listener:
        title = Path(args.adapter).resolve().name if os.path.isdir(args.adapter) else args.adapter
        classifier, folder = classifier_of(args), local_folder(args.adapter, revision=args.revision)
        with list_remarks():
            examples = None if args.examples is None else _examples(args, folder, classifier)
            # The test is only valid for the adapter as trained.
            predictions = {} if args.set else read_predictions(folder, classifier.class_names)
        page = make_page(Demonstration(classifier, examples, predictions), title)
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(json.dumps({"url": url}) if args.json else f"{url}  (Ctrl-C stops it)", flush=True)
        serve(page, listener)
    return 0


def _examples(args: argparse.Namespace, folder: str, classifier: Classifier) -> Examples:
    """The training pictures in the data set of --examples, or in the run's own if none is named.

    All pictures of its training split, if none of them is known to be a training picture.
    """
    own = args.examples is True
    dataset = results_of(folder).get("dataset") if own else args.examples
    if not dataset:
        raise ValueError(f"`examples`: {args.adapter!r} does not record its data set; name one: --examples DATASET.")
    given = dict.fromkeys((field.name for field in fields(DataArguments)), None)
    data = data_of_run(folder, given | {"dataset": dataset})
    try:
        splits = choose_classes(load_splits(**data.source, seed=None), data.classes)
    except (ValueError, OSError) as error:
        if not own:
            raise
        raise ValueError(f"`examples` names no data set, and the run's own cannot be read; name it. {error}") from error
    pictures, described = training_pictures(splits, folder), "training pictures"
    if not len(pictures):
        pictures, described = splits.get("train", splits["test"]), "labelled pictures"
        remark(f"None of {dataset!r} is known to be a training picture of {args.adapter}, so all are examples.")
    classifier.model.requires_grad_(False)  # so that features can be stored
    features = args.cache_dir or (Path(folder) / "features" if os.path.isdir(args.adapter) else None)
    return Examples(pictures, classifier, features, described)
