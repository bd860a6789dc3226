"""examples/benchmark.py: its references are the same methods, and whatever a case does, there is a row of it."""

import importlib
import json
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import CLASS_NAMES, METHODS, READERS, ROOT, SHAPES, pixels, shake, token_ids
from PIL import Image
from plain_methods import PLAIN
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.clip.modeling_clip import CLIPMLP

from hf_tgpt import TOY_CLIP, LoRAConfig, TwoStageConfig
from hf_tgpt.adapters import open_learner
from hf_tgpt.encoders import walk
from hf_tgpt.encoders.packing import pack

LABELS = torch.tensor([0, 3, 1])


@pytest.fixture
def example(monkeypatch):
    """example("benchmark") -> the module examples/benchmark.py."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield importlib.import_module
    for module in ("benchmark", "benchmark_case", "benchmark_floor", "benchmark_table"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize("shape", ["plain", "narrow_projection"])
@pytest.mark.parametrize("name", READERS)
def test_the_reference_has_our_logits_losses_and_gradients(name, shape, adapt):
    # Half of the classes are relevant to an image, and chunks of two classes are computed again in the backward pass.
    model = adapt(METHODS[name], shape, text_chunk_size=2).train()
    inputs = {"pixel_values": pixels(model), "labels": LABELS}
    if name == "tgpt":
        inputs["caption_ids"] = token_ids(model, ["a photo of a cat.", "the forest at night", "red"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours = model(**inputs)
    gradients = torch.autograd.grad(ours.loss, trained)
    reference = PLAIN[name](model.get_base_model(), model.learner, **inputs)
    torch.testing.assert_close(reference["logits"], ours.logits, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(reference["loss"], ours.loss, atol=5e-5, rtol=1e-5)
    for expected, gradient in zip(torch.autograd.grad(reference["loss"], trained), gradients, strict=True):
        torch.testing.assert_close(gradient, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "config", [LoRAConfig(class_names=CLASS_NAMES, lora_dropout=0.0), TwoStageConfig(class_names=CLASS_NAMES)]
)
def test_the_reference_of_pefts_adapters_has_our_logits_loss_and_gradients(config, load_clip):
    torch.manual_seed(0)
    model = config.build(load_clip("plain")).train()
    shake(model)
    inputs = {"pixel_values": pixels(model.get_base_model()), "labels": LABELS}
    trained = [weight for name, weight in model.named_parameters() if weight.requires_grad and name != "learner.head"]
    outputs = model(**inputs), PLAIN[config.kind](model.get_base_model(), model.learner, **inputs)
    ours, reference = ({"logits": output["logits"], "loss": output["loss"]} for output in outputs)
    torch.testing.assert_close(reference, ours, atol=5e-5, rtol=1e-5)
    gradients = (torch.autograd.grad(output["loss"], trained) for output in outputs)
    torch.testing.assert_close(*gradients, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*READERS, "linear_probe", "lora", "two_stage"])
def test_the_floor_counts_every_product_of_a_step(name, adapt, load_clip, example):
    """As many as torch's own counter, which knows no fused attention on a CPU."""
    forward = one_step(name, adapt, load_clip)
    with sdpa_kernel(SDPBackend.MATH):
        products = example("benchmark_floor").record(forward)
        with FlopCounterMode(display=False) as counter:
            forward().backward()
    assert 2 * multiply_adds(products.needed) == counter.get_total_flops()
    assert not products.again


def one_step(name, adapt, load_clip, **fields):
    """A function that gives a method's loss, on a tiny CLIP."""
    if name in METHODS:
        model = adapt(METHODS[name], **fields).train()
    else:
        config = {"lora": LoRAConfig, "two_stage": TwoStageConfig}[name]
        model = config(class_names=CLASS_NAMES).build(load_clip("plain")).train()
    inputs = {"pixel_values": pixels(model.get_base_model()), "labels": LABELS}
    if name == "tgpt":
        inputs["caption_ids"] = token_ids(model, ["a photo of a cat.", "the forest at night", "red"])
    model(**inputs)  # keeps what is computed only once
    return lambda: model(**inputs).loss


