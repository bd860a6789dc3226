"""Exported models answer as the adapter does, without this package."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, HEADS, METHODS, ImageProcessor, make_classifier, make_clip, pixels, shake
from datasets import ClassLabel, Dataset
from PIL import Image
from safetensors.torch import load_file

from hf_tgpt import available_methods, load_clip
from hf_tgpt.adapters.standalone import LinearClassifier
from hf_tgpt.data import FewShotImages, ImageTransform, decode_image
from hf_tgpt.encoders import encoder_of
from hf_tgpt.encoders.precision import cast_towers
from hf_tgpt.inference.classifier import Classifier
from hf_tgpt.inference.onnx import export_onnx, onnx_accuracy, quantize_onnx
from hf_tgpt.inference.plain_transformers import export_transformers

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
SIDE = 32
PROCESSOR = dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """classifier("maple", prompt_length=1) -> one that is not as it started."""
    base = make_clip("plain", tmp_path_factory.mktemp("base"))

    def make(name, **fields):
        torch.manual_seed(1)
        fields = (METHODS[name].fields if name in METHODS else {}) | fields
        model = make_classifier(name, load_clip(base).eval(), CLASS_NAMES, **fields).eval()
        shake(model)
        transform = ImageTransform.from_processor(ImageProcessor(**PROCESSOR), train=False)
        return Classifier(model, transform)

    return make


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


# A linear layer behind an image tower, like LP++'s or, with prompts in it, MaPLe's.
LINEAR = ["clap", "coop", "gda", "ivlp", "kgcoop", "linear_probe", "lora", "promptsrc", "task_res", "two_stage"]
LINEAR += ["zero_shot", "zs_lp"]


@pytest.mark.parametrize("name", LINEAR)
def test_methods_that_are_linear_are_exported_as_such(name, classifier):
    model = classifier(name).model
    module = model.learner.standalone(encoder_of(model.get_base_model())).eval()
    assert isinstance(module, LinearClassifier)
    batch = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(module(batch), model(batch).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(set(available_methods()) - set(LINEAR) - set(HEADS)))  # those: test_heads.py
def test_onnx_gives_the_models_logits_for_any_batch_and_int8_nearly(name, classifier, tmp_path):
    trained = classifier(name)
    export_onnx(trained, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 2, 5):
        batch = torch.randn(count, 3, SIDE, SIDE)
        with torch.no_grad():
            expected = trained.model(batch).logits.numpy()
        (logits,) = session.run(None, {"pixel_values": batch.numpy()})
        np.testing.assert_allclose(logits, expected, atol=1e-4)
    if name in ("maple", "mutual_prompt", "tgpt"):  # class features, texts for each picture, two texts
        quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx")
        (small,) = onnxruntime.InferenceSession(tmp_path / "int8.onnx").run(None, {"pixel_values": batch.numpy()})
        assert np.corrcoef(small.ravel(), expected.ravel())[0, 1] > 0.95


def test_onnx_keeps_float16_at_half_the_size_and_refuses_bfloat16(classifier, tmp_path):
    trained = classifier("maple")
    whole = sum(weight.nbytes for weight in trained.model.parameters())
    cast_towers(trained.model.get_base_model(), torch.float16)
    export_onnx(trained, tmp_path / "half.onnx")
    stored = onnx.load(tmp_path / "half.onnx").graph.initializer
    assert sum(len(tensor.raw_data) for tensor in stored) < 0.6 * whole
    batch = torch.randn(3, 3, SIDE, SIDE)
    (logits,) = onnxruntime.InferenceSession(tmp_path / "half.onnx").run(None, {"pixel_values": batch.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, trained.model(batch).logits.float().numpy(), atol=0.05)
    cast_towers(trained.model.get_base_model(), torch.bfloat16)
    with pytest.raises(ValueError, match="'bf16': ONNX Runtime has no convolution in bfloat16"):
        export_onnx(trained, tmp_path / "other.onnx")


# What a user of the file does with nothing but numpy, Pillow and onnxruntime.
ONNX_USER = """
import json, sys
import numpy as np, onnxruntime
from PIL import Image

