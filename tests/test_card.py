"""The model card: ours instead of PEFT's empty form, without unknown facts, and never over somebody's own words."""

import pytest
from conftest import METHODS
from huggingface_hub import ModelCard

from hf_tgpt.card import write_card

RESULTS = {
    "method": "tgpt",
    "dataset": "me/birds",
    "shots": 16,
    "seed": 0,
    "zero_shot_accuracy": 0.5,
    "accuracy": 0.75,
    "wise_ft_accuracy": 0.7512,
    "trainable_parameters": 1234567,
}


def test_saving_leaves_our_card(method, adapt, tmp_path):
    adapt(method).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "image-classification"
    assert method.config().method.lower() in card.data.tags
    assert "bibtex" in card.text
    for unknown in ("None", "More Information Needed", "undefined", "nan"):
        assert unknown not in card.text
    assert str(tmp_path.parent) not in card.content  # the base model's folder means nothing to anybody else


def test_a_card_that_somebody_wrote_stays(adapt, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# My birds\n")
    adapt(METHODS["maple"]).save_pretrained(tmp_path)
    assert "# My birds" in (tmp_path / "README.md").read_text()


def test_results_become_metrics_that_the_hub_displays(tmp_path):
    config = METHODS["tgpt"].config()
    config.base_model_name_or_path = "openai/clip-vit-base-patch16"
    write_card(tmp_path, config, RESULTS)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "openai/clip-vit-base-patch16"
    assert card.data.datasets == ["me/birds"]
    measured = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert measured == {
        "Accuracy": 0.75,
        "Accuracy with WiSE-FT": 0.7512,
        "Zero-shot accuracy of the base model": 0.5,
    }
    for words in ("| this adapter | 0.750 |", "1,234,567", "| images per class | 16 |"):
        assert words in card.text
    assert "toy" not in card.text
    table = card.text[card.text.index("| method |") : card.text.index("## Results")].strip()
    assert all(line.startswith("| ") for line in table.splitlines())  # a blank line would end the table


def test_a_toy_is_called_a_toy(tmp_path):
    write_card(tmp_path, METHODS["tgpt"].config(), RESULTS | {"toy": True, "dataset": "toyworld:codes"})
    assert "**This is a toy.**" in (tmp_path / "README.md").read_text()


def test_saving_again_renews_our_card(adapt, tmp_path):
    model = adapt(METHODS["maple"])
    for _ in range(2):
        model.save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.tags == ["hf-tgpt", "maple", "clip", "prompt-learning", "few-shot"]
        assert str(tmp_path.parent) not in card.content
    adapt(METHODS["tgpt"]).save_pretrained(tmp_path)
    assert "# TGPT adapter" in (tmp_path / "README.md").read_text()


def test_a_local_folder_is_not_told(tmp_path):
    write_card(tmp_path, METHODS["tgpt"].config(), RESULTS | {"dataset": str(tmp_path)})
    text = (tmp_path / "README.md").read_text()
    assert str(tmp_path) not in text
    assert "| data | a local folder |" in text


@pytest.mark.parametrize("count", [3, 150])
def test_long_class_lists_are_cut(tmp_path, count):
    write_card(tmp_path, METHODS["maple"].config(class_names=[f"bird {i}" for i in range(count)]))
    assert ("and 50 more" in (tmp_path / "README.md").read_text()) == (count == 150)
