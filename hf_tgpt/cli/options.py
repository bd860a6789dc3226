"""The spelling of options, and options that several commands share. Imports no library, so that help is fast."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

EXIT = """exit status:
  0    done
  1    failed (compare: at least one run failed)
  2    wrong arguments
  3    done, but some files could not be read and were skipped (predict, embed, explain, suggest)
  130  stopped by Ctrl-C
  143  training or comparison stopped by SIGTERM"""


class WrongArguments(SystemExit):
    """Ends the program with status 2; `message` is the printed error without the name of the command."""

    def __init__(self, message: str):
        super().__init__(2)
        self.message = message


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one sentence with the remedy, without the list of all options.

    `examples` are commands, one per line, at the end of the help.
    """

    def __init__(self, *args: Any, examples: str = "", **options: Any):
        epilog = f"{EXIT}\n\nexamples:\n{textwrap.indent(examples.strip(), '  ')}" if examples else None
        defaults: dict[str, Any] = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(*args, **(defaults | {"epilog": epilog} | options))
        self._words: Sequence[str] = ()

    def lead_with(self, *names: str) -> None:
        """Lists these arguments, the most used ones, first in the help."""
        first = self.add_argument_group("most used")
        self._action_groups.insert(1, self._action_groups.pop())  # after the positional ones
        for name in names:
            (action,) = (action for action in self._actions if action.dest == name)
            for group in self._action_groups:
                if action in group._group_actions:
                    group._group_actions.remove(action)
            first._group_actions.append(action)
        self._optionals.title = "other options"

    def error(self, message: str) -> NoReturn:
        unknown = [word for word in self._words if word.startswith("--") and self._is_unknown(word)]
        if "are required" in message and unknown:  # one of them may be a misspelled required option
            message += f"; {unknown[0]} is unknown{self.nearest(unknown[0])}"
        elif choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += _did_you_mean(choice[1], re.findall(r"[^\s,']+", choice[2]))
        stop = "" if message.endswith((".", "?", "!")) else "."
        print(f"{self.prog}: error: {message}{stop} `{self.prog} --help` lists all options.", file=sys.stderr)
        raise WrongArguments(message + stop)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments; ends the program for an unknown one."""
        found, unknown = self.parse_known_args(args, namespace)
        self.refuse_unknown(unknown)
        return found

    def refuse_unknown(self, unknown: Sequence[str], owners: Mapping[str, Sequence[str]] | None = None) -> None:
        """Ends the program for unknown arguments, naming the closest option or its `owners`."""
        if not unknown:
            return
        first = next((word for word in unknown if word.startswith("--")), unknown[0])
        name = first.partition("=")[0]
        message = f"unrecognized arguments: {' '.join(unknown)}"
        if methods := (owners or {}).get(name.removeprefix("--")):
            message += f"; {name} is an option of {', '.join(methods)}"
        else:
            message += self.nearest(name)
        self.error(message)

    def _is_unknown(self, word: str) -> bool:
        return word.partition("=")[0] not in self._option_string_actions

    def nearest(self, word: str) -> str:
        """ "; did you mean --X?" with the option closest to `word`, "" if none is close."""
        own = [option for action in self._actions if action.help != argparse.SUPPRESS
               for option in action.option_strings]  # fmt: skip
        return _did_you_mean(word.partition("=")[0], own)


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


ADAPTER = "a folder that training wrote, or an adapter's id on the Hub"


# Those of `encoders.precision`, the default first.
DTYPES = ("fp32", "bf16", "fp16", "auto")
DTYPE = "precision of the base model; auto: bf16 if it is faster on this device"
TO_LABEL = "to-label"  # the folder of suggestions
JSON = "print the results, or the error, as a JSON object and nothing else on stdout"


# Options that have a meaning without a value.
_MAY_BE_EMPTY = ("--prompt",)


def underscored(arguments: Sequence[str]) -> list[str]:
    """The arguments with "_" for every "-" in the names of options, so that both are accepted.

    Ends the program for an empty argument, which a script may pass if a variable is not set.
    """
    spelled = [_underscored(argument) if argument.startswith("--") else argument for argument in arguments]
    for before, argument in zip(["", *spelled], spelled, strict=False):
        name, equals, value = argument.partition("=") if argument.startswith("--") else (before, "=", argument)
        if equals and not value.strip() and name not in _MAY_BE_EMPTY:
            place = name if name.startswith("--") else "an argument"
            message = f"{place} is empty; give a value or leave it out."
            print(f"hf-tgpt: error: {message}", file=sys.stderr)
            raise WrongArguments(message)
    return spelled


def _underscored(option: str) -> str:
    name, equals, value = option.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def whole_number(text: str, least: int = 0, most: int | None = 2**32 - 1) -> int:
    """An argparse type: by default a numpy seed."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: choose a whole number") from None
    if number < least or (most is not None and number > most):
        raise argparse.ArgumentTypeError(f"{text}: choose {least} {'or more' if most is None else f'to {most}'}")
    return number


