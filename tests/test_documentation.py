"""Every command and program in the documents is run as it stands there, on a small CLIP of the name that they give.

Trainings are cut to one step and comparisons and benchmarks to their arguments; of what installs, serves, exports, runs
tests or needs a file from elsewhere it is checked that the words are right.
"""

import contextlib
import copy
import doctest
import functools
import importlib
import io
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from string import Template
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, ImageProcessor
from open_clip_files import write_open_clip
from peft import get_peft_model
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

import hf_tgpt
from hf_tgpt import CoOpConfig, MaPLeConfig
from hf_tgpt.cli import compare, describe
from hf_tgpt.cli.arguments import parse_arguments
from hf_tgpt.cli.completion import all_commands
from hf_tgpt.cli.main import main, parse
from hf_tgpt.data import FewShotImages, ImageTransform, load_splits, sources

# Those of hf_tgpt/recipes are in test_recipes.py, the cards' snippets in test_card.py.
DOCUMENTS = [path for path in sorted(ROOT.rglob("*.md")) if not {"frozen", "recipes", ".git"} & set(path.parts)]
DOCUMENTS = [path for path in DOCUMENTS if path.parent.parent.name != "model_cards"]
CLIP = "openai/clip-vit-base-patch16"
SHORT = ["--max_steps", "2", "--shots", "2"]


def shortened(arguments):
    """A training of one step, or of one view where no method is named and so none is trained by steps."""
    by_default = "--dataset" in arguments and "--method" not in arguments
    return [*arguments, *(["--cache_features", "1"] if by_default else SHORT)]


def blocks(language):
    """{place: code} of all code blocks in this language; those of bash with the words of each command."""
    found = {}
    for path in DOCUMENTS:
        variables = {}
        for i, block in enumerate(re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)):
            place = f"{path.relative_to(ROOT)}, block {i + 1}"
            found[place] = commands(block, variables) if language == "bash" else block
    return found


