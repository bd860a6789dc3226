"""The commands by which the papers' tables are to be run again, and the recipes they take."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from string import Template

import pytest
from conftest import ROOT

from hf_tgpt.cli.arguments import RECIPES_FOLDER, parse_arguments
from hf_tgpt.data import find_benchmark

EXAMPLES = ROOT / "examples"
PAGE = (RECIPES_FOLDER / "README.md").read_text()


def commands():
    """The page's commands as lists of words, its variables filled in."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    variables, found = {}, []
    for line in blocks.splitlines():
        if assignment := re.fullmatch(r'(\w+)="(.*)"', line):
            variables[assignment[1]] = assignment[2]
        elif line:
            found.append(shlex.split(Template(line).substitute(variables)))
    return found


COMPARE = [command[2:] for command in commands() if command[1] == "examples/compare.py"]


@pytest.mark.parametrize("arguments", COMPARE, ids=lambda arguments: " ".join(arguments)[13:60])
def test_every_training_of_a_published_table_is_a_valid_call(arguments, monkeypatch, tmp_path):
    calls = []

    def record(command, **kwargs):
        calls.append([str(word) for word in command])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", record)
    monkeypatch.chdir(EXAMPLES.parent)
    place = arguments.index("--output_dir") + 1
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments[:place], str(tmp_path), *arguments[place + 1 :]])
    runpy.run_path(str(EXAMPLES / "compare.py"), run_name="__main__")
    assert len(calls) >= 9
    for call in calls:
        assert Path(call[2]).name == "train.py"
        args = parse_arguments(call[3:])
        assert args.data.model == "openai/clip-vit-base-patch16"
        assert not args.recipe.name.startswith("toy")
        assert find_benchmark(args.data.dataset)[0] is not None


def test_the_page_names_every_recipe_of_a_paper():
    recipes = {path.name for path in RECIPES_FOLDER.glob("*.json") if not path.name.startswith("toy_")}
    named_by_method = {"lora.json", "zero_shot.json", "linear_probe.json"}
    assert recipes - named_by_method <= set(re.findall(r"[\w-]+\.json", PAGE))