def multiply_adds(products):
    return sum(often * each.multiply_adds for each, often in products.items())


def tower(places, width, layers, rows, length, backward):
    """The multiply-adds of a tower's layers: attention's four matrices, an MLP of twice the width, its two products."""
    forward = layers * (places * width * width * (4 + 2 + 2) + rows * 2 * length * length * width)
    attention_backward = layers * rows * 4 * length * length * width
    linear_backward = layers * places * width * width * (4 + 2 + 2)  # of the activations alone
    return forward + (linear_backward + attention_backward if backward else 0)


@pytest.mark.parametrize("name", ["coop", "ivlp"])
def test_a_step_of_ours_has_no_product_that_it_could_do_without(name, adapt, load_clip, example):
    """The images forward, and the packed sentences forward and backward; no gradient of a frozen weight."""
    sizes = {"text": SHAPES["plain"]["text"], "vision": SHAPES["plain"]["vision"]}
    packings = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_learner, "pack", lambda *args: packings.append(pack(*args)) or packings[-1])
        needed = example("benchmark_floor").record(one_step(name, adapt, load_clip)).needed
    (rows, length), (images, patches, classes, d) = packings[-1].sentence.shape, (3, 4, len(CLASS_NAMES), 32)
    prompts = METHODS[name].config().vision_prompt_length if name == "ivlp" else 0
    tokens, (text, vision) = 1 + patches + prompts, (width for width, _ in sizes.values())
    learns = name == "ivlp"
    expected = {
        "patches": images * patches * 3 * 16 * 16 * vision,
        "images": tower(images * tokens, vision, sizes["vision"][1], images, tokens, learns),
        "sentences": tower(rows * length, text, sizes["text"][1], rows, length, True),
        "projections": images * vision * d * (2 if learns else 1) + classes * text * d * 2,
        "logits": images * d * classes * (3 if learns else 2),
    }
    assert multiply_adds(needed) == sum(expected.values())


def test_what_is_computed_twice_to_save_memory_is_not_needed(adapt, load_clip, example):
    floor = example("benchmark_floor")
    products = floor.record(one_step("coop", adapt, load_clip, text_chunk_size=1))
    assert 0 < multiply_adds(products.again) < multiply_adds(products.needed)
    row = floor.floor(products, torch.device("cpu"), least=1e-4)
    assert row["seconds_per_step"] > 0
    assert row["multiply_adds"] == multiply_adds(products.needed)
    assert row["multiply_adds_again"] == multiply_adds(products.again)


def test_a_benchmark_leaves_rows_a_table_and_a_picture(example, clip_folders, tmp_path, capsys):
    cases = ["--methods", "coop", "--classes", "3", "5", "--batch", "2", "--steps", "1", "--cached", "--same_process"]
    file = tmp_path / "new" / "rows.json"
    example("benchmark").main([*cases, "--model", clip_folders["plain"], "--json", str(file)])
    rows = json.loads(file.read_text())
    paths = ["ours", "reference", "floor", "ours, cached features", "floor, cached features"]
    expected = [("coop", path, classes) for path in paths for classes in (3, 5)]
    assert [(row["method"], row["path"], row["classes"]) for row in rows] == expected
    for row in rows:
        assert row["status"] == "ok"
        assert row["batch"] == 2
        assert row["seconds_per_step"] > 0
        assert row["images_per_second"] == pytest.approx(2 / row["seconds_per_step"])
        # Torch may serve so small a step from what it has; a sum of products holds nothing.
        assert ("multiply_adds" in row) if row["path"].startswith("floor") else row["peak_bytes_above_model"] >= 0
        assert (row["ratio_to_floor"] == 1) == row["path"].startswith("floor")
        assert (row["ratio_to_reference"] == 1) == (row["path"] == "reference")
    products = {row["path"]: row["multiply_adds"] for row in rows if "multiply_adds" in row}
    assert products["floor, cached features"] < products["floor"]  # the text side alone
    text = file.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("| coop | 3 | 2 |") == 5
    assert file.with_suffix(".png").stat().st_size > 5_000


