"""Features that are kept in memory are those that would be computed now, whatever has been changed or switched."""

import pytest
import torch
from conftest import CLASS_NAMES, METHODS, make_classifier, pixels, shake
from datasets import ClassLabel, Dataset, Features, Image
from peft import LoraConfig
from peft.helpers import rescale_adapter_scale
from PIL import Image as PILImage

import hf_tgpt
from hf_tgpt.adapters.folder import CLASS_FEATURES
from hf_tgpt.data import FewShotImages, ImageTransform
from hf_tgpt.encoders import encoder_of
from hf_tgpt.encoders.walk import unit
from hf_tgpt.texts.sentences import load_tokenizer
from hf_tgpt.texts.zero_shot_head import zero_shot_head
from hf_tgpt.training.features import cache_features, encode_views

TEMPLATED = [name for name, method in METHODS.items() if method.has("templates")]


def answer(model):
    """Logits from what the model keeps, those from features that are encoded now, and the latter again."""
    with torch.no_grad():
        kept = model(pixels(model.get_base_model())).logits
        model.learner.forget()
        return kept, model(pixels(model.get_base_model())).logits


def check(model):
    kept, fresh = answer(model)
    torch.testing.assert_close(kept, fresh, atol=1e-5, rtol=1e-5)
    return fresh


@pytest.fixture
def lora(load_clip):
    """A LoRA that has been moved far from where it starts, and has answered."""
    torch.manual_seed(0)
    model = make_classifier("lora", load_clip(), CLASS_NAMES, r=2, lora_alpha=8)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn_like(weight))
    check(model.eval())
    return model


def test_a_lora_that_is_switched_off_and_on_answers_as_it_is_at_the_time(lora, tmp_path):
    before = check(lora)
    with lora.model.disable_adapter():
        assert not torch.allclose(check(lora), before, atol=0.1)
    torch.testing.assert_close(check(lora), before)
    with rescale_adapter_scale(lora.model, 0.1):
        assert not torch.allclose(check(lora), before, atol=0.1)
    torch.testing.assert_close(check(lora), before)
    with lora.model.disable_adapter():
        lora(pixels(lora.get_base_model()))
    lora.save_pretrained(tmp_path)
    assert hf_tgpt.save_class_features(lora, tmp_path)
    stored = answer(hf_tgpt.load_classifier(tmp_path).model)[0]
    (tmp_path / CLASS_FEATURES).unlink()
    torch.testing.assert_close(stored, answer(hf_tgpt.load_classifier(tmp_path).model)[0])


def test_a_second_lora_and_another_strength_are_noticed(lora):
    before = check(lora)
    lora.model.add_adapter("second", LoraConfig(r=1, target_modules=["q_proj"], init_lora_weights=False))
    lora.model.set_adapter("second")
    assert not torch.allclose(check(lora.eval()), before, atol=1e-3)
    lora.model.set_adapter("default")
    torch.testing.assert_close(check(lora), before)
    for layer in lora.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 3.0)
    assert not torch.allclose(check(lora), before, atol=0.1)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("name", ["coop", "tgpt", "gda"])
def test_a_lora_beside_prompts_is_noticed(name, adapt, load_clip, tmp_path):
    fields = {"wise_ft": 1.0} if name == "tgpt" else {}
    adapt(METHODS[name], **fields).save_pretrained(tmp_path)
    clip = load_clip()
    clip.load_adapter(tmp_path, adapter_name="ours")
    lora = LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    clip.add_adapter(lora, adapter_name="theirs")
    clip.set_adapter("ours")

    def now():
        with torch.no_grad():
            kept = clip(pixel_values=pixels(clip)).logits
            clip.learner.forget()
            fresh = clip(pixel_values=pixels(clip)).logits
        torch.testing.assert_close(kept, fresh, atol=1e-5, rtol=1e-5)
        return fresh

    alone = now()
    clip.set_adapter(["ours", "theirs"])
    both = now()
    assert not torch.allclose(both, alone, atol=1e-3)
    with rescale_adapter_scale(clip, 0.1):
        assert not torch.allclose(now(), both, atol=1e-3)


def test_tgpts_zero_shot_head_follows_the_tower(adapt):
    model = adapt(METHODS["tgpt"], wise_ft=1.0)
    encoder, config = encoder_of(model.get_base_model()), model.learner.config
    check(model)
    with torch.no_grad():
        encoder.model.text_model.final_layer_norm.bias.add_(torch.randn(32))
    check(model)
    expected = zero_shot_head(encoder, config.class_names, config.templates, load_tokenizer(encoder))
    torch.testing.assert_close(model.learner.zero_shot_head, unit(torch.cat([expected, expected], dim=-1)))


@pytest.mark.parametrize("name", TEMPLATED)
def test_other_templates_in_the_config_are_other_features(name, adapt, tmp_path):
    model = adapt(METHODS[name], **({"wise_ft": 1.0} if name == "tgpt" else {}))
    check(model)
    model.learner.config.templates = ["a red {}."]
    check(model)
    model.learner.config.templates.append("a blue {}.")  # in place
    check(model)
    model.save_pretrained(tmp_path)
    hf_tgpt.save_class_features(model, tmp_path)
    stored = answer(hf_tgpt.load_classifier(tmp_path).model)[0]
    (tmp_path / CLASS_FEATURES).unlink(missing_ok=True)
    torch.testing.assert_close(stored, answer(hf_tgpt.load_classifier(tmp_path).model)[0])


def test_stored_image_features_are_of_the_loras_switches_and_strength(lora, tmp_path):
    colours = [(200, 30, 20), (20, 200, 40)]
    rows = {"image": [PILImage.new("RGB", (40, 40), colour) for colour in colours], "label": [0, 1]}
    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES[:2])})
    images = FewShotImages(
        Dataset.from_dict(rows, features), ImageTransform(32, (0.5,) * 3, (0.25,) * 3, train=False), seed=0
    )

    def stored():
        return cache_features(lora, images, 1, tmp_path, torch.float32).states[0]

    def fresh():
        return encode_views(lora, images).states[0]

    with pytest.raises(ValueError, match="LORA trains weights in the vision tower"):
        stored()
    lora.requires_grad_(False)
    lora.learner.vision_is_frozen = True
    before = stored()
    torch.testing.assert_close(before, fresh())
    for layer in lora.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 3.0)
    torch.testing.assert_close(stored(), fresh())
    assert not torch.allclose(stored(), before, atol=1e-3)


def test_a_lora_that_was_loaded_to_answer_trains_nothing(lora, tmp_path):
    shake(lora)
    lora.save_pretrained(tmp_path)
    loaded = hf_tgpt.load_classifier(tmp_path).model
    assert not any(weight.requires_grad for weight in loaded.parameters())
