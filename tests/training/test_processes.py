"""Trainings in several processes: the same numbers as in one, and an end when one of them ends.

HF_TGPT_DEATHS=1 tries every way to die at every moment, by default two. HF_TGPT_NETNS=1 also tries two hosts, which are
network namespaces of this one and need root.
"""

import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import HEADS, METHODS, TESTS
from datasets import ClassLabel, Dataset, Features, Image, Value
from peft import get_peft_model, get_peft_model_state_dict
from PIL import Image as PILImage
from transformers import AutoTokenizer, CLIPModel

from hf_tgpt.data import FewShotImages, ImageTransform
from hf_tgpt.encoders import shares
from hf_tgpt.evaluation.accuracy import evaluate, evaluation_loader, predict
from hf_tgpt.training import loop
from hf_tgpt.training.config import TrainingConfig
from hf_tgpt.training.loop import train
from hf_tgpt.training.run_folder import prepare_output_dir

WAYS = {
    "exception": "raise RuntimeError('this process gives up')",
    "exit": "os._exit(7)",
    "kill": "os.kill(os.getpid(), signal.SIGKILL)",
}
DEATHS = [(moment, way) for moment in ("start", "training", "evaluation", "saving") for way in WAYS]
DEATHS_TRIED = [("start", "exception"), ("training", "kill")]
# Words that the tests' tokenizer knows.
COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
THINGS = ("circle", "star", "tree", "large house", "cat")


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
    head = name in HEADS
    images = pictures(58 if head else 28, train=True)  # a head needs a picture of every class
    names = images.dataset.features["label"].names
    clip = CLIPModel.from_pretrained(clip_folder)
    with torch.no_grad():  # words and pictures that a random CLIP tells apart, so that no two scores are almost equal
        clip.text_model.embeddings.token_embedding.weight.mul_(50)
        clip.vision_model.embeddings.patch_embedding.weight.mul_(20)
    model = get_peft_model(clip, METHODS[name].config(names, **({} if head else {"text_chunk_size": 5})))
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
    """All methods that differ in what processes do: TGP-T counts tokens, MaPLe shares its classes, GDA is fitted."""
    torch.set_num_threads(1)
    shares.LEAST_SHARE = 4  # 29 classes are shared by up to 7 processes
    shared, all_gather = [], shares.all_gather
    shares.all_gather = lambda rows, *args: shared.append(len(rows)) or all_gather(rows, *args)
    accelerator = Accelerator(cpu=True)
    outcomes = {name: trained(folder, clip_folder, name, accelerator, parts) for name in ("tgpt", "maple", "gda")}
    outcomes["shares"] = set(shared)
    torch.save(outcomes, Path(folder) / f"{accelerator.process_index}.pt")


def die(folder, clip_folder, moment, way):
    """A training whose second process ends in some way at some moment."""
    second = os.environ["RANK"] == "1"

    def end(*args, **kwargs):
        Path(folder, "died").touch()
        exec(f"import os, signal\n{WAYS[way]}")

    if second and moment == "start":
        end()
    accelerator = Accelerator(cpu=True)
    if second:
        where = {"training": "of_the_whole_batch", "evaluation": "evaluate", "saving": "save_checkpoint"}
        setattr(loop, where[moment], end)
    trained(folder, clip_folder, "maple", accelerator, 1)


# Starting them -------------------------------------------------------------------------------------------------------


def start(call, tmp_path, processes, *options, prefix=()):
    """Starts a call of this module by accelerate launch."""
    script = tmp_path / "worker.py"
    script.write_text(f"import test_processes\ntest_processes.{call}\n")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",  # with --cpu in its place, accelerate starts a single process
    }
    command = [*prefix, sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no", *options]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, str(script)], env=environment, **pipes)


def launch(call, tmp_path, processes):
    """The same on this machine, to its end -> exit code and what it said on stderr."""
    process = start(call, tmp_path, processes, "--num_machines", "1", "--main_process_port", "0")
    errors = process.communicate(timeout=300)[1]
    return process.returncode, errors


def close(a, b):
    """Whether two outcomes are the same to 1e-5."""
    for x, y in zip(a["history"], b["history"], strict=True):
        assert x == pytest.approx(y, abs=1e-5, rel=1e-5)
    for name, value in a["metrics"].items():
        if isinstance(value, list):  # of the classes, None for those without a picture
            assert value == b["metrics"][name]
        else:
            assert value == pytest.approx(b["metrics"][name], abs=1e-5, rel=1e-5)
    for kind in ("predictions", "weights"):
        for name, value in a[kind].items():
            torch.testing.assert_close(b[kind][name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def alone(clip_folders, tmp_path_factory):
    """What one process makes of it, a step at once."""
    folder = tmp_path_factory.mktemp("alone")
    accelerator = Accelerator(cpu=True)
    return {name: trained(folder, clip_folders["plain"], name, accelerator, 1) for name in ("tgpt", "maple", "gda")}


def test_parts_of_a_batch_train_like_the_whole(clip_folders, tmp_path, alone):
    for name, outcome in alone.items():
        close(trained(tmp_path, clip_folders["plain"], name, Accelerator(cpu=True), 4), outcome)


def check_all(tmp_path, processes, alone):
    """What each process of `work` has left is what one process makes of it."""
    for rank in range(processes):
        outcomes = torch.load(tmp_path / f"{rank}.pt")
        assert outcomes["shares"] == {math.ceil(29 / processes)}
        for name, outcome in alone.items():
            assert len(outcomes[name]["predictions"]["labels"]) == 9
            close(outcomes[name], outcome)


def test_processes_train_and_evaluate_like_one(clip_folders, tmp_path, alone):
    code, errors = launch(f"work({str(tmp_path)!r}, {clip_folders['plain']!r})", tmp_path, 4)
    assert code == 0, errors[-3000:]
    check_all(tmp_path, 4, alone)


@pytest.mark.parametrize(("moment", "way"), DEATHS if "HF_TGPT_DEATHS" in os.environ else DEATHS_TRIED)
def test_a_process_that_ends_ends_the_others_within_a_minute(clip_folders, tmp_path, moment, way):
    call = f"die({str(tmp_path)!r}, {clip_folders['plain']!r}, {moment!r}, {way!r})"
    code, errors = launch(call, tmp_path, 2)
    took = time.time() - (tmp_path / "died").stat().st_mtime
    print(f"{moment}, {way}: {took:.1f} s")
    assert took < 60
    assert code != 0
    shown = {"exception": "this process gives up", "exit": "exitcode  : 7", "kill": "Signal 9 (SIGKILL)"}
    assert shown[way] in errors
    assert "rank      : 1 " in errors.partition("Root Cause")[2]


@pytest.fixture
def hosts():
    """Two network namespaces, of addresses 10.77.0.1 and 10.77.0.2, that see each other alone."""
    if "HF_TGPT_NETNS" not in os.environ:
        pytest.skip("HF_TGPT_NETNS is not set")
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    names = ["hf-tgpt-1", "hf-tgpt-2"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for i, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{i}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def test_two_hosts_train_like_one_process(clip_folders, tmp_path, alone, hosts, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")  # the machine's name stands for none of the addresses
    call = f"work({str(tmp_path)!r}, {clip_folders['plain']!r})"
    main = ("--num_machines", "2", "--main_process_ip", "10.77.0.1", "--main_process_port", "29500")
    processes = [
        start(call, tmp_path, 4, *main, "--machine_rank", str(i), prefix=("ip", "netns", "exec", name))
        for i, name in enumerate(hosts)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    check_all(tmp_path, 4, alone)
