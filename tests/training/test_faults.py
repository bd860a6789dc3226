"""Runs that are killed, stopped, starved of disk or fed with numbers that are not finite: nothing is lost.

HF_TGPT_KILLS sets how often the run of the kill test is killed; once by default.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import METHODS, TESTS
from peft import get_peft_model, get_peft_model_state_dict
from test_training import COLOURS, images
from transformers import AutoTokenizer, CLIPModel

from hf_tgpt.evaluation.accuracy import evaluation_loader
from hf_tgpt.training import checkpoint
from hf_tgpt.training.checkpoint import find_checkpoint
from hf_tgpt.training.config import TrainingConfig
from hf_tgpt.training.loop import all_finite, train
from hf_tgpt.training.run_folder import prepare_output_dir
from hf_tgpt.utils.files import write_json

KILLS = int(os.environ.get("HF_TGPT_KILLS", "1"))


def train_in(folder, clip_folder, resume=False, method="tgpt", **fields):
    """A run on coloured squares, from its folder to the weights it ends with."""
    accelerator = Accelerator(cpu=True)
    folder = prepare_output_dir(Path(folder), fields, resume, accelerator)
    torch.manual_seed(0)
    clip = CLIPModel.from_pretrained(clip_folder)
    model = get_peft_model(clip, METHODS[method].config(class_names=list(COLOURS)))
    config = TrainingConfig(**(dict(learning_rate=0.01, batch_size=6, epochs=4) | fields))
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    validation = evaluation_loader(images(2), accelerator)
    history = train(model, images(train=True), config, accelerator, folder, tokenizer, validation, resume)
    return get_peft_model_state_dict(model), history


def start(folder, clip_folder, **options):
    """The same in a process of its own, which leaves its weights in weights.pt."""
    code = (
        f"import os, torch, test_faults\nprint('ready', flush=True)\n"
        f"weights, history = test_faults.train_in({str(folder)!r}, {clip_folder!r}, **{options!r})\n"
        f"torch.save(weights, {str(folder / 'weights')!r})\n"
        f"os.replace({str(folder / 'weights')!r}, {str(folder / 'weights.pt')!r})\nprint('done', flush=True)\n"
    )
    path = os.pathsep.join([str(TESTS), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)


def readable(folder):
    """Every file with a final name is whole."""
    for file in folder.rglob("*.json"):
        json.loads(file.read_text())
    for file in folder.rglob("*.safetensors"):
        with open(file, "rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            last = max(value["data_offsets"][1] for value in json.loads(stream.read(header)).values())
        assert file.stat().st_size == 8 + header + last


def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_adapter(clip_folders, tmp_path, capsys):
    began = time.perf_counter()
    expected, _ = train_in(tmp_path / "whole", clip_folders["plain"])
    span = time.perf_counter() - began
    chance = random.Random(KILLS)
    folder, kills, ends = tmp_path / "run", 0, Counter()
    while kills < KILLS:
        process = start(folder, clip_folders["plain"], resume=(folder / "run.json").exists())
        assert process.stdout.readline() == "ready\n"
        before = find_checkpoint(folder)
        time.sleep(chance.uniform(0, span))
        process.kill()
        _, errors = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), errors
        readable(folder)
        if (folder / "weights.pt").exists():  # it was quicker: another run from the start
            kept = torch.load(folder / "weights.pt", weights_only=True)
            assert all(torch.equal(value, kept[name]) for name, value in expected.items())
            ends["finished"] += 1
            folder = tmp_path / f"run-{ends.total()}"
            continue
        kills += 1
        writing = any(folder.rglob("*.tmp"))
        ends["writing" if writing else "later" if find_checkpoint(folder) != before else "within an epoch"] += 1
    resumed, _ = train_in(folder, clip_folders["plain"], resume=(folder / "run.json").exists())
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
    with capsys.disabled():
        print(f"\n{kills} kills in runs of {span:.1f} s: {dict(ends)}")


def test_a_seed_decides_the_adapter(clip_folders, tmp_path):
    first, again, other = (
        train_in(tmp_path / name, clip_folders["plain"], epochs=1, seed=seed)[0]
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


# Within an epoch of 4 steps, and at its end.
@pytest.mark.parametrize(("number", "code", "step"), [(signal.SIGTERM, 143, 6), (signal.SIGINT, 130, 8)])
def test_a_run_that_is_asked_to_stop_saves_itself_and_resumes_exactly(
    clip_folders, tmp_path, monkeypatch, capsys, number, code, step
):
    expected, history = train_in(tmp_path / "whole", clip_folders["plain"])
    taken, original = [], torch.optim.lr_scheduler.LambdaLR.step

    def count(self, *args):
        taken.append(1)
        if len(taken) == step + 1:  # the first call is that of the constructor
            os.kill(os.getpid(), number)
        return original(self, *args)

    monkeypatch.setattr(torch.optim.lr_scheduler.LambdaLR, "step", count)
    with pytest.raises(SystemExit) as stopped:
        train_in(tmp_path / "run", clip_folders["plain"], save_every=0)
    assert stopped.value.code == code
    assert f"at step {step} of 16, which is saved" in capsys.readouterr().out
    assert find_checkpoint(tmp_path / "run").name == f"checkpoint-{step}"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the handlers are gone
    resumed, resumed_history = train_in(tmp_path / "run", clip_folders["plain"], True, save_every=0)
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
    assert [row["step"] for row in resumed_history] == [4, 8, 12, 16]
    for a, b in zip(resumed_history, history, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_a_disk_that_is_full_ends_the_run_with_its_last_checkpoint(clip_folders, tmp_path):
    """A limit on the size of files, which the optimizer's state exceeds, stands in for the full disk."""
    train_in(tmp_path / "run", clip_folders["plain"], epochs=2)
    last = find_checkpoint(tmp_path / "run")
    write_json(tmp_path / "run" / "run.json", {"epochs": 4})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="could not be written") as full:
            train_in(tmp_path / "run", clip_folders["plain"], resume=True, epochs=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    remedy = f"{last.name} is whole. Make room or correct the folder's permissions, and continue with --resume."
    assert remedy in str(full.value)
    readable(tmp_path / "run")
    assert find_checkpoint(tmp_path / "run") == last


@pytest.fixture
def disk(tmp_path):
    """disk(bytes) -> a file system of this size, or the same in a new size; for those who may make one."""
    place = tmp_path / "disk"

    def resize(size):
        options = f"size={size}" if place.exists() is False else f"remount,size={size}"
        place.mkdir(exist_ok=True)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True).returncode:
            pytest.skip("only root may mount a file system")
        return place

    yield resize
    subprocess.run(["umount", "-l", place], capture_output=True)  # lazily: a folder is locked until the process ends


