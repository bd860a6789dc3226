"""Zero-shot CLIP, the linear probe, LoRA and 2SFS answer like an adapted CLIP, and come back from disk as they were."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import CLASS_NAMES, METHODS, make_classifier, pixels, shake
from datasets import ClassLabel, Dataset, Features
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, CLIPModel

from hf_tgpt import load_trained
from hf_tgpt.adapters.config import change_config
from hf_tgpt.hub.run import base_and_revision
from hf_tgpt.training.checkpoint import trained_weights
from hf_tgpt.training.config import TrainingConfig
from hf_tgpt.training.loop import train

LABELS = torch.tensor([0, 3, 1])
REFERENCES = ("zero-shot", "linear-probe", "lora", "two_stage")


@pytest.fixture(params=REFERENCES)
def reference(request):
    return request.param


def sentence_logits(clip, names, batch):
    tokenizer = AutoTokenizer.from_pretrained(clip.name_or_path)
    texts = tokenizer([f"a photo of a {name}." for name in names], padding=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return clip(input_ids=texts, pixel_values=batch).logits_per_image


def test_zero_shot_is_plain_clip(load_clip):
    clip = load_clip()
    plain = sentence_logits(clip, CLASS_NAMES, pixels(clip))
    model = make_classifier("zero-shot", clip, CLASS_NAMES).eval()
    torch.testing.assert_close(model(pixels(clip)).logits, plain)
    torch.testing.assert_close(sentence_logits(model, CLASS_NAMES, pixels(clip)), plain)  # CLIP's own call
    assert not trained_weights(model)


def test_lora_starts_as_zero_shot_and_is_pefts_own_adapter(load_clip, tmp_path):
    clip = load_clip()
    plain = sentence_logits(clip, CLASS_NAMES, pixels(clip))
    model = make_classifier("lora", clip, CLASS_NAMES, r=3).eval()
    torch.testing.assert_close(model(pixels(clip)).logits, plain)
    assert {name.split(".")[-3] for name in trained_weights(model)} == {"lora_A", "lora_B"}
    shake(model)
    model.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(load_clip(), tmp_path).eval()
    with torch.no_grad():
        logits = sentence_logits(theirs.get_base_model(), CLASS_NAMES, pixels(clip))
        torch.testing.assert_close(model(pixels(clip)).logits, logits)
    assert not torch.allclose(logits, plain)
    assert "More Information Needed" not in (tmp_path / "README.md").read_text()


def test_a_reference_learns_and_leaves_clip_alone(reference, load_clip):
    clip = load_clip()
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    model = make_classifier(reference, clip, CLASS_NAMES).train()
    loss = model(pixels(clip), LABELS).loss
    weights = list(trained_weights(model))
    if reference == "zero-shot":
        assert not loss.requires_grad
        return
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.001)
    for _ in range(3):
        optimizer.zero_grad()
        model(pixels(clip), LABELS).loss.backward()
        optimizer.step()
    assert weights
    assert model.eval()(pixels(clip), LABELS).loss < loss
    # PEFT moves a layer's weights below the LoRA's; they are the same ones.
    after = {name.replace(".base_layer", ""): value for name, value in model.get_base_model().state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_saved_reference_comes_back(reference, load_clip, tmp_path):
    clip = load_clip()
    model = make_classifier(reference, clip, CLASS_NAMES).eval()
    shake(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    again = load_trained(load_clip(), tmp_path)
    assert base_and_revision(tmp_path) == (clip.name_or_path, None)
    assert again.class_names == CLASS_NAMES
    with torch.no_grad():
        assert torch.equal(again(pixels(clip)).logits, model(pixels(clip)).logits)


def test_references_that_read_class_names_take_new_ones(reference, load_clip):
    clip = load_clip()
    model = make_classifier(reference, clip, CLASS_NAMES).eval()
    names = ["dog", "green circle"]
    if model.takes_new_classes:
        with torch.no_grad():
            model(pixels(clip))
            model.set_class_names(names)
            torch.testing.assert_close(
                model(pixels(clip)).logits, sentence_logits(model.get_base_model(), names, pixels(clip))
            )
    else:
        with pytest.raises(ValueError, match="LINEAR_PROBE has its 4 classes baked into"):
            model.set_class_names(names)


def test_references_refuse_what_methods_refuse(reference, load_clip):
    with pytest.raises(ValueError, match="twice"):
        make_classifier(reference, load_clip(), ["cat", "Cat"])
    with pytest.raises(ValueError, match="`labels` holds 7"):
        make_classifier(reference, load_clip(), CLASS_NAMES)(pixels(load_clip()), torch.tensor([0, 7, 1]))


def test_a_linear_probe_without_pictures_says_so(load_clip):
    with pytest.raises(ValueError, match="`pixel_values` is missing"):
        make_classifier("linear-probe", load_clip(), CLASS_NAMES)(labels=LABELS)


def test_bad_templates_are_named(load_clip):
    with pytest.raises(ValueError, match="`templates`"):
        make_classifier("lora", load_clip(), CLASS_NAMES, templates=["a photo"])
    for texts in (["a cat", 3], [], "a cat"):
        with pytest.raises(ValueError, match="`templates`"):
            make_classifier("zero_shot", load_clip(), ["cat"], templates={"cat": texts})


def test_a_changed_config_is_one_models_own(load_clip, adapt, tmp_path):
    adapt(METHODS["tgpt"]).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    first, second = (PeftModel.from_pretrained(load_clip(), tmp_path, config=config) for _ in range(2))
    before = second(pixels(second)).logits
    change_config(first, {"wise_ft": "1.0"})
    assert second.learner.config.wise_ft == config.wise_ft == 0
    assert torch.equal(second(pixels(second)).logits, before)
    assert first.peft_config["default"].wise_ft == first.learner.config.wise_ft == 1


def test_what_loading_lora_cannot_take_is_refused(load_clip, tmp_path):
    make_classifier("lora", load_clip(), CLASS_NAMES).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="`is_trainable` is not an argument for the adapter in"):
        load_trained(load_clip(), tmp_path / "lora", is_trainable=True)
    assert load_trained(load_clip(), tmp_path, subfolder="lora").class_names == CLASS_NAMES


def test_a_damaged_note_is_named(tmp_path, load_clip):
    note = {"method": "magic", "base_model": "x", "class_names": ["a"], "config": {}}
    (tmp_path / "reference.json").write_text(json.dumps(note))
    with pytest.raises(ValueError, match=r"reference\.json.*magic"):
        load_trained(load_clip(), tmp_path)
    (tmp_path / "reference.json").write_text('{"method": "lora"}')
    with pytest.raises(ValueError, match="lacks base_model, class_names, config"):
        load_trained(load_clip(), tmp_path)


@pytest.mark.parametrize("method", REFERENCES)
def test_references_without_their_weights_are_named(method, load_clip, tmp_path):
    make_classifier(method, load_clip(), CLASS_NAMES).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors: it was not written to the end"):
        load_trained(load_clip(), tmp_path)


def test_an_adapter_that_is_loaded_for_use_is_not_trained_in_silence(adapt, tmp_path):
    adapt(METHODS["maple"]).save_pretrained(tmp_path)
    model = load_trained(CLIPModel.from_pretrained(base_and_revision(tmp_path)[0]), tmp_path)
    rows = Dataset.from_dict({"label": [0]}, features=Features({"label": ClassLabel(names=CLASS_NAMES)}))
    with pytest.raises(ValueError, match="is_trainable=True"):
        train(model, SimpleNamespace(dataset=rows), TrainingConfig(), Accelerator(cpu=True), tmp_path / "run")


def test_the_zero_shot_head_follows_every_change_of_the_tower(load_clip):
    model = make_classifier("zero-shot", load_clip(), CLASS_NAMES).eval()
    with torch.inference_mode():
        before = model(pixels(model.get_base_model())).logits
    with torch.no_grad():
        model.get_base_model().text_model.final_layer_norm.bias.add_(torch.randn(32))
        assert not torch.allclose(model(pixels(model.get_base_model())).logits, before)


def test_a_change_of_the_config_counts_at_once(adapt):
    model = adapt(METHODS["tgpt"])
    before = model(pixels(model))
    assert change_config(model, {"wise_ft": "0.25"}) == {"wise_ft": "0.0"}
    expected = torch.lerp(before.head_logits, before.zero_shot_logits, 0.25)
    assert torch.equal(model(pixels(model)).logits, expected)
    with pytest.raises(ValueError, match="'num_content_queries' is not a field of TGPTConfig that may change"):
        change_config(model, {"num_content_queries": "5"})
    with pytest.raises(ValueError, match="`wise_ft`='much': choose a value of type float"):
        change_config(model, {"wise_ft": "much"})
    with pytest.raises(ValueError, match="`wise_ft`=2"):
        change_config(model, {"wise_ft": "2"})
    with pytest.raises(ValueError, match="has a config to change"):
        change_config(torch.nn.Identity(), {"wise_ft": "0"})


def test_lora_is_never_read_from_a_pickle(load_clip, tmp_path):
    make_classifier("lora", load_clip(), CLASS_NAMES).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin, a pickle, which may run code"):
        load_trained(load_clip(), tmp_path)
