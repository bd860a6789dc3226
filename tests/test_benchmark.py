"""examples/benchmark.py: its references are the same methods, and whatever a case does, there is a row of it."""

import importlib
import json
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import CLASS_NAMES, METHODS, READERS, ROOT, pixels, shake, token_ids
from PIL import Image
from transformers.models.clip.modeling_clip import CLIPMLP

from hf_tgpt import TOY_CLIP, LoRAConfig, TwoStageConfig
from hf_tgpt.encoders import walk

LABELS = torch.tensor([0, 3, 1])


@pytest.fixture
def example(monkeypatch):
    """example("benchmark") -> the module examples/benchmark.py."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield importlib.import_module
    for module in ("benchmark", "benchmark_table", "plain_methods"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize("shape", ["plain", "narrow_projection"])
@pytest.mark.parametrize("name", READERS)
def test_the_reference_has_our_logits_losses_and_gradients(name, shape, adapt, example):
    # Half of the classes are relevant to an image, and chunks of two classes are computed again in the backward pass.
    model = adapt(METHODS[name], shape, text_chunk_size=2).train()
    inputs = {"pixel_values": pixels(model), "labels": LABELS}
    if name == "tgpt":
        inputs["caption_ids"] = token_ids(model, ["a photo of a cat.", "the forest at night", "red"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours = model(**inputs)
    gradients = torch.autograd.grad(ours.loss, trained)
    reference = example("plain_methods").PLAIN[name](model.get_base_model(), model.learner, **inputs)
    torch.testing.assert_close(reference["logits"], ours.logits, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(reference["loss"], ours.loss, atol=5e-5, rtol=1e-5)
    for expected, gradient in zip(torch.autograd.grad(reference["loss"], trained), gradients, strict=True):
        torch.testing.assert_close(gradient, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "config", [LoRAConfig(class_names=CLASS_NAMES, lora_dropout=0.0), TwoStageConfig(class_names=CLASS_NAMES)]
)
def test_the_reference_of_pefts_adapters_has_our_logits_loss_and_gradients(config, load_clip, example):
    torch.manual_seed(0)
    model = config.build(load_clip("plain")).train()
    shake(model)
    inputs = {"pixel_values": pixels(model.get_base_model()), "labels": LABELS}
    trained = [weight for name, weight in model.named_parameters() if weight.requires_grad and name != "learner.head"]
    outputs = (
        model(**inputs),
        example("plain_methods").PLAIN[config.kind](model.get_base_model(), model.learner, **inputs),
    )
    ours, reference = ({"logits": output["logits"], "loss": output["loss"]} for output in outputs)
    torch.testing.assert_close(reference, ours, atol=5e-5, rtol=1e-5)
    gradients = (torch.autograd.grad(output["loss"], trained) for output in outputs)
    torch.testing.assert_close(*gradients, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", READERS)
def test_the_floor_reads_every_sentence_once(name, adapt, example, monkeypatch):
    model, reference = adapt(METHODS[name]), example("plain_methods")
    read, seen = reference.read, []
    monkeypatch.setattr(reference, "read", lambda clip, words, *args: seen.append(words) or read(clip, words, *args))
    reference.floor(model.get_base_model(), model.learner, name, True, pixels(model), chunk=3)
    count = {"tgpt": 6, "cocoop": 12, "mutual_prompt": 12}.get(name, 4)
    assert sum(len(words) for words in seen) == count
    assert all(words.grad is not None for words in seen)
    assert all(words.shape[1] < 30 for words in seen)  # the context


def test_a_benchmark_leaves_rows_a_table_and_a_picture(example, clip_folders, tmp_path, monkeypatch, capsys):
    benchmark = example("benchmark")

    def run(case, time_limit):  # in this process, to be fast
        case.pop("memory_limit")
        return benchmark.measure(**case)

    monkeypatch.setattr(benchmark, "run", run)
    cases = ["--methods", "coop", "--classes", "3", "5", "--batch", "2", "--steps", "1", "--cached"]
    file = tmp_path / "new" / "rows.json"
    benchmark.main([*cases, "--model", clip_folders["plain"], "--json", str(file)])
    rows = json.loads(file.read_text())
    paths = ["ours", "reference", "floor", "ours, cached features"]
    expected = [("coop", path, classes) for path in paths for classes in (3, 5)]
    assert [(row["method"], row["path"], row["classes"]) for row in rows] == expected
    for row in rows:
        assert row["status"] == "ok"
        assert row["batch"] == 2
        assert row["seconds_per_step"] > 0
        assert row["images_per_second"] == pytest.approx(2 / row["seconds_per_step"])
        assert row["peak_bytes_above_model"] >= 0  # torch may serve so small a step from what it has
        assert row["ratio_to_floor"] > 0
        assert (row["ratio_to_reference"] == 1) == (row["path"] == "reference")
    text = file.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("| coop | 3 | 2 |") == 4
    assert file.with_suffix(".png").stat().st_size > 5_000


@pytest.mark.parametrize("name", ["maple", "cocoop"])
def test_the_plain_way_of_any_family_is_measured_beside_ours(name, example, monkeypatch, tmp_path):
    """With the same answers, of models that the command makes."""
    benchmark, losses = example("benchmark"), {}

    def run(case, time_limit):
        case.pop("memory_limit")
        torch.manual_seed(0)
        return benchmark.measure(**case)

    original = torch.nn.functional.cross_entropy

    def noted(*args, **kwargs):
        loss = original(*args, **kwargs)
        losses.setdefault(len(losses), loss.item())
        return loss

    monkeypatch.setattr(benchmark, "run", run)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", noted)
    families = ["clip", "metaclip_2", "siglip", "chinese_clip"]
    cases = ["--methods", name, "--classes", "3", "--batch", "1", "--steps", "1", "--json", str(tmp_path / "rows.json")]
    benchmark.main(["--families", *families, *cases])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["model"].rpartition("/")[2], row["path"]) for row in rows] == [
        (family, path) for family in families for path in ("ours", "padded")
    ]
    assert all(row["status"] == "ok" for row in rows)
    assert all((row["ratio_to_reference"] == 1) == (row["path"] == "padded") for row in rows)
    assert "| siglip | maple | 3 | 1 | padded |".replace("maple", name) in (tmp_path / "rows.md").read_text()
    ours, padded = (list(losses.values())[start::4] for start in (0, 2))  # of the first step; there are two
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(padded), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["tgpt", "maple", "cocoop"])
def test_inference_is_measured_on_all_paths(name, example, clip_folders):
    case = dict(model=clip_folders["legacy_eos"], classes=3, batch=2, mode="infer", steps=1, mixed_precision="bf16")
    for path in ("ours", "reference", "floor"):  # the shape with a context of 77, for TGP-T's long prompts
        assert example("benchmark").measure(method=name, path=path, **case)["status"] == "ok"


@pytest.mark.parametrize("name", ["maple", "cocoop"])
def test_what_each_idea_brings_can_be_measured(name, example, clip_folders, monkeypatch):
    benchmark, forward, calls = example("benchmark"), CLIPMLP.forward, []

    def counted(self, hidden):
        if hidden.shape[-1] == 32:  # the text tower
            calls.append(hidden.shape[:2])
        return forward(self, hidden)

    monkeypatch.setattr(CLIPMLP, "forward", counted)
    monkeypatch.setattr(walk, "CHUNK_TOKENS", 20)
    case = dict(model=clip_folders["plain"], method=name, classes=12, batch=2, mode="train", steps=1)
    places, at_once = {}, {}
    for path in ("reference", "truncated", "packed", "ours", "checkpointing"):
        calls.clear()
        assert benchmark.measure(path=path, mixed_precision="no", **case)["status"] == "ok"
        places[path], at_once[path] = (f(rows * length for rows, length in calls) for f in (sum, max))
    assert places["reference"] > places["truncated"] > places["packed"]
    assert min(places["ours"], places["checkpointing"]) > places["packed"]  # some or all are computed twice
    assert at_once["ours"] < at_once["packed"]


def test_methods_with_visual_prompts_have_no_cached_case(example, clip_folders):
    case = dict(model=clip_folders["plain"], classes=3, batch=2, mode="train", steps=1, mixed_precision="no")
    result = example("benchmark").measure(method="maple", path="ours, cached features", **case)
    assert result == {"status": "no cache"}


def test_a_case_that_fails_is_a_row_and_larger_ones_are_not_tried(example, monkeypatch, tmp_path):
    benchmark = example("benchmark")
    answer = {
        "status": "ok",
        "seconds_per_step": 1.0,
        "images_per_second": 8,
        "peak_bytes_above_model": 9,
        "peak_bytes": 10,
    }
    answers = {"ours": answer}
    tried = []

    def run(case, time_limit):
        tried.append((case["path"], case["classes"]))
        return answers.get(case["path"], {"status": "out of memory"})

    monkeypatch.setattr(benchmark, "run", run)
    benchmark.main(["--methods", "maple", "--classes", "10", "20", "30", "--json", str(tmp_path / "rows.json")])
    assert tried == [("ours", 10), ("ours", 20), ("ours", 30), ("reference", 10), ("floor", 10)]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 9
    assert rows[5]["status"] == "not tried: out of memory with 10 classes"
    assert rows[0]["ratio_to_reference"] is None


def test_a_case_beyond_its_memory_or_time_says_so(example):
    benchmark = example("benchmark")
    case = dict(model=str(TOY_CLIP), method="maple", classes=9_000, batch=1, path="reference", mode="train")
    case |= dict(steps=1, mixed_precision="no", memory_limit=0.5)
    assert benchmark.run(case, time_limit=200) == {"status": "out of memory"}
    assert benchmark.run(case, time_limit=0.2) == {"status": "out of time"}
    small = benchmark.run(case | {"classes": 3}, time_limit=200)
    assert small["status"] == "ok"
    assert 0 < small["peak_bytes_above_model"] < 100e6


@pytest.mark.parametrize(
    ("code", "stderr", "status"),
    [
        (-9, "", "out of memory"),
        (1, "Traceback\ntorch.OutOfMemoryError: CUDA out of memory.", "out of memory"),
        (1, "Traceback\nRuntimeError: DefaultCPUAllocator: can't allocate memory", "out of memory"),
        (1, "Traceback\nValueError: `model`=3 is no folder", "failed: ValueError: `model`=3 is no folder"),
        (-11, "", "failed: exit code -11"),
    ],
)
def test_a_case_that_ends_early_says_why(code, stderr, status, example, monkeypatch):
    done = subprocess.CompletedProcess([], code, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    assert example("benchmark").run({}, time_limit=1) == {"status": status}


def test_peak_memory_is_what_a_step_holds(example):
    benchmark, device = example("benchmark"), torch.device("cpu")
    torch.zeros(50_000_000)  # 200 MB before the start do not count
    before = benchmark.start_of_memory(device)
    torch.zeros(25_000_000)  # 100 MB
    assert benchmark.peak_of_memory(device) - before == pytest.approx(100e6, rel=0.1)


def test_class_names_are_accepted_by_the_thousand(example):
    names = example("benchmark").class_names(10_000)
    assert len(set(names)) == 10_000


def test_prediction_from_files_is_measured_beside_the_tower(monkeypatch, capsys, tmp_path):
    Image.new("RGB", (800, 600), "red").save(tmp_path / "large.jpg")
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "small.jpg")
    program = ROOT / "examples" / "benchmark_predict.py"
    arguments = [str(tmp_path), "--model", str(TOY_CLIP), "--count", "4", "--rounds", "2", "--drafts"]
    monkeypatch.setattr(sys, "argv", [program.name, *arguments])
    runpy.run_path(str(program), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    speed, drafts = lines[2].strip("| ").split(" | "), [line.strip("| ").split(" | ") for line in lines[-3:]]
    assert all(float(cell) > 0 for cell in speed)
    assert [cells[1] for cells in drafts] == ["1", "1", "1"]  # the small one is decoded in full
    assert all(cells[-1] == "1.000" for cells in drafts)


def test_loading_is_measured_with_and_without_workers(monkeypatch, capsys):
    program = ROOT / "examples" / "benchmark_loading.py"
    monkeypatch.setattr(sys, "argv", [program.name, "--batch", "64", "--workers", "0", "1"])
    runpy.run_path(str(program), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1:3] for line in lines[2:]] == [["0", "256"], ["1", "256"]]