@pytest.mark.skipif(shutil.which("mount") is None, reason="file systems of a size are made by mount")
@pytest.mark.parametrize("checkpoints", [1.5, 2.9])
def test_a_file_system_that_runs_full_loses_nothing_that_was_saved(checkpoints, disk, clip_folders, tmp_path):
    expected, _ = train_in(tmp_path / "whole", clip_folders["plain"])
    size = sum(file.stat().st_size for file in find_checkpoint(tmp_path / "whole").iterdir())
    folder = disk(int(checkpoints * size)) / "run"
    with pytest.raises(OSError, match=r"could not be written .*Make room"):
        train_in(folder, clip_folders["plain"], keep_checkpoints=9)
    readable(folder)
    assert find_checkpoint(folder).name == f"checkpoint-{4 * int(checkpoints)}"
    disk(64 * size)
    resumed, _ = train_in(folder, clip_folders["plain"], True, keep_checkpoints=9)
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def test_rights_that_are_lost_on_the_way_lose_nothing_that_was_saved(clip_folders, tmp_path, monkeypatch):
    expected, _ = train_in(tmp_path / "whole", clip_folders["plain"])
    original = checkpoint.put_in_place

    def refuse(temporary, path):
        if path.name == "checkpoint-12":
            raise PermissionError(13, "Permission denied", str(path))
        original(temporary, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "put_in_place", refuse)
        with pytest.raises(
            OSError, match=r"Permission denied.*checkpoint-8 is whole\. Make room or correct the folder's permissions"
        ):
            train_in(tmp_path / "run", clip_folders["plain"])
    readable(tmp_path / "run")
    resumed, _ = train_in(tmp_path / "run", clip_folders["plain"], True)
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def test_two_runs_cannot_write_to_one_folder(clip_folders, tmp_path):
    process = start(tmp_path / "run", clip_folders["plain"], epochs=500)
    while not (tmp_path / "run" / "run.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(ValueError, match="is being written to by another run; choose another folder"):
        train_in(tmp_path / "run", clip_folders["plain"], True, epochs=500)
    process.kill()
    process.communicate()


def test_the_newest_checkpoints_stay(clip_folders, tmp_path):
    train_in(tmp_path / "run", clip_folders["plain"], keep_checkpoints=2)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint*")) == ["checkpoint-12", "checkpoint-16"]
    (tmp_path / "run" / "checkpoint-mine").mkdir()  # by the name that somebody gave a copy
    assert find_checkpoint(tmp_path / "run").name == "checkpoint-16"


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_by_choice(clip_folders, tmp_path, monkeypatch, capsys, what):
    calls, original = [], torch.nn.functional.cross_entropy

    def sometimes(*args, **kwargs):
        calls.append(1)
        loss = original(*args, **kwargs)
        if len(calls) == 2:  # of the second step
            return loss * float("nan") if what == "loss" else _NanGradient.apply(loss)
        return loss

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", sometimes)
    weights, history = train_in(tmp_path / "run", clip_folders["plain"], non_finite="skip", epochs=1)
    assert "not finite at step 1 (learning rate" in capsys.readouterr().out
    assert history[-1]["step"] == 4
    assert all(torch.isfinite(value).all() for value in weights.values())
    calls.clear()
    with pytest.raises(FloatingPointError, match="not finite at step"):
        train_in(tmp_path / "other", clip_folders["plain"], epochs=1)


def test_what_one_process_cannot_step_with_no_process_does():
    model, optimizer = torch.nn.Linear(1, 1), SimpleNamespace(scaler=None)
    model(torch.ones(1, 1)).sum().backward()
    assert all_finite(True, model, optimizer, SimpleNamespace(num_processes=1))
    other = torch.tensor([False])
    both = SimpleNamespace(num_processes=2, device="cpu", gather=lambda mine: torch.cat([mine, other]))
    assert not all_finite(True, model, optimizer, both)


def test_skipping_for_a_whole_epoch_ends_the_run(clip_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda scores, *a, **k: scores.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match="not finite at step 3"):
        train_in(tmp_path / "run", clip_folders["plain"], non_finite="skip")
    assert not find_checkpoint(tmp_path / "run")


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")