def test_a_benchmark_follows_whatever_grows(example, tmp_path, monkeypatch, capsys):
    """One thing at a time, the others at their first value; what a method does not have is left out."""
    benchmark, asked = example("benchmark"), []

    def measure(**case):
        asked.append(case)
        absent = case["prompt_depth"] and case["method"] == "coop"
        size = case["classes"] * case["batch"] * (case["words"] or 2)
        done = {"status": "ok", "seconds_per_step": size, "images_per_second": 1}
        return {"status": "there is no prompt depth"} if absent else done | {
            "peak_bytes": size, "peak_bytes_above_model": size, "device": "CPU"}  # fmt: skip

    monkeypatch.setattr(benchmark, "measure", measure)
    file = tmp_path / "rows.json"
    grown = ["--over", "classes", "20", "10", "--over", "batch", "2", "8", "--over", "prompt_depth", "1", "3"]
    cases = ["--methods", "coop", "maple", "--paths", "ours", "--classes", "10", "--batch", "2", "--words", "5"]
    benchmark.main([*cases, *grown, "--same_process", "--json", str(file)])
    rows = json.loads(file.read_text())
    steps = [("classes", 10), ("classes", 20), ("batch", 2), ("batch", 8)]
    assert [(row["axis"], row[row["axis"]]) for row in rows if row["method"] == "coop"] == steps
    assert [row["prompt_depth"] for row in rows if row["axis"] == "prompt_depth"] == [1, 3]
    assert all(row["classes"] == 10 for row in rows if row["axis"] != "classes")
    assert all(case["words"] == 5 for case in asked)
    assert len(asked) == 10  # ten classes and two images are asked for once, whichever grows
    assert "| maple | 3 | 10 | 2 | ours |" in capsys.readouterr().out
    assert file.with_suffix(".png").stat().st_size > 20_000
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--over", "colours", "1"])
    assert "--over colours 1: give one of classes, batch, words, prompt_depth, image_size" in capsys.readouterr().err


def test_pictures_of_another_size_are_measured_on_a_model_of_that_size(example, clip_folders):
    case = example("benchmark_case")
    clip = case.load(clip_folders["plain"], 64)
    assert clip.vision_model.embeddings.position_embedding.weight.shape[0] == 17
    options = dict(method="ivlp", classes=3, batch=1, path="ours", prompt_depth=1, words=4, image_size=64)
    assert case.measure(clip_folders["plain"], **options)["status"] == "ok"


def test_the_reference_needs_the_tests_of_a_checkout(example, monkeypatch, capsys):
    monkeypatch.setattr(example("benchmark_case"), "__file__", "/elsewhere/examples/benchmark_case.py")
    with pytest.raises(SystemExit, match="2"):
        example("benchmark").main(["--methods", "coop"])
    assert "checkout of hf-tgpt's repository" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "families"), [("maple", ["metaclip_2", "siglip"]), ("cocoop", ["clip", "chinese_clip"])]
)
def test_the_plain_way_of_any_family_is_measured_beside_ours(name, families, example, monkeypatch, tmp_path):
    """With the same answers, of models that the command makes."""
    losses = {}
    original = torch.nn.functional.cross_entropy

    def noted(*args, **kwargs):
        loss = original(*args, **kwargs)
        losses.setdefault(len(losses), loss.item())
        return loss

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", noted)
    cases = ["--methods", name, "--classes", "3", "--batch", "1", "--steps", "1", "--json", str(tmp_path / "rows.json")]
    example("benchmark").main(["--families", *families, *cases, "--same_process"])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["model"].rpartition("/")[2], row["path"]) for row in rows] == [
        (family, path) for family in families for path in ("ours", "padded")
    ]
    assert all(row["status"] == "ok" for row in rows)
    assert all((row["ratio_to_reference"] == 1) == (row["path"] == "padded") for row in rows)
    assert f"| {families[1]} | {name} | 3 | 1 | padded |" in (tmp_path / "rows.md").read_text()
    ours, padded = (list(losses.values())[start::4] for start in (0, 2))  # of the first step; there are two
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(padded), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["tgpt", "maple", "cocoop"])
def test_inference_is_measured_on_all_paths(name, example, clip_folders):
    case = dict(model=clip_folders["legacy_eos"], classes=3, batch=2, mode="infer", steps=1, mixed_precision="bf16")
    for path in ("ours", "reference", "floor"):  # the shape with a context of 77, for TGP-T's long prompts
        assert example("benchmark_case").measure(method=name, path=path, **case)["status"] == "ok"


