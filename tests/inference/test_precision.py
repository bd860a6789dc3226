"""Half precision is the towers' alone: the answers stay near, and what follows the towers is in float32."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, METHODS, ROOT, SHAPES, make_classifier, make_clip, shake
from PIL import Image

import hf_tgpt
from hf_tgpt.cli import export, options
from hf_tgpt.cli.main import main
from hf_tgpt.encoders import encoder_of, precision

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(method, shape) -> the folder of an adapter on a base model in a folder."""
    root, bases = tmp_path_factory.mktemp("adapters"), {}

    def save(name, shape="plain"):
        if shape not in bases:
            bases[shape] = make_clip(shape, root / shape)
        folder = root / f"{name}-{shape}"
        if not folder.exists():
            torch.manual_seed(1)
            base = hf_tgpt.load_clip(bases[shape]).eval()
            fields = METHODS[name].fields if name in METHODS else {}
            model = make_classifier(name, base, CLASS_NAMES, **fields).eval()
            shake(model)
            model.save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", [*METHODS, "lora", "two_stage", "zero_shot"])
def test_every_method_answers_in_half_precision_as_in_full(name, dtype, saved):
    full, half = (hf_tgpt.load_classifier(saved(name), dtype=each) for each in ("fp32", dtype))
    encoder = encoder_of(half.model.get_base_model())
    assert encoder.dtype == precision.PRECISIONS[dtype]
    assert encoder.model.logit_scale.dtype == torch.float32
    trained = half.model.learner.state_dict().values()
    assert not {value.dtype for value in trained} & {torch.bfloat16, torch.float16}
    scores = [{part["label"]: part["score"] for part in classifier(PICTURE, None)} for classifier in (full, half)]
    assert half.model(half.transform(PICTURE)[None]).logits.dtype == torch.float32
    assert scores[1] == pytest.approx(scores[0], abs=0.15)  # the scale of 100 blows up bfloat16's third digit


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "plain"])
def test_every_family_answers_in_half_precision_as_in_full(shape, saved):
    full, half = (hf_tgpt.load_classifier(saved("maple", shape), dtype=each) for each in ("fp32", torch.bfloat16))
    scores = [{part["label"]: part["score"] for part in classifier(PICTURE, None)} for classifier in (full, half)]
    assert scores[1] == pytest.approx(scores[0], abs=0.15)


def test_the_logits_scale_is_the_models_own(saved, tmp_path):
    base = hf_tgpt.load_clip(make_clip("siglip", tmp_path))
    exact = dict(base.named_parameters())
    cast = hf_tgpt.load_clip(str(tmp_path), dtype=torch.bfloat16)
    scalars = {name for name, weight in cast.named_parameters() if weight.dtype == torch.float32}
    assert scalars == {"logit_scale", "logit_bias"}
    assert all(torch.equal(cast.get_parameter(name), exact[name]) for name in scalars)


def test_auto_is_what_the_device_multiplies_faster(monkeypatch):
    for faster, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "multiplies_faster", lambda dtype, device, faster=faster: faster)
        assert precision.read_dtype("auto") == expected
    monkeypatch.undo()
    assert precision.multiplies_faster(torch.bfloat16, "cpu") in (True, False)
    assert not precision.multiplies_faster(torch.float64, "cpu")


def test_a_small_product_spares_the_large_ones_of_a_type_without_instructions(monkeypatch):
    sides, ones = set(), torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, **kwargs: sides.update(shape) or ones(*shape, **kwargs))
    monkeypatch.setattr(precision, "_HOPELESS", 0)
    assert not precision.multiplies_faster.__wrapped__(torch.bfloat16, "cpu")
    assert sides == {16, 768, 3072}


def test_an_unknown_precision_is_answered_by_the_known_ones(saved):
    assert set(options.DTYPES) == {precision.AUTO, *precision.PRECISIONS}
    for wrong in ("int8", torch.float64, None):
        with pytest.raises(ValueError, match=r"`dtype`=.* is unknown; choose one of auto, fp32, bf16, fp16"):
            hf_tgpt.load_classifier(saved("coop"), dtype=wrong)


def test_an_overflow_is_an_error_and_no_answer(saved):
    classifier = hf_tgpt.load_classifier(saved("coop"), dtype="fp16")
    classifier.model.get_base_model().visual_projection.weight.data.normal_(std=2e4)
    with pytest.raises(FloatingPointError, match="`dtype`='bf16'"):
        classifier(PICTURE)


def test_commands_take_the_precision(saved, tmp_path, capsys):
    PICTURE.save(tmp_path / "cat.png")
    rows = []
    for dtype in ("fp32", "bf16", "auto"):
        assert main(["predict", str(saved("maple")), str(tmp_path / "cat.png"), "--dtype", dtype, "--json"]) == 0
        rows.append(json.loads(capsys.readouterr().out)["rows"][0])
    assert rows[0] != rows[1]
    assert rows[2] in rows[:2]


def test_auto_is_float32_in_an_onnx_file_which_is_for_other_machines(saved, monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "multiplies_faster", lambda dtype, device: True)
    found = []

    def write(classifier, path, labels):
        found.append(encoder_of(classifier.model.get_base_model()).dtype)
        return {"labels": labels}

    monkeypatch.setattr(export, "export_onnx", write)
    assert main(["export", str(saved("coop")), str(tmp_path / "model.onnx"), "--dtype", "auto"]) == 0
    assert found == [torch.float32]


@pytest.mark.parametrize("method", ["lora", "gda"])
def test_a_base_model_in_half_precision_trains_an_adapter_in_full(method, tmp_path):
    for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / "own" / place).mkdir(parents=True)
        PICTURE.rotate(len(place)).save(tmp_path / "own" / place / f"{place[-3:]}.png")
    few = ["--max_steps", "2", "--batch_size", "2"] if method == "lora" else ["--no_search"]
    few += ["--model", "toy", "--dataset", str(tmp_path / "own"), "--dtype", "bf16"]
    run = tmp_path / "run"
    assert main(["train", "--method", method, *few, "--output_dir", str(run)]) == 0
    assert json.loads((run / "results.json").read_text())["dtype"] == "bfloat16"
    model = hf_tgpt.load_classifier(run, dtype="bf16").model
    assert not {w.dtype for name, w in model.named_parameters() if "lora" in name} - {torch.float32}


def test_the_benchmark_tells_how_near_the_answers_are(saved, tmp_path, monkeypatch, capsys):
    for place in ("train/cat", "train/forest", "test/cat", "test/forest"):
        (tmp_path / place).mkdir(parents=True)
        PICTURE.rotate(len(place)).save(tmp_path / place / "0.png")
    program = ROOT / "examples" / "benchmark_precision.py"
    arguments = [str(saved("coop")), str(saved("gda")), "--dataset", str(tmp_path), "--dtypes", "bf16", "fp16"]
    monkeypatch.setattr(sys, "argv", [program.name, *arguments])
    runpy.run_path(str(program), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:6]] == [
        [f"| {name}-plain", dtype] for name in ("coop", "gda") for dtype in ("bf16", "fp16")
    ]
    assert all(float(line.split(" | ")[3]) < 0.15 for line in lines[2:6])
    assert lines[-1].startswith("--dtype auto is ")


def test_weights_of_the_base_model_are_not_trained_in_half_precision(tmp_path, capsys):
    arguments = ["train", "--method", "two_stage", "--model", "toy", "--max_steps", "2", "--dtype", "bf16"]
    assert main([*arguments, "--output_dir", str(tmp_path / "run")]) == 1
    assert "--mixed_precision instead" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
