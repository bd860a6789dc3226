"""The commands by which the papers' tables are to be run again, and the recipes they take."""

import re
import shlex
from contextlib import nullcontext
from string import Template

import pytest

from hf_tgpt.cli import compare
from hf_tgpt.cli.arguments import RECIPES_FOLDER, parse_arguments
from hf_tgpt.data import find_benchmark

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


COMPARE = [command[2:] for command in commands() if command[:2] == ["hf-tgpt", "compare"]]


class Recorder:
    """Notes what a comparison would run, of each method at each number of shots once."""

    def __init__(self):
        self.calls, self.datasets = {}, set()

    def run(self, arguments, log):
        place = arguments.index("--dataset")
        self.datasets.add(arguments[place + 1])
        method = *arguments[:place], arguments[arguments.index("--shots") + 1]
        self.calls[method] = arguments
        return "left out"


@pytest.mark.parametrize("arguments", COMPARE, ids=lambda arguments: " ".join(arguments)[13:60])
def test_every_training_of_a_published_table_is_a_valid_call(arguments, monkeypatch, tmp_path):
    recorder = Recorder()
    monkeypatch.setattr(compare, "runner", lambda launcher: nullcontext(recorder))
    monkeypatch.setattr(compare, "_check_data", lambda *about: None)  # it is not here
    place = arguments.index("--output_dir") + 1
    assert compare.main([*arguments[:place], str(tmp_path), *arguments[place + 1 :]]) == 1
    assert recorder.calls
    assert all(find_benchmark(dataset)[0] for dataset in recorder.datasets)
    for call in recorder.calls.values():
        assert call[0] == "train"
        args = parse_arguments(call[1:])
        assert args.data.model == "openai/clip-vit-base-patch16"
        assert not args.recipe.name.startswith("toy")


def test_the_page_names_every_recipe_of_a_paper():
    recipes = {path.name for path in RECIPES_FOLDER.glob("*.json") if not path.name.startswith("toy_")}
    named_by_method = {"lora.json", "zero_shot.json", "linear_probe.json"}
    assert recipes - named_by_method <= set(re.findall(r"[\w-]+\.json", PAGE))