def commands(block, variables):
    """The commands of a bash block as lists of words; `variables` are the document's, which the block adds to."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        for command in re.sub(r"(^|\s)#.*", "", line).split("&&"):
            if assignment := re.fullmatch(r'\s*(\w+)="(.*)"\s*', command):
                variables[assignment[1]] = assignment[2]
            elif command.strip():
                found.append(shlex.split(Template(command).substitute(variables)))
    return found


@pytest.fixture(scope="session")
def belongings(tmp_path_factory):
    """A folder with pictures, a CLIP, trained adapters and files of other programs, made once."""
    folder = tmp_path_factory.mktemp("newcomer")
    tokenizer = AutoTokenizer.from_pretrained(hf_tgpt.TOY_CLIP)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 12}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text, vision = ids | {"vocab_size": len(tokenizer)}, {"image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=small | text, vision_config=small | vision)).save_pretrained(folder / "base")
    crop = {"height": 32, "width": 32}
    tokenizer.save_pretrained(folder / "base")
    ImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder / "base")
    noise = np.random.default_rng(0)
    for data in ("pictures", "other-pictures", "my-data"):
        for split in ("train", "test"):
            for name in ("cat", "dog"):
                (folder / data / split / name).mkdir(parents=True)
                for i in range(2):
                    picture = Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8))
                    picture.save(folder / data / split / name / f"{i}.jpg")
    (folder / "unlabelled").mkdir()
    for name in ("cat.jpg", "newt-1.jpg", "newt-2.jpg", "unlabelled/1.jpg"):
        picture.save(folder / name)
    runs = {"my-run": MaPLeConfig, "my-coop-run": CoOpConfig, "my-tgpt-run": hf_tgpt.TGPTConfig}
    for run, config in runs.items():
        model = get_peft_model(clip_in(folder), config(class_names=["cat", "dog"])).eval()
        model.save_pretrained(folder / "runs" / run)
        for file in (folder / "runs" / run / name for name in ("adapter_config.json", "README.md")):
            file.write_text(file.read_text().replace(str(folder / "base"), CLIP))
        if run == "my-coop-run":
            weights = hf_tgpt.convert_to_original_state_dict(peft.get_peft_model_state_dict(model), "coop")
            torch.save({"state_dict": weights}, folder / "model.pth.tar-50")
    write_open_clip(folder / "bioclip")
    return folder


@functools.cache
def loaded(folder):
    return hf_tgpt.load_clip(folder / "base")


def clip_in(folder):
    """A copy of the CLIP there."""
    return copy.deepcopy(loaded(folder))


@pytest.fixture
def newcomer(belongings, hub, tmp_path, monkeypatch):
    """In a folder with pictures and trained adapters, and with a Hub that has an adapter and its CLIP."""
    shutil.copytree(belongings, tmp_path, dirs_exist_ok=True)
    hub.add_folder(CLIP, tmp_path / "base")
    hub.add_folder("me/my-pictures", tmp_path / "runs" / "my-coop-run", private=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def few_toys(monkeypatch):
    """Of each class of the toy world fewer pictures, so that commands take a second."""
    few = functools.partial(hf_tgpt.data.load_toyworld, train_per_class=4, validation_per_class=1, test_per_class=2)
    monkeypatch.setattr(sources, "load_toyworld", few)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # transformers' Trainer without a GPU
@pytest.mark.parametrize("block", blocks("python").values(), ids=blocks("python"))
def test_a_documented_program_runs(block, newcomer):
    block = block.replace(
        "toyworld:codes", "pictures"
    )  # as the document itself says; test_examples.py has the toy world
    pictures = [Image.new("RGB", (40, 40))] * 2
    exec(compile(block, "<document>", "exec"), {"pictures": pictures})


def examples():
    """{module: {place: lines}} of all examples in docstrings."""
    found = {}
    for info in pkgutil.walk_packages(hf_tgpt.__path__, "hf_tgpt."):
        if info.name != "hf_tgpt.__main__":
            tests = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(info.name))
            found[info.name] = {test.name: test.examples for test in tests if test.examples}
    return {module: places for module, places in found.items() if places}


@pytest.mark.parametrize("module", examples())
def test_the_examples_in_docstrings_run(module, belongings, newcomer):
    model = get_peft_model(clip_in(belongings), CoOpConfig(class_names=["cat", "dog"])).eval()
    transform = ImageTransform(32, (0.5,) * 3, (0.5,) * 3, train=True)
    images = FewShotImages(load_splits("pictures")["train"], transform)
    names = {
        "hf_tgpt": hf_tgpt,
        "peft": peft,
        "get_peft_model": get_peft_model,
        "torch": torch,
        "Accelerator": Accelerator,
        "images": images,
    }
    names |= {"model": model, "pixel_values": torch.rand(4, 3, 32, 32)}
    for lines in examples()[module].values():
        scope = vars(importlib.import_module(module)) | names | {"clip": clip_in(belongings)}
        for line in lines:
            if line.want:
                assert repr(eval(line.source, scope)) == line.want.strip()
            else:
                exec(line.source, scope)


DATA = [name for name, value in vars(hf_tgpt.data).items() if value.__class__.__name__ != "module" and name[0] != "_"]
PUBLIC = [(hf_tgpt, name) for name in hf_tgpt.__all__] + [(hf_tgpt.data, name) for name in DATA]


@pytest.mark.parametrize(("place", "name"), PUBLIC, ids=[f"{place.__name__}.{name}" for place, name in PUBLIC])
def test_a_public_name_has_an_example(place, name):
    value = getattr(place, name)
    assert not callable(value) or ">>>" in value.__doc__


@pytest.mark.parametrize("block", blocks("bash").values(), ids=blocks("bash"))
def test_a_documented_command_runs(block, newcomer, few_toys, monkeypatch):
    for words in block:
        check(words, monkeypatch)


@pytest.mark.parametrize("name", sorted(all_commands()[1].choices))
def test_an_example_in_the_help_of_a_command_runs(name, newcomer, few_toys, monkeypatch, capsys):
    if name != "train":
        shutil.copytree("runs/my-coop-run", "runs/mine")
    monkeypatch.setattr("sys.stdin", io.StringIO("cat.jpg\n"))
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    for words in commands(capsys.readouterr().out.rpartition("\nexamples:\n")[2], {}):
        check(words[words.index("|") + 1 :] if "|" in words else words, monkeypatch)


def check(words, monkeypatch):
    """Runs a command of the documents, as far as the head of this file says."""
    program, *arguments = words[: words.index(">")] if ">" in words else words
    if program == "pip":
        assert arguments[:3] == ["install", "-c", ".ci/constraints.txt"]
        assert arguments[3] == "-e"
    elif re.fullmatch(r"HF_TGPT_\w+=.*", program):
        check(arguments, monkeypatch)
    elif (program, arguments[:3]) == ("hf", ["jobs", "uv", "run"]):
        place = arguments.index("examples/train.py")
        parse_arguments(arguments[place + 1 :])
        of_the_hub = subprocess.run([sys.executable, "-m", "huggingface_hub.cli.hf", "jobs", "uv", "run", "--help"],
                                    capture_output=True, text=True).stdout  # fmt: skip
        assert all(word in of_the_hub for word in arguments[:place] if word.startswith("--"))
    elif program == "pytest":
        assert all((ROOT / word.partition("::")[0]).exists() for word in arguments if word.startswith("tests"))
    elif (program, arguments[:1]) == ("accelerate", ["launch"]):
        launch = launch_command_parser().parse_args(arguments[1:])
        assert launch.config_file is None or (ROOT / launch.config_file).is_file()
        module = ["-m"] if launch.module else []
        check(["python", *module, launch.training_script, *launch.training_script_args], monkeypatch)
    elif (program, arguments[:2]) == ("python", ["-m", "hf_tgpt"]):
        check(["hf-tgpt", *arguments[2:]], monkeypatch)
    elif program == "hf-tgpt" and (arguments[0] in ("convert", "convert-base", "demo", "export", "serve")
                                   or "--answers" in arguments):  # fmt: skip
        parse(arguments)
    elif program == "hf-tgpt" and arguments[0] == "describe":
        describe.parser().parse_args(arguments[1:])
    elif program == "hf-tgpt" and arguments[0].startswith("--"):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
    elif program == "hf-tgpt" and arguments[0] == "compare":
        comparison(arguments[1:], monkeypatch)
    elif program == "hf-tgpt":
        assert main(shortened(arguments) if arguments[0] == "train" else arguments) == 0
    else:
        assert program == "python"
        script(*arguments, monkeypatch=monkeypatch)


def script(name, *arguments, monkeypatch):
    """Runs a program of the examples; what it would start is checked instead."""
    started = []
    shorter = {"examples/train.py": shortened(arguments), "examples/benchmark_suggest.py": [*arguments, "--seeds", "1"]}

    def start(command, **_):
        started.append([str(word) for word in command])
        return subprocess.CompletedProcess(command, int("--case" in command), "", "left out")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", start)
        patch.setattr(sys, "argv", [name, *shorter.get(name, arguments)])
        patch.syspath_prepend(str((ROOT / name).parent))  # as Python does for a program
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / name), run_name="__main__")
    assert bool(started) == (name in ("examples/benchmark.py", "examples/benchmark_heads.py"))


def comparison(arguments, monkeypatch):
    """Checks the trainings that a comparison would run."""
    trainings = []

    def run(words, log):
        trainings.append(words)
        return "left out"

    with monkeypatch.context() as patch:
        patch.setattr(compare, "runner", lambda launcher: contextlib.nullcontext(SimpleNamespace(run=run)))
        patch.setattr(compare, "_check_data", lambda *about: None)
        assert compare.main(arguments) == 1
    for words in trainings:
        if words[words.index("--seed") + 1] == "0":
            parse_arguments(words[1:])
    assert trainings
