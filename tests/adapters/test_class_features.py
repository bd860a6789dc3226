"""Class features on disk are those that would be encoded, and are used for nothing but what they were written for."""

import json
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import torch
from conftest import CLASS_NAMES, METHODS, make_classifier, pixels, shake
from PIL import Image as PILImage
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hf_tgpt
from hf_tgpt.adapters.folder import CLASS_FEATURES
from hf_tgpt.encoders.base import DualEncoder
from hf_tgpt.hub.push import push_folder

NONE = ["cocoop", "mutual_prompt", "linear_probe", "zs_lp", "clap"]
SOME = [*(name for name in METHODS if name not in NONE), "zero_shot", "lora", "two_stage"]
OTHERS = ["dog", "tree"]


@pytest.fixture
def towers(monkeypatch):
    """One entry for each time that the text tower has been through its layers."""
    calls, leave = [], DualEncoder.leave_text
    monkeypatch.setattr(DualEncoder, "leave_text", lambda *args: calls.append(1) or leave(*args))
    return calls


@pytest.fixture
def saved(load_clip, tmp_path):
    """saved("coop") -> the folder of a trained adapter with its class features, and whether there are some."""

    def save(name, folder="run", **fields):
        torch.manual_seed(1)
        fields = (METHODS[name].fields if name in METHODS else {}) | fields
        model = make_classifier(name, load_clip(), CLASS_NAMES, **fields).eval()
        shake(model)
        model.eval().save_pretrained(tmp_path / folder)
        return tmp_path / folder, hf_tgpt.save_class_features(model, tmp_path / folder)

    return save


def answer(classifier, class_names=None):
    """Logits of the classes, by default the adapter's own."""
    with torch.inference_mode():
        return classifier.among(class_names or classifier.class_names)(pixels(classifier.model.get_base_model())).logits


def without(folder):
    """A copy of an adapter without class features."""
    shutil.copytree(folder, folder.with_name("without"), dirs_exist_ok=True)
    (folder.with_name("without") / CLASS_FEATURES).unlink(missing_ok=True)
    return folder.with_name("without")


@pytest.mark.parametrize("name", SOME)
def test_stored_features_answer_bit_for_bit_without_the_text_tower(name, saved, towers):
    folder, stored = saved(name)
    assert stored
    towers.clear()
    logits = answer(hf_tgpt.load_classifier(folder))
    assert len(towers) == (2 if name == "tgpt" else 0)  # its prompts, which are the picture's
    assert torch.equal(logits, answer(hf_tgpt.load_classifier(without(folder))))
    assert len(towers) > 2 * (name == "tgpt")


@pytest.mark.parametrize("name", NONE)
def test_methods_without_texts_or_with_texts_of_a_picture_store_none(name, saved, towers):
    folder, stored = saved(name)
    assert not stored
    assert not (folder / CLASS_FEATURES).exists()
    towers.clear()
    answer(hf_tgpt.load_classifier(folder))
    assert bool(towers) == METHODS[name].conditioned


def test_a_second_stage_answers_without_texts(saved, load_clip, towers):
    folder, _ = saved("two_stage")
    model = hf_tgpt.load_classifier(folder).model
    model.learner.begin_stage(None, 0)
    with torch.no_grad():
        model.learner.head.normal_()
        model.learner.head_is_set.fill_(True)
    model.save_pretrained(folder)
    towers.clear()
    classifier = hf_tgpt.load_classifier(folder)
    logits = answer(classifier)
    assert not towers
    with_a_stranger = answer(classifier, [*CLASS_NAMES, "dog"])
    torch.testing.assert_close(with_a_stranger[:, : len(CLASS_NAMES)], logits)


def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def change_tensors(file, name):
    tensors = load_file(file)
    key = next(key for key in tensors if name in key)
    tensors[key] = tensors[key] + 0.5
    save_file(tensors, file, {"format": "pt"})


