"""The main command, as a newcomer runs it."""

import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, METHODS, ROOT, Failed, make_classifier, pixels
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from PIL import Image as PILImage
from transformers import CLIPModel

from hf_tgpt import TOY_CLIP, available_methods, config_class, load_clip
from hf_tgpt.adapters.config import PromptConfig
from hf_tgpt.cli.arguments import RECIPES_FOLDER, parse_arguments, read_recipe
from hf_tgpt.cli.main import main
from hf_tgpt.evaluation.accuracy import for_classes
from hf_tgpt.evaluation.plots import plot_bars, plot_classes, plot_shots

EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(run_command):
    """run(*arguments) trains with the toy CLIP, or runs another command, and returns what it printed."""

    def run(*arguments, program="train"):
        return run_command(program, *(["--model", "toy"] if program == "train" else []), *arguments)

    return run


def parse(*arguments):
    return parse_arguments(list(map(str, arguments)))


def test_the_python_example_reads_and_runs_from_top_to_bottom(capsys):
    runpy.run_path(str(EXAMPLES / "python_api.py"), run_name="__main__")
    out = capsys.readouterr().out
    zero_shot, gda = map(float, re.match(r"zero-shot (0\.\d+), GDA (0\.\d+)\n", out).groups())
    assert gda > zero_shot + 0.3
    assert "MaPLe after 20 steps 0." in out
    assert "{'label': 'red things'" in out
    assert out.endswith("GDA has 41 classes now\n")


