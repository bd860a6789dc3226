"""Folders in which version 0.1.0 kept zero-shot and linear probes still load and answer as they did."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASS_NAMES, pixels, pooled, token_ids
from safetensors.torch import save_file

from hf_tgpt import load_base_model, load_classifier, load_trained
from hf_tgpt.encoders.walk import unit
from hf_tgpt.hub.run import base_and_revision

TEMPLATES = ["a photo of a {}.", "{} texture."]
ZERO_SHOT = {"templates": TEMPLATES, "tokenizer_name_or_path": None}


def write_note(folder, clip, method, **changes):
    """`reference.json` as version 0.1.0 wrote it."""
    config = ZERO_SHOT if method == "zero-shot" else {}
    note = {"method": method, "base_model": clip.name_or_path, "class_names": CLASS_NAMES, "config": config}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reference.json").write_text(json.dumps(note | changes, indent=2) + "\n")


def write_probe(folder, clip):
    """A linear probe's folder, and its weights."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(len(CLASS_NAMES), clip.config.projection_dim, generator=generator)
    weights = {"weight": weight, "bias": torch.randn(len(CLASS_NAMES), generator=generator)}
    write_note(folder, clip, "linear-probe")
    save_file(weights, folder / "linear_probe.safetensors")
    return weights


def image_features(clip, batch):
    with torch.no_grad():
        return unit(pooled(clip.get_image_features(batch)))


def test_an_old_linear_probe_answers_as_it_did(load_clip, tmp_path):
    clip = load_clip()
    weights = write_probe(tmp_path, clip)
    expected = F.linear(clip.logit_scale.exp() * image_features(clip, pixels(clip)), **weights)
    model = load_trained(load_clip(), tmp_path)
    assert not model.training
    assert model.class_names == CLASS_NAMES
    assert not model.takes_new_classes
    with torch.no_grad():
        torch.testing.assert_close(model(pixels(clip)).logits, expected)


def test_an_old_zero_shot_answers_as_it_did(load_clip, tmp_path):
    clip = load_clip()
    write_note(tmp_path, clip, "zero-shot")
    heads = []
    for template in TEMPLATES:
        ids = token_ids(clip, [template.replace("{}", name) for name in CLASS_NAMES])
        with torch.no_grad():
            heads.append(unit(pooled(clip.get_text_features(ids))))
    expected = clip.logit_scale.exp() * image_features(clip, pixels(clip)) @ unit(torch.stack(heads).mean(0)).T
    model = load_trained(load_clip(), tmp_path)
    assert model.class_names == CLASS_NAMES
    assert model.takes_new_classes
    with torch.no_grad():
        torch.testing.assert_close(model(pixels(clip)).logits, expected)


@pytest.mark.parametrize("method", ["zero-shot", "linear-probe"])
def test_an_old_folder_tells_its_base_model_and_is_saved_anew_as_an_adapter(method, load_clip, tmp_path):
    clip, old, new = load_clip(), tmp_path / "old", tmp_path / "new"
    write_probe(old, clip) if method == "linear-probe" else write_note(old, clip, method)
    assert base_and_revision(old) == (clip.name_or_path, None)
    assert load_classifier(old).class_names == CLASS_NAMES
    model = load_trained(load_base_model(old), old)
    model.save_pretrained(new)
    assert sorted(file.name for file in new.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with torch.no_grad():
        again = load_trained(load_base_model(new), new)(pixels(clip)).logits
        assert torch.equal(again, model(pixels(clip)).logits)


def test_an_old_probe_without_its_weights_is_named(load_clip, tmp_path):
    write_note(tmp_path, load_clip(), "linear-probe")
    with pytest.raises(ValueError, match="cannot be used"):
        load_trained(load_clip(), tmp_path)


def test_an_old_probe_of_other_classes_is_named(load_clip, tmp_path):
    write_probe(tmp_path, load_clip())
    write_note(tmp_path, load_clip(), "linear-probe", class_names=["cat", "dog"])
    with pytest.raises(ValueError, match="cannot be used"):
        load_trained(load_clip(), tmp_path)


@pytest.mark.parametrize("method", ["maple", "magic"])
def test_a_note_of_a_method_that_never_had_one_is_named(method, load_clip, tmp_path):
    """Such a folder holds no weights of it; what was loaded would answer at random."""
    write_note(tmp_path, load_clip(), method)
    with pytest.raises(ValueError, match=rf"reference\.json.*`method`='{method}'"):
        load_trained(load_clip(), tmp_path)
