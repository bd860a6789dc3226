"""Shell completion with a static script, so that pressing Tab does not start Python."""

from __future__ import annotations

import argparse

from . import calibrate, compare, describe, evaluate
from .arguments import parser_of_all_methods
from .main import parser
from .options import CommandParser


def script(shell: str) -> str:
    """The script for "bash", "zsh" or "tcsh". Raises ValueError without shtab, saying how to install it."""
    try:
        import shtab
    except ImportError:
        raise ValueError('Completion in a shell needs shtab: pip install "hf-tgpt[completion]".') from None
    top, commands = all_commands()
    for each in commands.choices.values():
        for action in each._actions:
            if action.choices is None and action.nargs != 0:
                action.complete = shtab.FILE
    return shtab.complete(top, shell)


def all_commands() -> tuple[CommandParser, argparse._SubParsersAction]:
    """The parser of the program with all options of all commands, and the commands in it."""
    top, commands = parser()
    commands.choices["train"] = parser_of_all_methods()
    for module in (calibrate, compare, describe, evaluate):
        commands.choices[module.__name__.rpartition(".")[2]] = module.parser()
    known = commands.choices["compare"]._option_string_actions
    for action in commands.choices["train"]._actions:
        if not (known.keys() | compare.OURS) & {*action.option_strings, action.dest}:  # what it passes on to train
            commands.choices["compare"]._add_action(action)
    return top, commands
