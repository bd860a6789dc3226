"""How options are spelled, and those that several commands have. Imports no library, so that help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

ADAPTER = "a folder that training wrote, or an adapter's id on the Hub"


def underscored(arguments: Sequence[str]) -> list[str]:
    """The arguments with "_" for every "-" in the names of options, so that both are understood."""
    return [_underscored(argument) if argument.startswith("--") else argument for argument in arguments]


def _underscored(option: str) -> str:
    name, equals, value = option.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", action="store_true", help="print the results as JSON and nothing else on stdout")


def add_classes(parser: argparse.ArgumentParser, purpose: str = "in place of the adapter's (open methods)") -> None:
    """Adds `--class_names` and `--class_names_file`."""
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--class_names", nargs="+", metavar="NAME", help=f"class names, {purpose}")
    names.add_argument("--class_names_file", help="a file of class names, a line each, or .json")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds what loading an adapter takes beside its name."""
    parser.add_argument("--model", help="another copy of the base model: a Hub id or folder")
    parser.add_argument("--revision", help="of the adapter on the Hub")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU where there is one)")
