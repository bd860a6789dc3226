"""What Python and notebooks show of the package: its names, their right spelling, and its objects."""

import importlib
import traceback

import pytest
from conftest import CLASS_NAMES, METHODS, make_classifier
from peft import LoraConfig, PeftModel, get_peft_model

import hf_tgpt
from hf_tgpt import Classifier, LoRAConfig, MaPLeConfig, load_classifier
from hf_tgpt.data import ImageTransform
from hf_tgpt.training import TrainingConfig

NEAR = {
    "MapleConfig": "MaPLeConfig",
    "CoopConfig": "CoOpConfig",
    "linear_probe_config": "LinearProbeConfig",
    "load_adaptor": "load_adapter",
    "toy_clip": "TOY_CLIP",
    "inferense": "inference",
}


@pytest.mark.parametrize(("wrong", "right"), NEAR.items())
def test_a_misspelled_name_is_answered_by_the_right_one(wrong, right):
    with pytest.raises(AttributeError, match=rf"no attribute '{wrong}'; did you mean {right}\?$") as by_attribute:
        getattr(hf_tgpt, wrong)
    assert "".join(traceback.format_exception(by_attribute.value)).count("ean") == 1  # Python adds no second one
    with pytest.raises(ImportError, match=rf"cannot import name '{wrong}': .*; did you mean {right}\?$"):
        exec(f"from hf_tgpt import {wrong}")
    assert not hasattr(hf_tgpt, wrong)


def test_a_name_like_no_other_is_refused_in_pythons_words():
    with pytest.raises(AttributeError, match=r"module 'hf_tgpt' has no attribute 'spam'$"):
        hf_tgpt.spam  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'spam' from 'hf_tgpt'"):
        exec("from hf_tgpt import spam")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'hf_tgpt\.spam'"):
        importlib.import_module("hf_tgpt.spam")


def test_dir_lists_public_names_alone():
    assert [name for name in dir(hf_tgpt) if name.startswith("_")] == ["__version__"]


@pytest.fixture
def shown(load_clip):
    """shown(method, names) -> the adapted model, and what a notebook shows of it."""

    def show(name, class_names=CLASS_NAMES):
        fields = METHODS[name].fields if name in METHODS else {}
        model = make_classifier(name, load_clip(), class_names, **fields).eval()
        return model, model._repr_html_()

    return show


@pytest.mark.parametrize(("name", "new"), [("maple", "yes"), ("linear_probe", "no"), ("lora", "yes")])
def test_a_notebook_shows_an_adapters_method_classes_and_size(name, new, shown):
    model, html = shown(name)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert f">{trained:,}</td>" in html
    assert f"<caption>{name.upper()} adapter</caption>" in html
    assert f">{len(CLASS_NAMES)}: {CLASS_NAMES[0]}, " in html
    assert f"<th>new classes</th><td style='text-align: left'>{new}</td>" in html
    classifier = Classifier(model, ImageTransform(32, (0.5,) * 3, (0.5,) * 3, train=False))
    assert classifier._repr_html_() == html


def test_a_notebook_shows_names_as_text_and_of_many_the_first(shown):
    names = ["<b>cat</b>", "dog & co", *(f"class {i}" for i in range(40))]
    html = shown("zero_shot", names)[1]
    assert "42: &lt;b&gt;cat&lt;/b&gt;, dog &amp; co, class 0" in html
    assert ", class 7, ...</td>" in html
    assert "&lt;b&gt;cat&lt;/b&gt;" in MaPLeConfig(class_names=names)._repr_html_()


@pytest.mark.parametrize("method", ["coop", "lora"])
def test_a_notebook_shows_the_results_of_a_trained_adapter(method, run_command, pictures, tmp_path):
    few = ["--dataset", pictures, "--model", "toy", "--method", method, "--max_steps", "1", "--shots", "1"]
    few += ["--batch_size", "2"]
    run_command("train", *few, "--output_dir", tmp_path / "run")
    html = load_classifier(tmp_path / "run")._repr_html_()
    assert f"<th>tested on</th><td style='text-align: left'>{pictures}</td>" in html
    assert html.count("accuracy</th>") == 2
    (tmp_path / "run" / "results.json").write_text("[]")
    assert "accuracy" not in load_classifier(tmp_path / "run")._repr_html_()


def test_pefts_own_adapters_and_plain_models_are_shown_as_ever(load_clip, shown):
    lora = get_peft_model(load_clip(), LoraConfig(target_modules=["q_proj"]))
    assert isinstance(lora, PeftModel)
    assert not hasattr(lora, "_repr_html_")
    model, _ = shown("maple")
    with model.disable_adapter():
        assert not hasattr(model, "_repr_html_")


def test_a_config_is_shown_by_the_fields_that_differ_from_the_defaults():
    config = MaPLeConfig(class_names=["cat", "dog"], prompt_length=3)
    assert config._repr_html_().count("<tr>") == 2
    assert "<th>prompt_length</th><td style='text-align: left'>3</td>" in config._repr_html_()
    assert "<caption>TrainingConfig</caption>" in TrainingConfig(seed=3)._repr_html_()
    assert "lora_alpha" in LoRAConfig(class_names=["cat"], lora_alpha=2)._repr_html_()


def test_printing_a_model_names_its_classes(shown):
    model, _ = shown("maple")
    assert f"4 classes: '{CLASS_NAMES[0]}'" in str(model)
