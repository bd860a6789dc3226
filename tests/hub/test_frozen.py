"""Adapters that earlier versions saved, also with other versions of the libraries, are read forever, and what later
versions add does not stop this one.
"""

import json
import shutil

import pytest
import torch
from conftest import GOLDEN, TESTS
from frozen.make import CLASS_NAMES, FIELDS, pictures
from peft import PeftModel
from transformers import CLIPModel

from hf_tgpt import available_methods, load_adapter

FOLDERS = sorted((TESTS / "frozen").glob("*/*/"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def folder(request):
    return request.param


def check(model, folder):
    with torch.no_grad():
        logits = model(pictures()).logits
    torch.testing.assert_close(
        logits, torch.tensor(json.loads((folder / "logits.json").read_text())), atol=5e-4, rtol=0
    )


def clip():
    return CLIPModel.from_pretrained(GOLDEN / "clip")


def test_every_method_is_there():
    without_weights_of_ours = {"zero_shot", "lora", "two_stage"}
    assert {folder.name for folder in FOLDERS} == set(FIELDS) == set(available_methods()) - without_weights_of_ours


def test_a_frozen_adapter_gives_the_logits_it_gave(folder):
    model = load_adapter(clip(), folder)
    assert model.class_names == CLASS_NAMES
    check(model, folder)


def test_a_frozen_adapter_tells_what_it_is(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["hf_tgpt_version"] == folder.parent.name.partition("-")[0]
    assert config["peft_type"] == folder.name.upper()
    assert config["base_model_dimensions"]["image_size"] == 32
    assert config["base_model_name_or_path"] == "golden/clip"
    assert config["trained_on"] == {"dataset": "me/birds", "shots": 16, "seed": 0}
    assert "revision" in config
    assert len(config["base_model_fingerprint"]) == 16


def test_an_adapter_from_before_the_notes_loads(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    for name in ("base_model_fingerprint", "trained_on", "hf_tgpt_version", "revision"):
        del config[name]
    (copy / "adapter_config.json").write_text(json.dumps(config))
    check(load_adapter(clip(), copy), folder)


def test_a_field_of_a_later_version_is_left_out_with_a_warning(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text()) | {"of_the_future": 1}
    (copy / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="of_the_future"):
        model = PeftModel.from_pretrained(clip(), copy)
    check(model, folder)
