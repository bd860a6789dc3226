"""Help that begins with what most people need, completion, errors as JSON, and the right spelling."""

import json
import re
import subprocess
import sys

import pytest

from hf_tgpt.cli import completion
from hf_tgpt.cli.main import main

COMMANDS = [
    "train", "evaluate", "calibrate", "compare", "describe", "check", "embed", "predict", "suggest", "demo", "explain",
    "serve", "info", "export", "push", "convert", "convert-base",
]  # fmt: skip


def ended(capsys, *arguments):
    """The exit status of a command line that ends in its parser, and what it printed."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return (end.value.code, *capsys.readouterr())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_the_options_that_most_need_and_ends_with_examples(command, capsys):
    status, out, _ = ended(capsys, command, "--help")
    assert status == 0
    titles = re.findall("^([a-z ]+):$", out, re.MULTILINE)
    if command != "info":  # it has one option
        assert next(title for title in titles if title != "positional arguments") == "most used"
        first = out.partition("most used:\n")[2].partition("\n\n")[0]
        assert 2 <= sum(line.startswith("  --") for line in first.splitlines()) <= 6
        assert "other options" in titles
    assert titles[-1] == "examples"
    examples = [line for line in out.partition("\nexamples:\n")[2].splitlines() if f"hf-tgpt {command}" in line]
    assert 2 <= len(examples) <= 3


def test_the_list_of_commands_is_all_there_are():
    assert sorted(completion.all_commands()[1].choices) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_json_and_knows_its_options_misspelled(command, capsys):
    """Also where the misspelled option is a required one."""
    status, out, err = ended(capsys, command, "--jsno")
    assert (status, out) == (2, "")
    assert "did you mean --json?" in err
    assert err.startswith(f"hf-tgpt {command}: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--jsno"], ["--seeds", "x"], ["--datsets", "pictures"]])
def test_wrong_arguments_are_json_where_that_is_asked_for(arguments, capsys):
    status, out, err = ended(capsys, "compare", "--json", *arguments)
    assert status == 2
    assert f"hf-tgpt compare: error: {json.loads(out)['error']}" in err


def test_a_failure_is_json_where_that_is_asked_for(tmp_path, capsys):
    assert main(["info", str(tmp_path), "--json"]) == 1
    out, err = capsys.readouterr()
    assert err == f"hf-tgpt info: {json.loads(out)['error']}\n"


def test_a_mistyped_command_is_answered_by_the_nearest(capsys):
    assert "did you mean predict?" in ended(capsys, "predcit")[2]
    assert "did you mean --print_completion?" not in ended(capsys, "zzz")[2]


def completed(script, *words):
    """What bash offers for the last of the words."""
    line = (
        f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_hf_tgpt; printf '%s\\n' ${{COMPREPLY[@]}}"
    )
    shell = subprocess.run(["bash", "-c", f"{script}\n{line}"], capture_output=True, text=True, check=True, timeout=20)
    return shell.stdout.split()


def test_bash_completes_commands_options_and_methods(capsys):
    pytest.importorskip("shtab")
    status, script, _ = ended(capsys, "--print-completion", "bash")
    assert status == 0
    assert completed(script, "hf-tgpt", "pre") == ["predict"]
    assert completed(script, "hf-tgpt", "predict", "--top") == ["--top_k"]
    assert completed(script, "hf-tgpt", "train", "--prompt_d") == ["--prompt_depth"]
    assert completed(script, "hf-tgpt", "train", "--method", "map") == ["maple"]
    assert completed(script, "hf-tgpt", "compare", "--protocols", "base") == ["base-to-new"]
    assert completed(script, "hf-tgpt", "compare", "--max_s") == ["--max_steps"]  # which it passes on to train
    assert completed(script, "hf-tgpt", "compare", "--method") == ["--methods"]


def test_without_shtab_completion_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "zsh"]) == 1
    assert 'pip install "hf-tgpt[completion]"' in capsys.readouterr().err
