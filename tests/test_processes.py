"""Trainings in several processes: the same numbers as in one, and an end when one of them ends.

HF_TGPT_DEATHS=1 tries every way to die at every moment; by default each way is tried once.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import METHODS
from datasets import ClassLabel, Dataset, Features, Image, Value
from peft import get_peft_model, get_peft_model_state_dict
from PIL import Image as PILImage
from transformers import AutoTokenizer, CLIPModel

from hf_tgpt import parallel, training
from hf_tgpt.checkpoint import prepare_output_dir
from hf_tgpt.data import FewShotImages, ImageTransform
from hf_tgpt.evaluation import evaluate, evaluation_loader, predict
from hf_tgpt.training import TrainingConfig, train

WAYS = {
    "exception": "raise RuntimeError('this process gives up')",
    "exit": "os._exit(7)",
    "kill": "os.kill(os.getpid(), signal.SIGKILL)",
}
# Words that the tests' tokenizer knows.
COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
THINGS = ("circle", "star", "tree", "large house", "cat")
MOMENTS = ("start", "training", "evaluation", "saving")


# What the processes run ----------------------------------------------------------------------------------------------


def pictures(count, train=False):
    """Grey pictures of 29 classes, with captions of very different lengths, which are cut at 8 tokens."""
    names = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS][:29]
    rows = range(count)
    columns = {
        "image": [PILImage.new("RGB", (36, 36), (7 * i, 255 - 5 * i, 40)) for i in rows],
        "label": [(5 * i) % len(names) for i in rows],
        "caption": ["a photo of a cat" if i % 3 else "a" for i in rows],
    }
    features = Features({"image": Image(), "label": ClassLabel(names=names), "caption": Value("string")})
    transform = ImageTransform(32, (0.5,) * 3, (0.25,) * 3, train=train)
    return FewShotImages(Dataset.from_dict(columns, features=features), transform, seed=0)


def trained(folder, clip_folder, name, accelerator, parts):
    """Two epochs of three steps of 8 pictures and 4 that are left over -> history, metrics, logits and weights."""
    torch.manual_seed(0)
    images = pictures(28, train=True)
    names = images.dataset.features["label"].names
    clip = CLIPModel.from_pretrained(clip_folder)
    with torch.no_grad():  # words and pictures that a random CLIP tells apart, so that no two scores are almost equal
        clip.text_model.embeddings.token_embedding.weight.mul_(50)
        clip.vision_model.embeddings.patch_embedding.weight.mul_(20)
    model = get_peft_model(clip, METHODS[name].config(names, text_chunk_size=5))
    config = TrainingConfig(
        learning_rate=0.01, optimizer="sgd", batch_size=8, epochs=2, gradient_accumulation_steps=parts, max_grad_norm=5
    )
    validation = evaluation_loader(pictures(9), accelerator, batch_size=2)
    output_dir = prepare_output_dir(Path(folder) / name, {}, False, accelerator)
    history = train(
        model, images, config, accelerator, output_dir, AutoTokenizer.from_pretrained(clip_folder), validation
    )
    found = predict(model, validation, accelerator)
    metrics = evaluate(model, validation, accelerator)
    return {
        "history": history,
        "metrics": metrics,
        "predictions": {key: torch.from_numpy(value) for key, value in found.items()},
        "weights": get_peft_model_state_dict(model),
    }


def work(folder, clip_folder, parts=2):
    """All methods that differ in what processes do: TGP-T counts tokens, MaPLe shares its classes."""
    torch.set_num_threads(1)
    parallel.LEAST_SHARE = 4  # 29 classes are shared by up to 7 processes
    accelerator = Accelerator(cpu=True)
    outcomes = {name: trained(folder, clip_folder, name, accelerator, parts) for name in ("tgpt", "maple")}
    torch.save(outcomes, Path(folder) / f"{accelerator.process_index}.pt")


def die(folder, clip_folder, moment, way):
    """A training whose second process ends in some way at some moment."""
    second = os.environ["RANK"] == "1"

    def end(*args, **kwargs):
        exec(f"import os, signal\n{WAYS[way]}")

    if second and moment == "start":
        end()
    accelerator = Accelerator(cpu=True)
    if second:
        where = {"training": "of_the_whole_batch", "evaluation": "evaluate", "saving": "save_checkpoint"}
        setattr(training, where[moment], end)
    trained(folder, clip_folder, "maple", accelerator, 1)


# Starting them -------------------------------------------------------------------------------------------------------


def launch(call, tmp_path, processes, *options, timeout=300):
    """Runs a call of this module by accelerate launch."""
    script = tmp_path / "worker.py"
    script.write_text(f"import test_processes\ntest_processes.{call}\n")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",  # with --cpu in its place, accelerate starts a single process
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    options = options or ("--num_machines", "1", "--main_process_port", "0")
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", *options, str(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def close(a, b):
    """Whether two outcomes are the same to 1e-5."""
    for x, y in zip(a["history"], b["history"], strict=True):
        assert x == pytest.approx(y, abs=1e-5)
    for name, value in a["metrics"].items():
        if isinstance(value, list):  # of the classes, None for those without a picture
            assert value == b["metrics"][name]
        else:
            assert value == pytest.approx(b["metrics"][name], abs=1e-5)
    for kind in ("predictions", "weights"):
        for name, value in a[kind].items():
            torch.testing.assert_close(b[kind][name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def alone(clip_folders, tmp_path_factory):
    """What one process makes of it, a step at once."""
    folder = tmp_path_factory.mktemp("alone")
    accelerator = Accelerator(cpu=True)
    return {name: trained(folder, clip_folders["plain"], name, accelerator, 1) for name in ("tgpt", "maple")}


def test_parts_of_a_batch_train_like_the_whole(clip_folders, tmp_path, alone):
    for name, outcome in alone.items():
        close(trained(tmp_path, clip_folders["plain"], name, Accelerator(cpu=True), 4), outcome)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_and_evaluate_like_one(clip_folders, tmp_path, alone, processes):
    done = launch(f"work({str(tmp_path)!r}, {clip_folders['plain']!r})", tmp_path, processes)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(processes):
        outcomes = torch.load(tmp_path / f"{rank}.pt")
        for name, outcome in alone.items():
            assert len(outcomes[name]["predictions"]["labels"]) == 9
            close(outcomes[name], outcome)


DEATHS = [(moment, way) for moment in MOMENTS for way in WAYS]
TRIED = (
    DEATHS
    if os.environ.get("HF_TGPT_DEATHS")
    else [("start", "exception"), ("training", "exit"), ("evaluation", "kill")]
)


@pytest.mark.parametrize(("moment", "way"), TRIED)
def test_a_process_that_ends_ends_the_others_within_a_minute(clip_folders, tmp_path, moment, way):
    began = time.monotonic()
    done = launch(f"die({str(tmp_path)!r}, {clip_folders['plain']!r}, {moment!r}, {way!r})", tmp_path, 2, timeout=120)
    assert time.monotonic() - began < 60
    assert done.returncode != 0
    assert {"exception": "this process gives up", "exit": "exitcode  : 7", "kill": "Signal 9 (SIGKILL)"}[
        way
    ] in done.stderr
    assert "rank      : 1" in done.stderr.partition("Root Cause")[2]