assert not {"torch", "transformers", "hf_tgpt"} & set(sys.modules)
model, picture = sys.argv[1:]
facts = json.load(open(model.replace(".onnx", ".json")))
steps, image = facts["preprocessing"], Image.open(picture).convert("RGB")
scale = steps["2_resize_shorter_side"] / min(image.size)
image = image.resize([int(side * scale) for side in image.size], Image.Resampling[steps["resample"].upper()])
side = steps["3_crop_centre"]
left, top = [(length - side) // 2 for length in image.size]
pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) * steps["4_scale"]
pixels = (pixels - steps["5_subtract_mean"]) / steps["6_divide_by_std"]
pixels = pixels.transpose(2, 0, 1)[None].astype(np.float32)
(logits,) = onnxruntime.InferenceSession(model).run(None, {facts["input"]["name"]: pixels})
print(json.dumps(dict(zip(facts["labels"], logits[0].tolist()))))
"""


def test_an_onnx_file_and_its_json_are_all_that_a_program_needs(classifier, picture, tmp_path):
    trained = classifier("coop")
    facts = export_onnx(trained, tmp_path / "model.onnx", class_names=["forest", "zigzag texture"])
    assert facts == json.loads((tmp_path / "model.json").read_text())
    assert facts["labels"] == ["forest", "zigzag texture"]
    command = [sys.executable, "-c", ONNX_USER, tmp_path / "model.onnx", picture]
    logits = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    scores = torch.tensor(list(logits.values())).softmax(0)
    for part in trained(picture, class_names=facts["labels"]):
        assert scores[facts["labels"].index(part["label"])] == pytest.approx(part["score"], abs=1e-4)


def test_int8_is_smaller_and_its_accuracy_is_measured(classifier, tmp_path):
    trained = classifier("linear-probe")
    export_onnx(trained, tmp_path / "model.onnx")
    quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").stat().st_size < (tmp_path / "model.onnx").stat().st_size
    noise = np.random.default_rng(0).integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels) for pixels in noise]
    labels = [CLASS_NAMES.index(answer[0]["label"]) for answer in trained(pictures)]
    labels[0] = (labels[0] + 1) % len(CLASS_NAMES)  # one of six is wrong
    data = Dataset.from_dict({"image": pictures, "label": labels}).cast_column("label", ClassLabel(names=CLASS_NAMES))
    images = FewShotImages(data, trained.transform)
    assert onnx_accuracy(tmp_path / "model.onnx", images, batch_size=4) == pytest.approx(5 / 6)
    assert 0 <= onnx_accuracy(tmp_path / "int8.onnx", images) <= 1


@pytest.mark.parametrize("field", [dict(shortlist=2), dict(conditioned_texts=False)])
def test_what_onnx_cannot_hold_is_refused_by_name(field, classifier, tmp_path):
    with pytest.raises(ValueError, match=f"`{next(iter(field))}`=.*ONNX cannot represent"):
        export_onnx(classifier("mutual_prompt", **field), tmp_path / "model.onnx")


def test_closed_methods_refuse_other_classes_and_files_need_their_ending(classifier, tmp_path):
    with pytest.raises(ValueError, match="baked into"):
        export_onnx(classifier("tgpt"), tmp_path / "model.onnx", class_names=["zebra"])
    with pytest.raises(ValueError, match=r"ends with \.onnx"):
        export_onnx(classifier("coop"), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_export_does_not_change_the_model(classifier, tmp_path):
    trained = classifier("lora")
    batch = pixels(trained.model.get_base_model())
    before = trained.model(batch).logits.detach()
    attention = trained.model.get_base_model().config._attn_implementation
    export_onnx(trained, tmp_path / "model.onnx")
    assert trained.model.get_base_model().config._attn_implementation == attention
    torch.testing.assert_close(trained.model(batch).logits, before, atol=0, rtol=0)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {"pixel_values": batch.numpy()})
    np.testing.assert_allclose(logits, before.numpy(), atol=1e-4)


# Plain transformers --------------------------------------------------------------------------------------------------

DEEP_TEXT = dict(vision_prompt_length=0)


@pytest.mark.parametrize(
    ("name", "fields"), [("coop", {}), ("ivlp", DEEP_TEXT), ("zero_shot", {}), ("linear_probe", {}), ("lora", {})]
)
def test_plain_transformers_give_the_models_logits(name, fields, classifier, tmp_path):
    from safetensors.torch import load_file
    from transformers import CLIPVisionModelWithProjection

    trained = classifier(name, **fields)
    export_transformers(trained, tmp_path)
    vision = CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
    batch = torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        features = torch.nn.functional.normalize(vision(batch).image_embeds)
        logits = torch.nn.functional.linear(features, **load_file(tmp_path / "classifier.safetensors"))
        torch.testing.assert_close(logits, trained.model(batch).logits, atol=1e-4, rtol=0)
    assert list(vision.config.id2label.values()) == CLASS_NAMES


def test_the_snippet_classifies_where_this_package_cannot_be_imported(classifier, picture, tmp_path):
    trained = classifier("coop")
    snippet = export_transformers(trained, tmp_path / "plain", class_names=["forest", "cat"])
    assert snippet in (tmp_path / "plain" / "README.md").read_text()
    code = "import sys; sys.modules['hf_tgpt'] = sys.modules['peft'] = None\n" + snippet
    command = [sys.executable, "-c", code, tmp_path / "plain", picture]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert answer == trained(picture, class_names=["forest", "cat"])[0]["label"]


def test_the_snippet_sees_pictures_as_this_package_does(classifier, tmp_path, monkeypatch):
    trained = classifier("gda")
    snippet = export_transformers(trained, tmp_path / "plain")
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # by 90 degrees
    Image.fromarray(noise[..., :3]).save(tmp_path / "turned.jpg", exif=turned, quality=100)
    Image.fromarray(noise).save(tmp_path / "transparent.png")
    Image.fromarray(noise[..., 0]).save(tmp_path / "grey.png")
    for name in ("turned.jpg", "transparent.png", "grey.png"):
        monkeypatch.setattr(sys, "argv", ["program", str(tmp_path / "plain"), str(tmp_path / name)])
        space = {}
        exec(snippet, space)
        seen = trained.transform(decode_image(tmp_path / name))
        with torch.no_grad():
            torch.testing.assert_close(space["logits"], trained.model(seen[None]).logits, atol=1e-3, rtol=1e-4)


def test_plain_transformers_keep_half_precision(classifier, picture, tmp_path, monkeypatch, capsys):
    trained = classifier("coop")
    cast_towers(trained.model.get_base_model(), torch.bfloat16)
    snippet = export_transformers(trained, tmp_path / "plain")
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    monkeypatch.setattr(sys, "argv", ["program", str(tmp_path / "plain"), str(picture)])
    exec(snippet, {})
    assert capsys.readouterr().out.strip() == trained(picture)[0]["label"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("maple", "learns prompts in the image tower"),
        ("ivlp", "learns prompts in the image tower"),
        ("mutual_prompt", "learns prompts in the image tower"),
        ("cocoop", "texts that depend on the image"),
        ("tgpt", "texts that depend on the image"),
    ],
)
def test_what_plain_transformers_cannot_hold_is_refused_with_the_reason(name, why, classifier, tmp_path):
    with pytest.raises(ValueError, match=f"{why}.*export it to ONNX"):
        export_transformers(classifier(name), tmp_path)
    assert not list(tmp_path.iterdir())
