"""Zero-shot CLIP, the linear probe and LoRA answer like an adapted CLIP, and come back from disk as they were."""

import subprocess
import sys

import pytest
import torch
from conftest import CLASS_NAMES, METHODS, pixels, shake
from peft import PeftModel
from transformers import AutoTokenizer

from hf_tgpt import load_trained
from hf_tgpt.checkpoint import trained_weights
from hf_tgpt.loading import base_model_of, change_config, make_classifier
from hf_tgpt.references import REFERENCES

LABELS = torch.tensor([0, 3, 1])


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
    model = make_classifier("zero-shot", clip, CLASS_NAMES).eval()
    torch.testing.assert_close(model(pixels(clip)).logits, sentence_logits(clip, CLASS_NAMES, pixels(clip)))
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
    after = {name.replace(".base_layer", ""): value for name, value in model.base.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_saved_reference_comes_back(reference, load_clip, tmp_path):
    clip = load_clip()
    model = make_classifier(reference, clip, CLASS_NAMES).eval()
    shake(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    again = load_trained(load_clip(), tmp_path)
    assert base_model_of(tmp_path) == clip.name_or_path
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
            torch.testing.assert_close(model(pixels(clip)).logits, sentence_logits(model.base, names, pixels(clip)))
    else:
        with pytest.raises(ValueError, match="knows the classes it was trained on"):
            model.set_class_names(names)


def test_references_refuse_what_methods_refuse(reference, load_clip):
    with pytest.raises(ValueError, match="twice"):
        make_classifier(reference, load_clip(), ["cat", "Cat"])
    with pytest.raises(ValueError, match="`labels` holds 7"):
        make_classifier(reference, load_clip(), CLASS_NAMES)(pixels(load_clip()), torch.tensor([0, 7, 1]))


def test_bad_templates_are_named(load_clip):
    with pytest.raises(ValueError, match="`templates`"):
        make_classifier("lora", load_clip(), CLASS_NAMES, templates=["a photo"])


def test_a_damaged_note_is_named(tmp_path, load_clip):
    (tmp_path / "reference.json").write_text('{"method": "magic"}')
    with pytest.raises(ValueError, match=r"reference\.json.*magic"):
        load_trained(load_clip(), tmp_path)


def test_a_change_of_the_config_counts_at_once(adapt):
    model = adapt(METHODS["tgpt"])
    before = model(pixels(model))
    change_config(model, {"wise_ft": "0.25"})
    expected = torch.lerp(before.head_logits, before.zero_shot_logits, 0.25)
    assert torch.equal(model(pixels(model)).logits, expected)
    with pytest.raises(ValueError, match="'wise' is no field of TGPTConfig"):
        change_config(model, {"wise": "0.5"})
    with pytest.raises(ValueError, match="`wise_ft`=2"):
        change_config(model, {"wise_ft": "2"})
    with pytest.raises(ValueError, match="has a config to change"):
        change_config(torch.nn.Identity(), {"wise_ft": "0"})


def test_the_package_alone_loads_no_library_for_data_and_metrics():
    """Who serves an adapter needs none of them, and a script of one's own may well be called evaluate.py."""
    code = "import sys, hf_tgpt; assert not {'evaluate', 'datasets', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
