"""The model card: ours instead of PEFT's empty form, without unknown facts, and never over somebody's own words."""

import json
import shutil

import pytest
from conftest import METHODS, ROOT
from hub_server import metadata_errors
from huggingface_hub import ModelCard
from peft import PeftConfig

from hf_tgpt.evaluation.calibration import Calibration
from hf_tgpt.hub.card import write_card

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
    for unknown in ("None", "More Information Needed", "undefined", " nan"):
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


def test_results_of_unknown_data_are_no_metrics(tmp_path):
    results = {name: value for name, value in RESULTS.items() if name != "dataset"}
    write_card(tmp_path, METHODS["tgpt"].config(), results)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None
    assert "None" not in card.text


def test_what_is_known_of_a_run_is_told_and_the_rest_left_out(tmp_path):
    config = METHODS["tgpt"].config(base_model_name_or_path="openai/clip-vit-base-patch16", revision="0123abc")
    write_card(tmp_path, config)
    text = (tmp_path / "README.md").read_text()
    for unknown in ("recipe", "seed", "Results", "| data |", "model-index", "training.png", "None", "nan", "toy"):
        assert unknown not in text
    assert 'load_clip(base_model, revision="0123abc")' in text
    recipe = {"optimizer": "sgd", "learning_rate": 0.0035, "batch_size": 4, "epochs": 5, "warmup_steps": 0}
    known = {
        "dataset": "oxford_pets:/home/me/pets",
        "dataset_title": "OxfordPets",
        "dataset_id": "timm/oxford-iiit-pet",
    }
    (tmp_path / "training.png").touch()
    (tmp_path / "attention.png").touch()
    calibration = Calibration(0.8, {"cat": [0.5, 0.6]}, None, pictures="80 validation pictures", weights="")
    calibration.save(tmp_path)
    write_card(tmp_path, config, RESULTS | known | {"recipe": recipe, "data_licence": "CC BY-SA 4.0"}, "me/pets", "mit")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ["timm/oxford-iiit-pet"]
    for words in (
        "| data | OxfordPets |",
        "| recipe | sgd, learning rate 0.0035, batches of 4, 5 epochs |",
        "The licences of the base model and of the data apply: mit for the base model, CC BY-SA 4.0 for the data.",
        "commit 0123abc |",
        "](training.png)",
        "![where the adapter looks](attention.png)",
        "| calibrated on | 80 validation pictures, temperature 0.80 |",
        'load_adapter(clip, "me/pets")',
    ):
        assert words in card.text
    assert "/home/me" not in card.content


def test_an_adapter_alone_still_tells_what_it_was_trained_on(adapt, tmp_path):
    model = adapt(METHODS["maple"])
    model.peft_config["default"].trained_on = {"dataset": "a local folder", "shots": 16, "seed": 3}
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| data | a local folder |" in text
    assert "| seed | 3 |" in text
    assert "Results" not in text


CARDS = sorted((ROOT / "model_cards").glob("*/"))


def test_every_method_that_learns_prompts_has_a_card():
    prompts = {name for name, row in METHODS.items() if row.config_class.kind == "prompt-learning"}
    assert {folder.name for folder in CARDS} == prompts


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
class TestStoredCards:
    def test_are_what_the_package_writes(self, folder, tmp_path):
        for file in folder.iterdir():
            if file.name != "README.md":
                shutil.copy(file, tmp_path)
        results = json.loads((tmp_path / "results.json").read_text())
        write_card(tmp_path, PeftConfig.from_pretrained(tmp_path), results)
        assert (tmp_path / "README.md").read_text() == (folder / "README.md").read_text()

    def test_have_metadata_that_the_hub_takes(self, folder):
        card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)  # reads model-index back
        assert metadata_errors(card.content) == []
        assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "image-classification")
        assert {"hf-tgpt", folder.name} <= set(card.data.tags)
        (accuracy,) = [result for result in card.data.eval_results if result.metric_name == "Accuracy"]
        results = json.loads((folder / "results.json").read_text())
        assert accuracy.metric_value == round(results["accuracy"], 4)
        assert accuracy.dataset_name == "toyworld:codes"

    def test_are_of_the_documented_command(self, folder):
        results = json.loads((folder / "results.json").read_text())
        recipe = json.loads((ROOT / f"hf_tgpt/recipes/toy_{folder.name}.json").read_text())
        assert {name: recipe[name] for name in results["recipe"] if name in recipe}.items() <= results["recipe"].items()
        assert (results["method"], results["shots"], results["seed"]) == (folder.name, 16, 0)


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
