"""What the commands of one adapter load by their arguments."""

from __future__ import annotations

import argparse

from ..data.class_lists import read_class_names
from ..inference.classifier import Classifier, load_classifier


def classifier_of(args: argparse.Namespace) -> Classifier:
    """The adapter on its base model."""
    return load_classifier(args.adapter, args.device, base_model=args.model, revision=args.revision)


def class_names_of(args: argparse.Namespace) -> list[str] | None:
    """The class names that were given, if any."""
    if args.class_names_file is None:
        return args.class_names
    names = read_class_names(args.class_names_file)
    return list(names.values()) if isinstance(names, dict) else names
