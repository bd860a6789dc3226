"""Dual encoders that are known by their features alone: heads, zero-shot and LoRA work, prompts are refused."""

import pytest
import torch
import transformers
from conftest import CLASS_NAMES, METHODS, make_classifier, pixels, shake
from other_encoders import KINDS, write
from peft import LoraConfig, get_peft_model
from PIL import Image

import hf_tgpt
from hf_tgpt.encoders import FAMILIES, encoder_of
from hf_tgpt.encoders.features_only import other_model_class
from hf_tgpt.inference.explain import attention_pictures, image_attention
from hf_tgpt.inference.loading import load_classifier
from hf_tgpt.inference.onnx import export_onnx
from hf_tgpt.inference.plain_transformers import export_transformers
from hf_tgpt.methods.zero_shot import zero_shot_beside
from hf_tgpt.utils.compat import pil_image_processor

PICTURE = Image.effect_noise((50, 70), 80).convert("RGB")
SENTENCES = [f"a photo of a {name}." for name in CLASS_NAMES]


@pytest.fixture(scope="session", params=KINDS)
def folder(request, tmp_path_factory):
    """A random model of each kind on disk, with its tokenizer and its image processor."""
    return write(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def clip(folder):
    return hf_tgpt.load_clip(folder).eval()


def own_logits(model, folder, pictures):
    """By transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(SENTENCES, padding=True, return_attention_mask=True, return_tensors="pt")
    plain = type(model).from_pretrained(folder).eval()
    names = ("input_ids", "attention_mask")
    with torch.no_grad():
        return plain(pixel_values=pictures, **{name: inputs[name] for name in names}).logits_per_image


def test_all_that_transformers_lists_and_that_give_features_are_taken():
    named = transformers.models.auto.modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
    taken = {kind for kind in named if other_model_class(kind)} - set(FAMILIES)
    assert set(KINDS) <= taken
    assert taken - set(KINDS) <= {"tipsv2"}
    # The one has neither function, the other takes patches.
    assert not {"blip-2", "siglip2"} & taken


def test_zero_shot_gives_the_models_own_logits(clip, folder):
    pictures = pixels(clip)
    found = zero_shot_beside(clip, CLASS_NAMES)(pictures).logits
    torch.testing.assert_close(found, own_logits(clip, folder, pictures), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["gda", "clip_adapter"])  # tests/adapters/test_support.py has all heads on ALIGN
def test_heads_are_fitted_saved_and_loaded(clip, folder, name, tmp_path):
    method = METHODS[name]
    model = get_peft_model(clip, method.config()).eval()
    hf_tgpt.fit(model, torch.randn(8, 3, 32, 32), torch.arange(8) % 4)
    model.eval().save_pretrained(tmp_path)
    expected = model(pixels(clip)).logits
    again = hf_tgpt.load_trained(hf_tgpt.load_clip(folder).eval(), tmp_path)
    assert torch.equal(again(pixels(clip)).logits, expected)
    with model.disable_adapter():
        ids = transformers.AutoTokenizer.from_pretrained(folder)(
            SENTENCES, padding=True, return_attention_mask=True, return_tensors="pt"
        )
        answer = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], pixel_values=pixels(clip))
    torch.testing.assert_close(answer.logits_per_image, own_logits(clip, folder, pixels(clip)), atol=1e-4, rtol=1e-5)
    assert type(model.unload()).__name__ == other_model_class(clip.config.model_type)


@pytest.mark.parametrize("name", ["clip_adapter", "zero_shot"])
def test_open_methods_answer_the_models_own_call(clip, name):
    model = make_classifier(name, clip, CLASS_NAMES).eval()
    shake(model)
    ids = transformers.AutoTokenizer.from_pretrained(clip.name_or_path)(
        SENTENCES, padding=True, return_attention_mask=True, return_tensors="pt"
    )
    found = model(**ids, pixel_values=pixels(clip, 4), return_loss=True)
    assert type(found) is encoder_of(clip).output_class()
    torch.testing.assert_close(found.logits_per_image, model(pixels(clip, 4)).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].config_class.learns_prompts])
def test_prompts_are_refused_in_one_sentence_that_names_the_families(clip, name):
    with pytest.raises(ValueError, match="layers of the towers") as refusal:
        get_peft_model(clip, METHODS[name].config())
    assert all(family.model_class in str(refusal.value) for family in FAMILIES.values())
    assert type(clip).__name__ in str(refusal.value)
    assert not hasattr(clip, "peft_config")  # it is as it was


def test_peft_adapters_train_in_the_towers(clip, tmp_path):
    model = make_classifier("lora", clip, CLASS_NAMES)
    model.train()(pixels(clip), torch.tensor([0, 1, 2])).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert any(grad is not None and grad.any() for grad in grads)  # some of BLIP's layers serve other tasks
    plain = get_peft_model(hf_tgpt.load_clip(clip.name_or_path), LoraConfig(target_modules=["query", "q_proj"]))
    assert sum(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("name", ["linear_probe", "lora"])
def test_training_changes_no_statistics_of_the_frozen_model(clip, folder, name):
    model = make_classifier(name, clip, CLASS_NAMES)
    model.train()(pixels(clip), torch.tensor([0, 1, 2])).loss.backward()
    before = hf_tgpt.load_clip(folder).state_dict()
    after = {key.replace(".base_layer", ""): value for key, value in model.get_base_model().state_dict().items()}
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_prediction_takes_the_models_own_processor(clip, folder, tmp_path):
    model = get_peft_model(clip, METHODS["task_res"].config()).eval()
    model.save_pretrained(tmp_path)
    classifier = load_classifier(tmp_path)
    kind = type(classifier.transform).__name__
    assert kind == "ImageTransform"
    settings, _ = pil_image_processor().get_image_processor_dict(folder)
    name = settings["image_processor_type"].removesuffix("Fast").removesuffix("Pil")
    expected = pil_image_processor(name).from_pretrained(folder)(PICTURE, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(classifier.transform(PICTURE), expected, atol=1e-5, rtol=1e-5)
    logits = own_logits(clip, folder, expected[None])
    scores = {guess["label"]: guess["score"] for guess in classifier(PICTURE, None)}
    assert scores == pytest.approx(dict(zip(CLASS_NAMES, logits.softmax(-1)[0].tolist(), strict=True)), abs=1e-4)


def test_attention_is_refused_and_the_page_shows_the_picture_alone(clip, tmp_path):
    get_peft_model(clip, METHODS["task_res"].config()).save_pretrained(tmp_path)
    classifier = load_classifier(tmp_path)
    with pytest.raises(ValueError, match="whose attention cannot be read; explain an adapter on one of CLIPModel"):
        image_attention(classifier, PICTURE)
    shown = attention_pictures(classifier, PICTURE)
    assert [(title, picture.size) for title, picture in shown.items()] == [("what the model sees", (32, 32))]


@pytest.mark.parametrize("folder", ["align", "blip"], indirect=True)  # the others' image towers are CLIP's
def test_exports(clip, folder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = get_peft_model(clip, METHODS["gda"].config()).eval()
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    classifier = load_classifier(tmp_path / "adapter")
    export_onnx(classifier, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": pixels(clip).numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(pixels(clip)).logits, atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="export the adapter to ONNX"):
        export_transformers(classifier, tmp_path / "plain")
