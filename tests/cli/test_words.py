"""What is wrong is said in the words of the command line, whoever found it, before anything is made."""

import re

import numpy as np
import pytest
from PIL import Image

from hf_tgpt.cli.arguments import DEFAULT_MODEL, RECIPES_FOLDER, parse_arguments
from hf_tgpt.cli.main import main
from hf_tgpt.cli.words import in_options, speak_of

TRAIN = ("train", "--dataset", "pictures", "--model", "toy", "--method", "coop")
PYTHON = re.compile(r"`\w+`|\w=True|\bNone\b|Traceback|\.py\b")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with pictures and with files of the wrong kinds, where the user stands."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    (tmp_path / "file").write_text("x")
    (tmp_path / "table.xlsx").write_bytes(b"PK")
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n")
    (tmp_path / "overlap.txt").write_text("dog\ncats\n")
    (tmp_path / "damaged.json").write_text("{")
    return tmp_path


CASES = [
    (("--seed", "99999999999"), "--seed=99999999999: choose 4294967295 or less"),
    (("--seed", "-1"), "--seed=-1: choose 0 or more"),
    (("--dataset", ""), "--dataset is empty; give a value or leave it out"),
    (("--model", " "), "--model is empty"),
    (("--output-dir=",), "--output_dir is empty"),
    (("--output_dir", "file"), "--output_dir='file' is a file or below one; choose a folder"),
    (("--output_dir", "file/run"), "--output_dir='file/run' is a file or below one"),
    (("--resume",), "--resume needs the run's folder; name it with --output_dir"),
    (("--resume", "--output_dir", "pictures"), "--resume: 'pictures' contains no run"),
    (("--shots", "0"), "--shots=0: choose 1 or more"),
    (("--shots", "9"), "lower --shots or pass --allow_fewer"),
    (("--cache_features", "-1"), "--cache_features=-1: choose 1 or more"),
    (("--learning_rate", "inf"), "--learning_rate=inf: choose a finite number"),
    (("--learning_rate", "nan"), "--learning_rate=nan: choose a finite number"),
    (("--warmup_learning_rate", "nan"), "--warmup_learning_rate=nan: choose a finite number"),
    (("--num_workers", "-1"), "--num_workers=-1: choose 0 or more"),
    (("--prompt_length", "0"), "--prompt_length=0: learn at least 1 token"),
    (("--method", "clop"), "--method='clop' is unknown; choose one of"),
    (("--config", "damaged.json"), "--config='damaged.json' is not a readable JSON file"),
    (("--class_names_file", "overlap.txt"), "--class_names_file would rename by position, 'cat' -> 'dog'"),
    (("--class_names_file", "missing"), "--class_names_file='missing' does not exist"),
    (("--image_column", "x"), "--image_column='x' is not a column"),
    (("--dataset", "columns.csv"), "--image_column is not given and no column holds the image; name one of: a, b"),
    (("--dataset", "table.xlsx"), "--dataset='table.xlsx' is a spreadsheet; save its table as CSV"),
    (("--dataset", "file"), "--dataset='file' is neither a folder nor a file of a known kind"),
    (("--dataset", "no/where/at/all"), "--dataset='no/where/at/all' does not exist; correct the path"),
    (("--dataset", "ucf101"), "--dataset='ucf101' has no copy on the Hub"),
    (("--log_with", "x"), "--log_with='x' is not an installed tracker; choose one of aim, clearml, comet_ml"),
    (("--log_with", "clearml"), "is not an installed tracker; install it (pip install clearml)"),
    (("--model", "/no/such"), "--model='/no/such' is not a folder"),
    (("--method", "maple", "--cache_features", "1"), "MAPLE as configured learns prompts in the vision tower"),
    (("--prompt_length", "500"), "--prompt_length=500: the text tower's context of 77 leaves room for 73"),
]


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_a_training_that_cannot_be_is_refused_in_options_and_leaves_nothing(arguments, message, here, capsys):
    before = sorted(here.rglob("*"))
    try:
        status = main([*TRAIN, *arguments])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status in (1, 2)
    said = err.strip().splitlines()[-1]
    assert message in said
    assert not PYTHON.search(said)
    assert not out or re.match(r"\w+ on pictures by ", out)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--adapter", "a", "--seed", "99999999999"), "--seed: 99999999999: choose 0 to 4294967295"),
        (("evaluate", "--adapter", ""), "--adapter is empty"),
        (("evaluate", "--dataset", "pictures"), "the adapter is not named: a folder that training wrote, or an id on"),
        (("evaluate", "a", "--set", "x"), "--set: 'x' is not of the form FIELD=VALUE"),
        (("evaluate", "--adapter", "a", "--output", "file/x.json"), "='file/x.json': its folder cannot be made"),
        (("predict", "a", "pictures", "--top_k", "0"), "argument --top_k: 0: choose 1 or more"),
        (("predict", "a", "pictures", "--top_k", "two"), "argument --top_k: two: choose a whole number"),
        (("predict", "a", "pictures", "--output", "x.xlsx"), "--output='x.xlsx' ends with neither .csv"),
        (("predict", "a", "--list", "none"), "--list='none' cannot be read"),
        (("predict", "a"), "No picture is given; name files, folders, or a --list of them"),
        (("predict", "", "pictures"), "an argument is empty"),
        (("demo", "a", "--port", "99999"), "argument --port: 99999: choose 0 to 65535"),
        (("describe", "--model", "m", "--dataset", "pictures", "--output", "pictures"), "is a folder; name a file"),
        (("describe", "--model", "m", "--dataset", "", "--output", "o"), "--dataset is empty"),
        (("describe", "--model", "m", "--dataset", "d", "--output", "o", "--seed", "-1"), "choose 0 to 4294967295"),
        (("info", ""), "an argument is empty"),
    ],
)  # fmt: skip
def test_other_commands_refuse_in_options_too(arguments, message, here, capsys):
    try:
        status = main(list(arguments))
    except SystemExit as end:
        status = end.code
    err = capsys.readouterr().err
    assert status in (1, 2)
    assert message in err
    assert not PYTHON.search(err.splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("train", "--datset", "pictures"), "--datset pictures; did you mean --dataset?"),
        (("train", "--method", "maple", "--alpha", "1"), "--alpha 1; --alpha is an option of gda, mmrl, tip_adapter."),
        (("predict", "run", "pictures", "--topk", "3"), "--topk 3; did you mean --top_k?"),
        (
            ("compare", "--methods", "gda", "--epoch", "3"),
            "GDA: unrecognized arguments: --epoch 3; did you mean --epochs?",
        ),
        (("info", "run", "--qqqq"), "unrecognized arguments: --qqqq."),
    ],
)
def test_a_wrong_option_is_answered_by_the_nearest_or_by_whose_it_is(arguments, hint, capsys):
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert hint in err
    assert err.count("\n") == 1
    assert err.endswith(f"`hf-tgpt {arguments[0]} --help` lists all options.\n")