def swap_words(tokenizer):
    words = tokenizer["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]


CONFIG = "adapter_config.json"
CHANGES = {
    "adapter weights": lambda run, base: change_tensors(run / "adapter_model.safetensors", "tokens"),
    "a class name": lambda run, base: change_json(run / CONFIG, lambda c: c["class_names"].__setitem__(0, "dog")),
    "a template": lambda run, base: change_json(run / CONFIG, lambda c: c.update(templates=["a red {}."])),
    "base weights": lambda run, base: change_tensors(base / "model.safetensors", "text_model.encoder.layers.1.mlp"),
    "the text tower's settings": lambda run, base: change_json(
        base / "config.json", lambda c: c["text_config"].update(layer_norm_eps=0.5)
    ),
    "the tokenizer": lambda run, base: change_json(base / "tokenizer.json", swap_words),
}


@pytest.mark.parametrize("what", [*CHANGES, "the precision"])
def test_whatever_they_depend_on_changes_they_are_encoded_afresh(what, saved, clip_folders, tmp_path, towers):
    folder, _ = saved("mmrl")
    base = tmp_path / "base"
    shutil.copytree(clip_folders["plain"], base)
    options = {"base_model": base, "dtype": "bf16" if what == "the precision" else "fp32"}
    before = answer(hf_tgpt.load_classifier(folder))
    CHANGES.get(what, lambda run, base: None)(folder, base)
    towers.clear()
    with warnings.catch_warnings(record=True) as told:
        after = answer(hf_tgpt.load_classifier(folder, **options))
    assert not [warning for warning in told if CLASS_FEATURES in str(warning.message)]
    assert towers
    assert torch.equal(after, answer(hf_tgpt.load_classifier(without(folder), **options)))
    assert not torch.equal(after, before)


def test_a_lora_of_another_scale_uses_none(saved, towers):
    folder, _ = saved("lora")
    change_json(folder / "reference.json", lambda note: note["config"].update(lora_alpha=64))
    towers.clear()
    answer(hf_tgpt.load_classifier(folder))
    assert towers


@pytest.mark.parametrize("weight", ["text_prompts", "final_layer_norm.weight"])
def test_a_change_in_memory_is_noticed(weight, saved, towers):
    classifier = hf_tgpt.load_classifier(saved("coop")[0])
    before = answer(classifier)
    with torch.no_grad():
        next(value for name, value in classifier.model.named_parameters() if name.endswith(weight)).add_(0.5)
    towers.clear()
    after = answer(classifier)
    assert towers
    assert not torch.equal(after, before)
    classifier.model.set_class_names(OTHERS)
    assert answer(classifier, OTHERS).shape[1] == 2


def rewrite(file, features, name="class_features"):
    with safe_open(file, framework="pt") as old:
        metadata = old.metadata()
    save_file({name: features}, file, metadata)


DAMAGES = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-5]),
    "a flipped bit": lambda file: file.write_bytes((content := file.read_bytes())[:-1] + bytes([content[-1] ^ 1])),
    "no safetensors": lambda file: file.write_bytes(b"PK\x03\x04 a pickle"),
    "not finite": lambda file: rewrite(file, torch.full((4, 32), torch.nan)),
    "another shape": lambda file: rewrite(file, torch.ones(5, 32)),
    "another width": lambda file: rewrite(file, torch.ones(4, 33)),
    "another type": lambda file: rewrite(file, torch.ones(4, 32, dtype=torch.float64)),
    "another name": lambda file: rewrite(file, torch.ones(4, 32), "features"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_named_and_passed_over(how, saved):
    folder, _ = saved("coop")
    DAMAGES[how](folder / CLASS_FEATURES)
    with pytest.warns(UserWarning, match=rf"{CLASS_FEATURES}' is damaged") as told:
        logits = answer(hf_tgpt.load_classifier(folder))
    assert len([warning for warning in told if CLASS_FEATURES in str(warning.message)]) == 1
    assert torch.equal(logits, answer(hf_tgpt.load_classifier(without(folder))))


def contents(folder):
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}


def test_questions_write_nothing_and_one_list_does_not_answer_for_another(saved, run_command, tmp_path):
    folder, _ = saved("coop")
    PILImage.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / "cat.png")
    bare = without(folder)
    stored, alone = hf_tgpt.load_classifier(folder), hf_tgpt.load_classifier(bare)
    before = contents(folder), contents(bare)
    lists = [CLASS_NAMES, CLASS_NAMES[::-1], OTHERS] * 3
    found = {}
    threads = [
        threading.Thread(target=lambda i, names: found.__setitem__(i, answer(stored, names)), args=pair)
        for pair in enumerate(lists)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], answer(alone, names)) for i, names in enumerate(lists))
    for place in (folder, bare):
        run_command("predict", place, tmp_path / "cat.png")
    assert (contents(folder), contents(bare)) == before


def test_training_stores_them_and_a_pulled_adapter_uses_them(pictures, run_command, hub, tmp_path, towers):
    few = ("--shots", 2, "--batch_size", 2, "--max_steps", 2, "--no_report")
    where = ("--model", "toy", "--output_dir", tmp_path / "run", "--push_to_hub", "me/fruit")
    run_command("train", "--method", "coop", "--dataset", pictures, *few, *where)
    assert hub.repositories["me/fruit"].files()[CLASS_FEATURES] == (tmp_path / "run" / CLASS_FEATURES).read_bytes()
    expected = answer(hf_tgpt.load_classifier(tmp_path / "run"))
    towers.clear()
    assert torch.equal(answer(hf_tgpt.load_classifier("me/fruit")), expected)
    assert not towers
    change_json(tmp_path / "run" / CONFIG, lambda config: config["class_names"].reverse())
    push_folder(tmp_path / "run", "me/fruit")
    assert CLASS_FEATURES not in hub.repositories["me/fruit"].files()


def test_adapters_are_switched_without_the_text_tower(saved, load_clip, towers):
    folder, _ = saved("coop")
    model = hf_tgpt.load_adapter(load_clip(), folder, adapter_name="0")
    for name in "12":
        model.load_adapter(folder, name)
    with torch.no_grad():
        for name in "012":
            model.set_adapter(name)
            model.learner.text_prompts.add_(0.1 * int(name))
        expected = {}
        for name in "012":
            model.set_adapter(name)
            expected[name] = model(pixels(model)).logits
        towers.clear()
        for name in "0120":
            model.set_adapter(name)
            assert torch.equal(model(pixels(model)).logits, expected[name])
            with model.disable_adapter():
                pass
    assert not towers
    assert not torch.equal(expected["0"], expected["2"])


def test_a_model_that_is_not_saved_there_or_in_training_is_refused(adapt, tmp_path):
    model = adapt(METHODS["coop"])
    with pytest.raises(ValueError, match="There is no adapter in"):
        hf_tgpt.save_class_features(model, tmp_path)
    with pytest.raises(ValueError, match="in training mode"):
        hf_tgpt.save_class_features(model.train(), tmp_path)
    with model.disable_adapter(), pytest.raises(ValueError, match="no active adapter"):
        hf_tgpt.save_class_features(model.eval(), Path(tmp_path))