@pytest.mark.parametrize("name", ["maple", "cocoop"])
def test_what_each_idea_brings_can_be_measured(name, example, clip_folders, monkeypatch):
    benchmark, forward, calls = example("benchmark_case"), CLIPMLP.forward, []

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


@pytest.mark.parametrize("method", ["maple", "lora"])
def test_methods_that_learn_in_the_image_tower_have_no_cached_case(method, example, clip_folders):
    case = dict(model=clip_folders["plain"], classes=3, batch=2, mode="train", steps=1, mixed_precision="no")
    result = example("benchmark_case").measure(method=method, path="ours, cached features", **case)
    assert result == {"status": "there is no cache"}


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

    def run(case, *_):
        tried.append((case["path"], case["classes"]))
        return answers.get(case["path"], {"status": "out of memory"})

    monkeypatch.setattr(benchmark, "run", run)
    benchmark.main(["--methods", "maple", "--classes", "10", "20", "30", "--json", str(tmp_path / "rows.json")])
    assert tried == [("ours", 10), ("ours", 20), ("ours", 30), ("reference", 10), ("floor", 10)]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 9
    assert rows[5]["status"] == "not tried: out of memory with classes=10"
    assert rows[0]["ratio_to_reference"] is None


def test_a_case_beyond_its_memory_or_time_says_so(example, clip_folders):
    """And is measured in a process of its own, which the limit of memory is for."""
    benchmark = example("benchmark")
    case = dict(model=clip_folders["plain"], method="maple", classes=1_000, batch=1, path="reference", memory_limit=0.1)
    assert benchmark.run(case, time_limit=200) == {"status": "out of memory"}
    assert benchmark.run(case, time_limit=0.2) == {"status": "out of time"}


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


def test_a_case_that_fails_in_this_process_says_why(example, monkeypatch):
    benchmark = example("benchmark")
    case = dict(model="nowhere/at-all", method="maple", classes=3, batch=1, path="ours", memory_limit=None)
    assert benchmark.run(case, 1, same_process=True)["status"].startswith("failed: ValueError: `model`=")

    def refuse(**_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(benchmark, "measure", refuse)
    assert benchmark.run(case, 1, same_process=True) == {"status": "out of memory"}


def test_peak_memory_is_what_a_step_holds(example):
    benchmark, device = example("benchmark_case"), torch.device("cpu")
    torch.zeros(50_000_000)  # 200 MB before the start do not count
    before = benchmark.start_of_memory(device)
    torch.zeros(25_000_000)  # 100 MB
    assert benchmark.peak_of_memory(device) - before == pytest.approx(100e6, rel=0.1)


def test_class_names_are_accepted_by_the_thousand(example):
    for words in (None, 2, 3, 20):
        names = example("benchmark_case").class_names(10_000, words)
        assert len(set(names)) == 10_000
        assert all(len(name.split()) == words for name in names if (words or 2) > 2)


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