def test_the_notebook_has_the_code_of_the_python_example():
    notebook = json.loads((EXAMPLES / "python_api.ipynb").read_text())
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    headings = [cell["source"][0] for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    script = (EXAMPLES / "python_api.py").read_text().partition('"""\n\n')[2]
    assert code.split() == re.sub(r"(?m)^# \d\. .*", "", script).split()
    assert headings[1:] == [f"## {line[2:]}" for line in script.splitlines() if re.match(r"# \d\. ", line)]


def test_the_main_command_as_the_readme_gives_it(tmp_path):
    command = ["accelerate", "launch", str(EXAMPLES / "train.py")]
    done = subprocess.run([*command, "--epochs", "2"], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Reloaded from disk, it gives the same logits." in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    results = json.loads((folder / "results.json").read_text())
    assert (results["method"], results["shots"], results["dataset"]) == ("tgpt", 16, "toyworld:codes")
    assert results["accuracy"] > results["zero_shot_accuracy"] + 0.1
    assert "it/s" not in done.stderr  # no progress bars where there is no terminal


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:TGP-T is trained without descriptions")
def test_train_on_a_folder_of_pictures(method, run, pictures, tmp_path):
    output = tmp_path / "run"
    printed = run("--method", method, "--dataset", pictures, "--shots", 4, "--max_steps", 3, "--output_dir", output)
    assert "Reloaded from disk, it gives the same logits." in printed
    results = json.loads((output / "results.json").read_text())
    assert results["method"] == method
    assert results["shots"] == 4
    assert 0 <= results["zero_shot_accuracy"] <= 1
    assert {"accuracy", "seed", "trainable_parameters", "seconds", "peak_memory_bytes", "versions"} <= results.keys()
    assert ("wise_ft_accuracy" in results) == (method == "tgpt")
    assert (output / "training.png").is_file()
    model = PeftModel.from_pretrained(load_clip(TOY_CLIP), output)
    assert model.peft_config["default"].class_names == ["lime", "ripe tomato"]
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "peft"
    assert "lime, ripe tomato" in card.text
    assert "None" not in card.text
    assert "More Information Needed" not in card.text


@pytest.mark.parametrize("method", ["zero_shot", "linear_probe", "lora"])
def test_references_run_like_the_methods(method, run, pictures, tmp_path):
    output = tmp_path / "run"
    printed = run("--method", method, "--dataset", pictures, "--shots", 4, "--max_steps", 3, "--output_dir", output)
    assert "Reloaded from disk, it gives the same logits." in printed
    results = json.loads((output / "results.json").read_text())
    assert results["method"] == method
    assert (results["trainable_parameters"] == 0) == (method == "zero_shot")
    assert results["takes_new_classes"] == (method != "linear_probe")
    if method == "zero_shot":
        assert results["accuracy"] == results["zero_shot_accuracy"]


@pytest.fixture(scope="module")
def base_adapters(pictures, tmp_path_factory):
    """Adapters that know the first half of the pictures' classes: base_adapters[method] is a folder."""
    folder = tmp_path_factory.mktemp("base")
    for method in ("maple", "linear_probe"):
        command = ["train", "--method", method, "--dataset", pictures, "--model", "toy", "--classes", "base", "--json"]
        command += ["--shots", "2", "--max_steps", "2", "--output_dir", folder / method]
        with redirect_stdout(io.StringIO()) as printed:
            assert main(list(map(str, command))) == 0
        told = json.loads(printed.getvalue())
        assert told.pop("output_dir") == str(folder / method)
        assert told == json.loads((folder / method / "results.json").read_text())
    return {path.name: path for path in folder.iterdir()}


def test_an_open_method_is_evaluated_on_classes_it_has_not_seen(base_adapters, run, pictures, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in base_adapters["maple"].iterdir()}
    about = ("--dataset", pictures, "--output", tmp_path / "new.json")
    printed = run("--adapter", base_adapters["maple"], "--classes", "new", *about, program="evaluate")
    assert "new classes (1), 4 pictures" in printed
    results = json.loads((tmp_path / "new.json").read_text())
    assert results["accuracy"] == 1.0  # there is one class to choose from
    assert len(results["per_class_accuracy"]) == 1
    assert {path: path.stat().st_mtime_ns for path in base_adapters["maple"].iterdir()} == before  # nothing was trained
    told = json.loads(
        run("--adapter", base_adapters["maple"], "--classes", "new", *about, "--json", program="evaluate")
    )
    assert told["accuracy"] == results["accuracy"]


def test_the_programs_are_commands_of_hf_tgpt(pictures, tmp_path, capsys):
    wrong = tmp_path / "nothing"
    for command, *arguments in (
        ("train", "--dataset", wrong, "--output_dir", tmp_path / "run"),
        ("evaluate", "--adapter", wrong),
        ("describe", "--model", TOY_CLIP, "--dataset", wrong, "--output", tmp_path / "new.jsonl"),
    ):
        assert main([command, *map(str, arguments)]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"hf-tgpt {command}: ")
        assert str(wrong) in err
        with pytest.raises(SystemExit) as stopped:
            main([command, "--datset", "pictures"])
        assert stopped.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith(f"hf-tgpt {command}: error: ")
        assert err.endswith(f" `hf-tgpt {command} --help` lists all options.\n")


def test_a_training_that_diverges_is_explained_like_any_failure(monkeypatch, capsys):
    def diverge(*_, **__):
        raise FloatingPointError("not finite at step 3")

    monkeypatch.setattr("hf_tgpt.cli.train.main", diverge)
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "hf-tgpt train: not finite at step 3\n"


def test_a_run_is_resumed_by_its_folder_and_may_then_keep_other_checkpoints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--resume"])
    assert "--resume needs the run's folder; name it with --output_dir" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert parse("--keep_checkpoints", 3, "--save_every", 2).settings == parse().settings
    assert parse("--batch_size", 4).settings != parse().settings


def test_a_method_with_fixed_classes_refuses_others_and_says_so_in_the_results(base_adapters, run, pictures, tmp_path):
    about = ("--dataset", pictures, "--output", tmp_path / "new.json")
    with pytest.raises(Failed, match="'ripe tomato'"):
        run("--adapter", base_adapters["linear_probe"], "--classes", "new", *about, program="evaluate")
    results = json.loads((tmp_path / "new.json").read_text())
    assert results["accuracy"] is None
    assert "'ripe tomato'" in results["refused"]


def test_a_fixed_class_list_is_scored_among_the_classes_that_are_asked_for(load_clip):
    model = make_classifier("linear_probe", load_clip(), CLASS_NAMES).eval()
    wanted = [CLASS_NAMES[3], CLASS_NAMES[1]]
    logits = for_classes(model, wanted)(pixels(model.get_base_model())).logits
    assert torch.equal(logits, model(pixels(model.get_base_model())).logits[:, [3, 1]])
    assert for_classes(model, CLASS_NAMES) is model


@pytest.mark.filterwarnings("ignore:the class names of Food101")
def test_published_accuracies_of_the_same_training_and_test_stand_beside_ours(base_adapters, run, pictures, tmp_path):
    adapter = shutil.copytree(base_adapters["maple"], tmp_path / "maple")
    results = json.loads((adapter / "results.json").read_text())
    (adapter / "results.json").write_text(json.dumps(results | {"dataset": f"food101:{pictures}", "shots": 16}))
    about = ("--adapter", adapter, "--dataset", f"food101:{pictures}", "--compare-with-published")
    printed = run(*about, "--classes", "new", "--output", tmp_path / "new.json", program="evaluate")
    assert "| MaPLe on CLIP ViT-B/16 | 92.05 | Khattak et al., CVPR 2023 (MaPLe), table 3 |" in printed
    assert f"| measured: {adapter} on {TOY_CLIP} | 100.00 | this run |" in printed
    published = json.loads((tmp_path / "new.json").read_text())["published"]
    assert {"CLIP", "CoOp", "CoCoOp", "KgCoOp", "MaPLe", "PromptSRC"} <= {row["method"] for row in published}
    with pytest.raises(Failed, match="there is no published number for food101, all classes"):
        run(*about, program="evaluate")


def test_zero_shots_folder_is_evaluated_as_zero_shot_clip(run, pictures, tmp_path):
    run("--method", "zero_shot", "--dataset", pictures, "--shots", 2, "--output_dir", tmp_path / "run")
    told = json.loads(run("--adapter", tmp_path / "run", "--dataset", pictures, "--json", program="evaluate"))
    assert told["accuracy"] == told["zero_shot_accuracy"]


@pytest.mark.filterwarnings("ignore:TGP-T is trained without descriptions")
def test_a_changed_field_is_evaluated_beside_the_adapter_as_it_is(run, pictures, tmp_path):
    about = ("--dataset", pictures, "--shots", 4, "--max_steps", 3, "--output_dir", tmp_path / "run")
    run("--method", "tgpt", *about)
    about = (tmp_path / "run", "--dataset", pictures)
    told = json.loads(run(*about, "--set", "wise_ft=1.0", "--json", program="evaluate"))
    assert told["changed"]["fields"] == {"wise_ft": "1.0"}
    assert told["changed"]["largest_difference_of_logits"] > 0  # the zero-shot head alone
    assert told["accuracy"] == json.loads(run(*about, "--json", program="evaluate"))["accuracy"]
    assert "with wise_ft=1.0: " in run(*about, "--change", "wise_ft=1.0", program="evaluate")
    with pytest.raises(Failed, match="--set: 'head' is not a field of TGPTConfig that may change"):
        run(*about, "--set", "head=1", program="evaluate")
    with pytest.raises(Failed, match="--set: 'wise_ft' is not of the form FIELD=VALUE"):
        run(*about, "--set", "wise_ft", program="evaluate")


def test_without_matplotlib_a_run_has_no_picture_and_says_so(run, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    about = ("--dataset", pictures, "--method", "zero_shot", "--output_dir", tmp_path / "run")
    assert 'needs matplotlib: pip install "hf-tgpt[plots]"' in run(*about)
    assert not (tmp_path / "run" / "training.png").exists()
    assert "training.png" not in (tmp_path / "run" / "README.md").read_text()
    about = ("--adapter", "never read", "--dataset", pictures, "--picture", "classes.png")
    with pytest.raises(Failed, match=r"need matplotlib: pip install \"hf-tgpt\[plots\]\""):
        run(*about, program="evaluate")


@pytest.mark.filterwarnings("ignore:`log_with=clearml` was passed")
def test_a_tracker_that_is_not_installed_is_said_before_training(run, pictures, tmp_path):
    with pytest.raises(Failed, match="hf-tgpt train: --log_with='clearml' is not an installed tracker"):
        run("--dataset", pictures, "--log_with", "clearml", "--output_dir", tmp_path / "run")


@pytest.mark.draws
def test_pictures_of_a_comparison_leave_out_what_was_not_measured(tmp_path):
    row = {"all classes": (50.0, 1.0)}
    table = {(1, "MaPLe"): row, (4, "MaPLe"): {"all classes": (60.0, 2.0)}, (4, "broken"): {}, (1, "once"): row}
    plot_shots(tmp_path / "shots.png", "toy", "all classes", table)
    plot_bars(tmp_path / "bars.png", "toy", ["base", "all classes"], table, 4)
    for name in ("shots", "bars"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000


@pytest.mark.draws
@pytest.mark.parametrize("most", [30, 3])
def test_a_picture_shows_the_change_of_each_class_and_the_confusions(tmp_path, most):
    labels = np.arange(40) % 8
    metrics = [{"per_class_accuracy": [share, *[None] * 2, *[0.5] * 5]} for share in (0.2, 0.8)]
    names = [f"class {i}" for i in range(8)]
    plot_classes(tmp_path / "new" / "classes.png", names, *metrics, (labels + (labels > 5)) % 8, labels, most)
    with PILImage.open(tmp_path / "new" / "classes.png") as picture:
        assert picture.width > 600


def test_a_run_is_not_overwritten(run, pictures, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(Failed, match="already holds another run"):
        run("--dataset", pictures, "--output_dir", tmp_path)


def test_a_run_that_ended_before_any_work_leaves_its_folder_free(run, pictures, tmp_path):
    with pytest.raises(Failed, match="correct the path"):
        run("--dataset", pictures / "mistyped", "--output_dir", tmp_path / "run")
    run("--method", "zero_shot", "--dataset", pictures, "--shots", 2, "--output_dir", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["dataset"] == str(pictures)


def test_too_few_pictures_are_named_and_may_be_accepted(run, pictures, tmp_path):
    arguments = ("--dataset", pictures, "--shots", 9, "--batch_size", 2, "--max_steps", 2,
                 "--config", RECIPES_FOLDER / "toy_tgpt.json")  # fmt: skip
    with pytest.raises(Failed, match=r"--shots=9 .*lime.*lower --shots or pass --allow_fewer"):
        run(*arguments, "--output_dir", tmp_path / "a")
    with pytest.warns(UserWarning, match="TGP-T is trained without descriptions"):
        run(*arguments, "--allow_fewer", "--output_dir", tmp_path / "b")


@pytest.mark.filterwarnings("ignore:TGP-T is trained without descriptions")
def test_splits_names_and_descriptions_are_files_of_ones_own(run, pictures, tmp_path):
    def entry(split, i, name):
        return [f"{split}/{name}/{i}.jpg", ["lime", "ripe_tomato"].index(name), name]

    names = ("lime", "ripe_tomato")
    content = {
        "train": [entry("test", i, name) for name in names for i in range(4)],
        "val": [entry("val", i, name) for name in names for i in range(2)],
        "test": [entry("train", i, name) for name in names for i in range(5)],
    }
    (tmp_path / "split.json").write_text(json.dumps(content))
    (tmp_path / "names.txt").write_text("lime\tgreen fruit\nripe_tomato\tred fruit\n")
    lines = [f"test/{name}/{i}.jpg\ta round thing on a table\t{name}" for name in names for i in range(4)]
    (tmp_path / "descriptions.txt").write_text("\n".join(lines))
    (tmp_path / "classes.json").write_text(json.dumps({"green fruit": ["sour and green"], "red fruit": ["red"]}))
    output = tmp_path / "run"
    about = (
        "--method",
        "tgpt",
        "--splits",
        tmp_path / "split.json",
        "--class_names_file",
        tmp_path / "names.txt",
        "--shots",
        4,
    )
    run("--dataset", pictures, *about, "--descriptions", tmp_path / "descriptions.txt", "--max_steps", 1,
        "--class_descriptions", tmp_path / "classes.json", "--batch_size", 4, "--output_dir", output)  # fmt: skip
    results = json.loads((output / "results.json").read_text())
    assert results["captions"] == "descriptions"
    assert PeftConfig.from_pretrained(output).class_names == ["green fruit", "red fruit"]
    template = tmp_path / "template"
    run("--dataset", pictures, *about, "--batch_size", 4, "--max_steps", 1, "--output_dir", template)
    assert json.loads((template / "results.json").read_text())["captions"] == "template"
    assert "| captions in training | template |" in (template / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:TGP-T is trained without descriptions")
@pytest.mark.parametrize("method", ["tgpt", "coop", "linear_probe"])
def test_training_from_cached_features(method, run, pictures, tmp_path):
    about = ("--method", method, "--dataset", pictures, "--shots", 4, "--batch_size", 4, "--max_steps", 3)
    kept = ("--cache_features", 2, "--cache_dir", tmp_path / "kept")
    run(*about, *kept, "--output_dir", tmp_path / "a")
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()}
    run(*about, *kept, "--output_dir", tmp_path / "b")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()} == made
    accuracies = [json.loads((tmp_path / name / "results.json").read_text())["accuracy"] for name in "ab"]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("method", ["maple", "lora"])
def test_what_learns_in_the_vision_tower_cannot_be_trained_from_cached_features(method, run, pictures, tmp_path):
    about = ("--method", method, "--dataset", pictures, "--shots", 4, "--output_dir", tmp_path / "run")
    with pytest.raises(Failed, match=r"learns prompts in the vision tower|trains weights in the vision tower"):
        run(*about, "--cache_features", 1)


def test_captions_are_asked_for_by_name(run, pictures, tmp_path):
    with pytest.raises(Failed, match="--caption_column='text' is not a column"):
        run("--dataset", pictures, "--caption_column", "text", "--output_dir", tmp_path / "run")


@pytest.mark.parametrize("method", available_methods())
def test_help_explains_every_field_of_the_method(method, run):
    text = run("--method", method, "--help")
    own = {field.name for field in fields(config_class(method))} - {field.name for field in fields(PromptConfig)}
    for name in ("shots", "learning_rate", "output_dir", *own):
        assert f"--{name}" in text
    assert ("--prompt_depth" in text) == (method == "maple")
    assert ("--wise_ft" in text) == (method == "tgpt")
    assert "--inference_mode" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lasso"], "--method='lasso' is unknown; choose one of"),
        (["--prompt_dept", "3"], "unrecognized arguments: --prompt_dept 3"),
        (["--config", "nowhere.json"], "--config='nowhere.json' is not a readable JSON file"),
        (["--method", "maple", "--config", str(RECIPES_FOLDER / "tgpt.json")], "is a recipe for a method other than"),
        (["--learning_rate", "0"], "--learning_rate=0.0: choose a number above 0"),
    ],
)
def test_bad_arguments_end_with_an_explanation(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(RECIPES_FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_names_its_source(path):
    content = json.loads(path.read_text())
    assert ("note" if path.stem.startswith("toy") else "source") in content
    args = parse("--method", content["method"], "--config", path)
    for name, value in content.items():
        assert name in ("source", "note") or args.settings[name] == value


def test_a_recipe_of_the_package_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("--config", "tgpt_eurosat.json").recipe == RECIPES_FOLDER / "tgpt_eurosat.json"
    Path("tgpt_eurosat.json").write_text('{"method": "tgpt"}')
    assert parse("--config", "tgpt_eurosat.json").recipe == Path("tgpt_eurosat.json")
    assert parse("--config", "tgpt-stanford-cars").recipe == RECIPES_FOLDER / "tgpt_stanford_cars.json"


@pytest.mark.parametrize("content", ['{"labels": ["cat"]}', '{"search": false, "templates": ["zzz {}."]}'])
def test_a_file_of_a_recipes_name_in_the_working_folder_is_no_recipe_unless_it_is_asked_for(
    content, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("gda.json").write_text(content)  # as export leaves one beside gda.onnx
    for dataset in ("toyworld:codes", str(tmp_path)):
        asked = parse("--method", "gda", "--dataset", dataset)
        assert asked.recipe in (None, RECIPES_FOLDER / "gda.json")
        assert asked.method_config.get("templates") != ["zzz {}."]


def test_the_command_line_overrides_the_recipe(tmp_path):
    recipe = tmp_path / "mine.json"
    recipe.write_text(json.dumps({"method": "tgpt", "learning_rate": 0.5, "num_content_queries": 5}))
    assert read_recipe(recipe) == {"method": "tgpt", "learning_rate": 0.5, "num_content_queries": 5}
    more = ["--learning_rate", "0.25", "--templates", "a {}.", "the {}.", "--initial_text", "none"]
    args = parse("--config", recipe, *more)
    assert args.training.learning_rate == 0.25
    assert args.method_config["num_content_queries"] == 5
    assert args.method_config["templates"] == ["a {}.", "the {}."]
    assert args.method_config["initial_text"] is None
    assert parse("--method", "coop", "--class_specific").method_config["class_specific"] is True
    assert parse("--method", "coop", "--no-class_specific").method_config["class_specific"] is False
    recipe.write_text(json.dumps({"learning_rat": 0.5}))
    with pytest.raises(SystemExit, match="2"):
        parse("--config", recipe)


def test_the_toy_clip_loads_like_any_other():
    clip = CLIPModel.from_pretrained(TOY_CLIP)
    assert clip.dtype == torch.float32
    assert sum(p.numel() for p in clip.parameters()) < 2_000_000
    assert (TOY_CLIP / "model.safetensors").stat().st_size < 4_000_000
    assert sum(file.stat().st_size for file in TOY_CLIP.iterdir()) < 4_200_000


def test_a_folder_with_a_config_alone_gives_a_random_clip(tmp_path, clip_folders):
    shutil.copy(Path(clip_folders["plain"]) / "config.json", tmp_path)
    model = load_clip(tmp_path)
    assert isinstance(model, CLIPModel)
    again = load_clip(tmp_path)  # an adapter finds the same base model again
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model.name_or_path == str(tmp_path)
