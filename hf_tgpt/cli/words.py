"""Turns library arguments in messages into command-line options: `shots` becomes --shots."""

from __future__ import annotations

import argparse
import re

# Arguments of the library that have another name on the command line.
_OPTIONS = {"source": "dataset", "base_model": "model", "fields": "set", "folder": "to"}
# Options that name a data set, in commands without --dataset.
_DATA = ("examples", "int8")
# The options of the running command. A process runs only one, and its warnings come from anywhere.
_known: set[str] = set()
_places: set[str] = set()  # positional ones


def speak_of(parser: argparse.ArgumentParser) -> None:
    """Sets the parser whose options `in_options` recognises."""
    _known.clear()
    _known.update(option.removeprefix("--") for action in parser._actions for option in action.option_strings)
    _places.clear()
    _places.update(action.dest for action in parser._actions if not action.option_strings)


def in_options(text: str) -> str:
    """A message of the library with its fields as options: "`shots`=0: ..." becomes "--shots=0: ..."."""

    def option(match: re.Match[str]) -> str:
        name, value = _OPTIONS.get(match["name"], match["name"]), match["value"] or ""
        if name == "dataset" and name not in _known:
            if "pictures" in _places:
                return f"PICTURES{value}"
            name = next((other for other in _DATA if other in _known), name)
        if name not in _known:
            return match[0]
        return f"--{name} is not given" if value == "=None" else f"--{name}{value}"

    text = re.sub(r"\b(?P<name>[a-z]\w+)(?P<value>=)True\b", lambda match: option(match).rstrip("="), text)
    return re.sub(r"`(?P<name>[a-z]\w+)`(?P<value>=(?:None\b)?)?", option, text)