def test_names_that_are_no_options_stay_as_they_are():
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--shots")
    parser.add_argument("--dataset")
    parser.add_argument("--allow_fewer")
    speak_of(parser)
    assert in_options("`shots`=9: lower `shots` or pass allow_fewer=True.") == (
        "--shots=9: lower --shots or pass --allow_fewer."
    )
    assert in_options("`source`='x' is `strange`") == "--dataset='x' is `strange`"
    assert in_options("`dataset`=None but other=True") == "--dataset is not given but other=True"


def test_photographs_get_a_clip_that_knows_them_and_the_toy_world_the_toy():
    args = parse_arguments(["--dataset", "pictures"])
    assert (args.data.model, args.recipe) == (DEFAULT_MODEL, RECIPES_FOLDER / "gda.json")
    args = parse_arguments(["--dataset", "oxford_pets", "--method", "maple"])
    assert (args.data.model, args.recipe) == (DEFAULT_MODEL, RECIPES_FOLDER / "maple.json")
    for arguments, recipe in (
        ([], "toy_tgpt.json"),
        (["--dataset", "toyworld:shapes"], "toy_tgpt.json"),
        (["--dataset", "pictures", "--model", "toy"], "gda.json"),
    ):
        args = parse_arguments(arguments)
        assert (args.data.model, args.recipe) == (None, RECIPES_FOLDER / recipe)


@pytest.mark.parametrize("option", ["--epochs=3", "--learning_rate=0.1", "--descriptions=file.jsonl"])
def test_options_of_other_methods_are_not_passed_over_where_no_method_is_named(option, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--dataset", "pictures", option])
    message = f"{option.partition('=')[0]} has no effect on gda, the default method for your own pictures"
    assert message in capsys.readouterr().err
    assert parse_arguments(["--dataset", "pictures", "--method", "tgpt", option]).method == "tgpt"


def test_without_the_hub_the_default_is_refused_with_what_to_do(here, capsys):
    assert main(["train", "--dataset", "pictures"]) == 1
    err = capsys.readouterr().err
    assert f"--model={DEFAULT_MODEL!r}: no model config could be loaded from it" in err
    assert "connect to the Hub (and unset HF_HUB_OFFLINE) to have it fetched, or name a folder" in err
    assert not (here / "runs").exists()
