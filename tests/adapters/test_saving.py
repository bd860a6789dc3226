"""What is saved loads again, elsewhere too, or is refused before anything is written."""

import os
import shutil

import pytest
from conftest import CLASS_NAMES
from peft import PeftConfig, PeftModel, get_peft_model

from hf_tgpt import CoOpConfig, load_clip


@pytest.fixture
def model(load_clip):
    return get_peft_model(load_clip(), CoOpConfig(class_names=CLASS_NAMES)).eval()


def test_a_pickle_is_refused_when_it_is_saved(model, tmp_path):
    with pytest.raises(ValueError, match="`safe_serialization`=False would write a pickle"):
        model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("change", [lambda names: names.append(names[0]), lambda names: names.append(7), list.clear])
def test_a_class_list_that_was_spoilt_is_refused_when_it_is_saved(model, change, tmp_path):
    change(model.peft_config["default"].class_names)
    with pytest.raises(ValueError, match="`class_names"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_base_model_in_a_relative_folder_is_found_from_elsewhere(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model.get_base_model().name_or_path, "my-clip")
    adapted = get_peft_model(load_clip("my-clip"), CoOpConfig(class_names=CLASS_NAMES))
    adapted.save_pretrained("adapter")
    monkeypatch.chdir(os.path.abspath(os.sep))
    name = PeftConfig.from_pretrained(str(tmp_path / "adapter")).base_model_name_or_path
    assert name == str(tmp_path / "my-clip")
    PeftModel.from_pretrained(load_clip(name), str(tmp_path / "adapter"))


def test_the_labels_are_those_of_the_adapter_from_the_start(model):
    assert list(model.get_base_model().config.id2label.values()) == CLASS_NAMES
    assert model.get_model_status().peft_types == {"default": "COOP"}