def at_least_one(text: str) -> int:
    """An argparse type: 1 or more."""
    return whole_number(text, 1, None)


def fraction(text: str) -> float:
    """An argparse type: 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text}: choose 0 to 1")
    return number


def port(text: str) -> int:
    """An argparse type: a TCP port, 0 for any."""
    return whole_number(text, most=2**16 - 1)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", action="store_true", help=JSON)


def add_classes(parser: argparse.ArgumentParser, purpose: str = "in place of the adapter's (open methods)") -> None:
    """Adds `--class_names` and `--class_names_file`."""
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--class_names", nargs="+", metavar="NAME", help=f"class names, {purpose}")
    names.add_argument("--class_names_file", help="a file of class names, one per line, or .json")


def share(text: str) -> float:
    """An argparse type: a number between 0 and 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text}: choose a share between 0 and 1, such as 0.9")
    return number


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds the options for calibrated adapters: `--coverage` and `--reject`."""
    parser.add_argument(
        "--coverage", type=share, metavar="SHARE", help="answer with as many classes as it takes for the right one to "
        "be among them in this share of pictures, such as 0.9 (for an adapter after `hf-tgpt calibrate`)"
    )  # fmt: skip
    parser.add_argument("--reject", action="store_true", help="give pictures of none of the classes no label, but the "
                        "nearest class (for an adapter after `hf-tgpt calibrate`)")  # fmt: skip


def add_dtype(parser: argparse._ActionsContainer) -> None:
    """Adds `--dtype`."""
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=f"{DTYPE} (default: %(default)s)")


def add_set(parser: argparse._ActionsContainer, *also: str) -> None:
    """Adds `--set` and its other names."""
    parser.add_argument("--set", *also, dest="set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of the "
                        "adapter's config to change for this call, such as wise_ft=0.3")  # fmt: skip


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options for loading an adapter."""
    group = parser.add_argument_group("adapter and base model")
    add_set(group)
    group.add_argument("--model", help="another copy of the base model: a Hub id or folder")
    group.add_argument("--revision", help="the adapter's branch, tag or commit on the Hub")
    add_dtype(group)
    group.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")


def add_pictures(parser: argparse.ArgumentParser) -> None:
    """Adds a data set as the first argument, and the options for reading it."""
    parser.add_argument("pictures", help="a folder of pictures, a file, a Hub id or a known name, as --dataset in "
                        "training")  # fmt: skip
    group = parser.add_argument_group("pictures")
    group.add_argument("--splits", help="one of CoOp's split files (split_zhou_*.json) for the pictures in the folder")
    group.add_argument("--class_names_file", help="a file of other class names, as in training")
    for column in ("image", "label"):
        group.add_argument(f"--{column}_column", help=f"the {column} column of a file or Hub data set (default: found "
                           "by its type)")  # fmt: skip


def add_base_model(parser: argparse.ArgumentParser) -> None:
    """Adds the base model, without an adapter, and its device."""
    parser.add_argument("--model", help="a CLIP or another dual encoder: a Hub id or folder (default: as in training)")
    add_dtype(parser)
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--num_workers", type=whole_number, default=0, help="processes that decode pictures "
                        "(default: threads of this one)")  # fmt: skip
