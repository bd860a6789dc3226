"""How options are spelled, and those that several commands have. Imports no library, so that help is quick."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one sentence that says what to do, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        stop = "" if message.endswith((".", "?", "!")) else "."
        self.exit(2, f"{self.prog}: error: {message}{stop} `{self.prog} --help` lists all options.\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments; ends the program for one that nobody takes."""
        found, unknown = self.parse_known_args(args, namespace)
        self.refuse_unknown(unknown)
        return found

    def refuse_unknown(self, unknown: Sequence[str], owners: Mapping[str, Sequence[str]] | None = None) -> None:
        """Ends the program for arguments that nobody takes, with the nearest option or, by `owners`, whose it is."""
        if not unknown:
            return
        first = next((word for word in unknown if word.startswith("--")), unknown[0])
        name = first.partition("=")[0]
        own = [option for action in self._actions if action.help != argparse.SUPPRESS
               for option in action.option_strings]  # fmt: skip
        message = f"unrecognized arguments: {' '.join(unknown)}"
        if methods := (owners or {}).get(name.removeprefix("--")):
            message += f"; {name} is an option of {', '.join(methods)}"
        elif near := difflib.get_close_matches(name, own, n=1, cutoff=0.7):
            message += f"; did you mean {near[0]}?"
        self.error(message)


ADAPTER = "a folder that training wrote, or an adapter's id on the Hub"


# Options that mean something when nothing stands behind them.
_MAY_BE_EMPTY = ("--prompt",)


def underscored(arguments: Sequence[str]) -> list[str]:
    """The arguments with "_" for every "-" in the names of options, so that both are understood.

    Ends the program for an empty argument, as a script passes one whose variable is not set.
    """
    spelled = [_underscored(argument) if argument.startswith("--") else argument for argument in arguments]
    for before, argument in zip(["", *spelled], spelled, strict=False):
        name, equals, value = argument.partition("=") if argument.startswith("--") else (before, "=", argument)
        if equals and not value.strip() and name not in _MAY_BE_EMPTY:
            place = name if name.startswith("--") else "an argument"
            print(f"hf-tgpt: error: {place} is empty; give a value or leave it out.", file=sys.stderr)
            raise SystemExit(2)
    return spelled


def _underscored(option: str) -> str:
    name, equals, value = option.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def whole_number(text: str, least: int = 0, most: int | None = 2**32 - 1) -> int:
    """A type of argparse's: by default a seed of numpy's."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: choose a whole number") from None
    if number < least or (most is not None and number > most):
        raise argparse.ArgumentTypeError(f"{text}: choose {least} {'or more' if most is None else f'to {most}'}")
    return number


def at_least_one(text: str) -> int:
    """A type of argparse's: 1 or more."""
    return whole_number(text, 1, None)


def port(text: str) -> int:
    """A type of argparse's: a port of TCP, 0 for any."""
    return whole_number(text, most=2**16 - 1)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", action="store_true", help="print the results as JSON and nothing else on stdout")


def add_classes(parser: argparse.ArgumentParser, purpose: str = "in place of the adapter's (open methods)") -> None:
    """Adds `--class_names` and `--class_names_file`."""
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--class_names", nargs="+", metavar="NAME", help=f"class names, {purpose}")
    names.add_argument("--class_names_file", help="a file of class names, a line each, or .json")


def add_set(parser: argparse.ArgumentParser, *also: str) -> None:
    """Adds `--set`, and other names of it."""
    parser.add_argument("--set", *also, dest="set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of the "
                        "adapter's config to change for this call, such as wise_ft=0.3")  # fmt: skip


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds what loading an adapter takes beside its name."""
    add_set(parser)
    parser.add_argument("--model", help="another copy of the base model: a Hub id or folder")
    parser.add_argument("--revision", help="of the adapter on the Hub")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU where there is one)")
