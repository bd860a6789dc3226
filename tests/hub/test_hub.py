"""Pushing and fetching adapters with the real client over real HTTP, against a Hub on the loopback interface."""

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import traceback

import pytest
import torch
from conftest import CLASS_NAMES, GOLDEN, METHODS, Failed, ImageProcessor, close_session, make_classifier, pixels, shake
from hub_server import Repository
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import CLIPModel

from hf_tgpt import (
    CoOpConfig,
    HubError,
    MaPLeConfig,
    load_adapter,
    load_base_model,
    load_clip,
    load_trained,
    push_folder,
)
from hf_tgpt.adapters.folder import HEAD_WEIGHTS
from hf_tgpt.adapters.peft_towers import NOTE
from hf_tgpt.cli import evaluate
from hf_tgpt.hub.client import FILES, PLOTS, RUN_FILES
from hf_tgpt.hub.push import check_repository

RESULTS = {"dataset": "me/birds", "shots": 16, "seed": 0, "zero_shot_accuracy": 0.5, "accuracy": 0.75}


@pytest.fixture
def run(adapt, tmp_path):
    """A run's folder: an adapter with results, a picture, a log and things that are nobody else's business."""
    folder = tmp_path / "run"
    model = adapt(METHODS["maple"])
    model.save_pretrained(folder)
    (folder / "results.json").write_text(json.dumps(RESULTS))
    for name in PLOTS:
        (folder / name).write_bytes(b"a picture")
    (folder / "training_log.jsonl").write_text('{"step": 1}\n')
    (folder / "seen_pictures.txt").write_text("0123456789abcdef\ttrain\n")
    (folder / "calibration.json").write_text('{"temperature": 2.0, "probabilities": {"cat": [0.5]}}')
    (folder / "run.json").write_text('{"cache_dir": "/home/me/secret"}')
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "adapter.safetensors").write_bytes(b"0" * 10)
    model.save_pretrained(folder)
    return folder


def test_what_is_pushed_comes_back_equal(method, adapt, load_clip, hub, tmp_path):
    model = adapt(method)
    address = model.push_to_hub("me/cats")
    assert address.oid in address
    assert hub.repositories["me/cats"].files()["README.md"].count(b"Written by hf-tgpt") == 1
    again = PeftModel.from_pretrained(load_clip(), "me/cats")
    assert torch.equal(again(pixels(model)).logits, model(pixels(model)).logits)
    assert again.class_names == CLASS_NAMES
    constants.HF_HUB_OFFLINE = True  # the fixture puts it back
    close_session()
    offline = load_adapter(load_clip(), "me/cats") if method.open else load_trained(load_clip(), "me/cats")
    assert torch.equal(offline(pixels(model)).logits, model(pixels(model)).logits)


@pytest.mark.parametrize("name", ["lora", "two_stage"])
def test_what_is_trained_with_pefts_own_adapters_comes_back_equal(name, load_clip, hub, tmp_path):
    torch.manual_seed(1)
    model = make_classifier(name, load_clip(), CLASS_NAMES, tokenizer_name_or_path=str(GOLDEN / "clip")).eval()
    shake(model)
    model.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text(json.dumps(RESULTS))
    with pytest.raises(ValueError, match="upload the tokenizer to the Hub"):
        push_folder(tmp_path / "run", "me/cats")
    note = json.loads((tmp_path / "run" / NOTE).read_text())
    note["config"]["tokenizer_name_or_path"] = None
    (tmp_path / "run" / NOTE).write_text(json.dumps(note))
    push_folder(tmp_path / "run", "me/cats")
    push_folder(tmp_path / "run", "me/cats")
    files = hub.repositories["me/cats"].files()
    assert not [file for file, content in files.items() if str(load_clip().name_or_path).encode() in content]
    card = ModelCard(files["README.md"].decode())
    assert 'load_trained(clip, "me/cats")' in card.text
    assert {"hf-tgpt", name} <= set(card.data.tags)
    again = load_trained(load_clip(), "me/cats")
    assert torch.equal(again(pixels(load_clip())).logits, model(pixels(load_clip())).logits)
    push_folder(run_of(METHODS["coop"], load_clip, tmp_path / "coop"), "me/cats")
    assert not {NOTE, HEAD_WEIGHTS} & set(hub.repositories["me/cats"].files())


def run_of(method, load_clip, folder):
    get_peft_model(load_clip(), method.config()).save_pretrained(folder)
    return folder


def test_a_run_is_published_in_one_commit_and_names_nothing_of_this_machine(run, hub, tmp_path):
    push_folder(run, "me/birds")
    commits = [path for command, path in hub.requests if "/commit/" in path]
    assert len(commits) == 1
    files = hub.repositories["me/birds"].files()
    assert set(files) == {".gitattributes", *FILES}
    for name, content in files.items():
        assert str(tmp_path.parent).encode() not in content, name
        assert b"secret" not in content
    card = ModelCard(files["README.md"].decode())
    assert card.data.datasets == ["me/birds"]
    assert 'load_adapter(clip, "me/birds")' in card.text
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None


def test_a_model_brings_the_results_of_the_run_it_comes_from(run, load_clip, hub):
    model = load_adapter(load_clip(), run)
    model.push_to_hub("me/birds")
    assert set(RUN_FILES) <= set(hub.repositories["me/birds"].files())
    with torch.no_grad():
        model.learner.text_prompts[0].add_(1)  # no longer what those results are of
    model.push_to_hub("me/birds")
    files = hub.repositories["me/birds"].files()
    assert not set(RUN_FILES) & set(files)
    assert "Results" not in files["README.md"].decode()


def test_an_adapter_under_another_name_is_published_alone(adapt, load_clip, hub):
    model = adapt(METHODS["maple"])
    torch.manual_seed(5)
    model.add_adapter("other", METHODS["maple"].config())
    model.set_adapter("other")
    model.push_to_hub("me/other")
    again = load_adapter(load_clip(), "me/other")
    assert torch.equal(again(pixels(model)).logits, model.eval()(pixels(model)).logits)


def test_private_repositories_need_a_token(run, load_clip, hub, monkeypatch):
    push_folder(run, "me/secret", private=True)
    assert hub.repositories["me/secret"].private
    assert load_adapter(load_clip(), "me/secret").class_names == CLASS_NAMES
    with pytest.raises(HubError, match=r"the repository does not exist \(404\), or the token has no access to it"):
        load_adapter(load_clip(), "me/secret", token="hf_stranger", cache_dir=run / "cache")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="not yours to see; log in again"):
        load_adapter(load_clip(), "me/secret", token=False, cache_dir=run / "cache")


def test_what_was_to_be_private_is_not_published_openly(run, hub):
    hub.repositories["me/open"] = Repository()
    with pytest.raises(HubError, match="exists and is public"):
        push_folder(run, "me/open", private=True)
    assert set(hub.repositories["me/open"].files()) == {".gitattributes"}


def test_revisions_are_kept_apart(adapt, load_clip, hub):
    first, second = (adapt(METHODS["maple"], seed=seed) for seed in (1, 2))
    address = first.push_to_hub("me/cats")
    second.push_to_hub("me/cats", revision="v2")
    for revision, model in ((None, first), ("main", first), ("v2", second), (address.oid, first)):
        for load in (load_adapter, PeftModel.from_pretrained):
            again = load(load_clip(), "me/cats", revision=revision)
            assert torch.equal(again(pixels(model)).logits, model(pixels(model)).logits)
    with pytest.raises(HubError, match=r"me/cats \(no folder here\) has no such revision"):
        load_adapter(load_clip(), "me/cats", revision="v3")


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_wrong", "me/birds", r"does not accept the token \(401\).*`hf auth login`"),
        ("hf_reader", "me/birds", "has only read access; make one with write permission"),
        ("hf_stranger", "me/birds", r"may not write there \(403\)"),
        ("", "me/birds", "There is no token for the Hub; log in with `hf auth login`"),
    ],
)
def test_a_wrong_token_says_what_to_do_and_is_never_told(
    token, repo_id, message, run, hub, monkeypatch, caplog, capfd, tmp_path
):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    caplog.set_level(logging.DEBUG)
    with pytest.raises(HubError, match=message) as error:
        push_folder(run, repo_id)
    assert not hub.repositories
    told = "".join(traceback.format_exception(error.value)) + caplog.text + "".join(capfd.readouterr())
    if token:
        assert token not in told


def test_the_token_is_written_nowhere(run, hub, caplog, capfd, tmp_path):
    caplog.set_level(logging.DEBUG)
    push_folder(run, "me/birds", token="hf_writer")
    written = [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_writer" in path.read_bytes()]
    assert not written
    assert not [name for name, content in hub.repositories["me/birds"].files().items() if b"hf_writer" in content]
    assert "hf_writer" not in caplog.text + "".join(capfd.readouterr())


def test_a_repository_with_other_content_is_left_alone(run, hub):
    for files in (
        {"model.safetensors": b"1", "config.json": b"{}"},
        {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b""},
        {"adapter_config.json": b"no json"},
        {"adapter_config.json": b'{"peft_type": ["MAPLE"]}'},
    ):
        hub.repositories["me/gpt"] = Repository(files=files)
        with pytest.raises(
            HubError, match=r"contains something other than an adapter of hf-tgpt .*choose another name"
        ):
            push_folder(run, "me/gpt")
        assert hub.repositories["me/gpt"].files() == files


def test_tags_go_on_the_card(run, adapt, hub):
    push_folder(run, "me/birds", tags=["ornithology"])
    assert "ornithology" in ModelCard(hub.repositories["me/birds"].files()["README.md"].decode()).data.tags
    adapt(METHODS["coop"]).push_to_hub("me/cats", tags=["cats"], max_shard_size="5GB")  # as PEFT's own takes them
    tags = ModelCard(hub.repositories["me/cats"].files()["README.md"].decode()).data.tags
    assert "cats" in tags
    assert len(tags) > 1


def test_a_card_that_somebody_wrote_there_stays(run, hub):
    hub.repositories["me/birds"] = Repository(files={"README.md": b"---\nlicense: mit\n---\n# My birds\n"})
    push_folder(run, "me/birds")
    files = hub.repositories["me/birds"].files()
    assert files["README.md"].endswith(b"# My birds\n")
    assert "adapter_model.safetensors" in files


@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        ("/commit/", None, "the connection to the Hub broke off .*; check it and repeat, which does no harm"),
        ("/commit/", 503, r"the Hub has a problem of its own \(503\); repeat later"),
        ("/commit/", 401, r"does not accept the token \(401\)"),
        ("/commit/", 429, r"too many requests \(429\)"),
        ("/api/models/me/birds", 404, r"the repository does not exist \(404\)"),
        ("/api/repos/create", 500, r"a problem of its own \(500\)"),
        ("/api/whoami-v2", None, "broke off"),
    ],
)
def test_a_push_that_fails_publishes_nothing_and_succeeds_when_repeated(part, status, message, run, hub):
    hub.fail(part, status)
    with pytest.raises(HubError, match=message):
        push_folder(run, "me/birds")
    if "me/birds" in hub.repositories:
        assert set(hub.repositories["me/birds"].files()) == {".gitattributes"}
    push_folder(run, "me/birds")
    assert set(FILES) <= set(hub.repositories["me/birds"].files())


def test_a_replacement_that_breaks_off_leaves_the_former_adapter_whole(run, adapt, load_clip, hub):
    push_folder(run, "me/birds")
    before = hub.repositories["me/birds"].files()
    hub.fail("/commit/")
    with pytest.raises(HubError, match="broke off"):
        adapt(METHODS["tgpt"]).push_to_hub("me/birds")
    assert hub.repositories["me/birds"].files() == before
    adapt(METHODS["tgpt"]).push_to_hub("me/birds")
    assert load_adapter(load_clip(), "me/birds").peft_config["default"].method == "TGPT"
    assert not set(RUN_FILES) & set(hub.repositories["me/birds"].files())


def test_pushing_the_same_again_changes_nothing(run, hub):
    push_folder(run, "me/birds")
    before = dict(hub.repositories["me/birds"].branches)
    push_folder(run, "me/birds")
    assert hub.repositories["me/birds"].branches == before


def test_offline_is_said(run, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for ask in (lambda: push_folder(run, "me/birds"), lambda: load_trained(None, "me/nowhere")):
        with pytest.raises(HubError, match="unset HF_HUB_OFFLINE"):
            ask()


def test_a_tokenizer_that_others_do_not_have_is_named(run, hub):
    config = json.loads((run / "adapter_config.json").read_text()) | {"tokenizer_name_or_path": str(run)}
    (run / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is a local folder; upload the tokenizer to the Hub"):
        push_folder(run, "me/birds")
    assert set(hub.repositories["me/birds"].files()) == {".gitattributes"}


def test_a_folder_without_an_adapter_is_not_pushed(run, hub, tmp_path):
    (run / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="not written to the end"):
        push_folder(run, "me/birds")
    assert not hub.requests


def test_the_base_models_commit_is_noted_and_found_again(clip_folders, hub, tmp_path):
    hub.add_folder("tiny/clip", clip_folders["plain"])
    first = hub.repositories["tiny/clip"].branches["main"]
    clip = load_clip("tiny/clip")
    model = get_peft_model(clip, MaPLeConfig(class_names=CLASS_NAMES, prompt_depth=2)).eval()
    model.push_to_hub("me/cats")
    config = json.loads(hub.repositories["me/cats"].files()["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny/clip", first)
    card = ModelCard(hub.repositories["me/cats"].files()["README.md"].decode())
    assert card.data.base_model == "tiny/clip"
    # The base model moves on.
    torch.manual_seed(7)
    CLIPModel(clip.config).save_pretrained(tmp_path / "next")
    weights = (tmp_path / "next" / "model.safetensors").read_bytes()
    hub.repositories["tiny/clip"].commit("main", hub.repositories["tiny/clip"].files() | {"model.safetensors": weights})
    again = load_adapter(load_base_model("me/cats", revision="main", token="hf_writer"), "me/cats")
    assert torch.equal(again(pixels(model)).logits, model(pixels(model)).logits)
    with pytest.warns(UserWarning, match=f"trained on a CLIP with other weights, tiny/clip at {first}"):
        load_adapter(load_clip("tiny/clip"), "me/cats")


def test_an_adapter_is_evaluated_on_the_base_models_commit(clip_folders, hub, tmp_path, capsys):
    base = shutil.copytree(clip_folders["plain"], tmp_path / "base")
    ImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(base)
    hub.add_folder("tiny/clip", base)
    get_peft_model(load_clip("tiny/clip"), CoOpConfig(class_names=CLASS_NAMES)).eval().push_to_hub("me/cats")
    torch.manual_seed(7)
    CLIPModel(load_clip("tiny/clip").config).save_pretrained(tmp_path / "next")
    weights = (tmp_path / "next" / "model.safetensors").read_bytes()
    hub.repositories["tiny/clip"].commit("main", hub.repositories["tiny/clip"].files() | {"model.safetensors": weights})
    for label, name in enumerate(CLASS_NAMES):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 40), (60 * i, 50 * label, 0)).save(tmp_path / "pictures" / name / f"{i}.png")
    # Other weights would be warned of, and warnings are errors.
    evaluate.main(["--adapter", "me/cats", "--dataset", str(tmp_path / "pictures")])
    assert "me/cats on" in capsys.readouterr().out
    with pytest.raises(HubError, match="has no such revision"):
        evaluate.main(["--adapter", "me/cats", "--revision", "older", "--dataset", str(tmp_path / "pictures")])


def test_licences_of_base_and_data_are_told_where_their_cards_tell_them(adapt, run, hub):
    hub.repositories["tiny/clip"] = Repository(files={"README.md": b"---\nlicense: mit\n---\n"})
    config = json.loads((run / "adapter_config.json").read_text()) | {"base_model_name_or_path": "tiny/clip"}
    (run / "adapter_config.json").write_text(json.dumps(config))
    push_folder(run, "me/birds")
    card = hub.repositories["me/birds"].files()["README.md"].decode()
    assert "data apply: mit for the base model." in card


def test_files_that_are_not_the_adapters_are_never_fetched(adapt, run, load_clip, hub, tmp_path):
    push_folder(run, "me/birds")
    files = hub.repositories["me/birds"].files()
    strange = {"../../evil.txt": b"x", "..%2Fevil.txt": b"x", "adapter_model.bin": b"x", "sub/evil.py": b"x"}
    hub.repositories["me/birds"].commit("main", files | strange)
    load_adapter(load_clip(), "me/birds")
    assert not [path for _, path in hub.requests if "evil" in path or path.endswith(".bin")]
    assert not list(tmp_path.rglob("*evil*"))


def test_the_repository_is_made_before_a_training(hub):
    assert check_repository("birds", private=True) == "me/birds"
    assert hub.repositories["me/birds"].private
    assert check_repository("me/birds", private=True) == "me/birds"


def test_peft_pushes_its_own_adapters_as_ever(load_clip, hub):
    get_peft_model(load_clip(), LoraConfig(target_modules=["q_proj"])).push_to_hub("me/lora")
    assert "adapter_model.safetensors" in hub.repositories["me/lora"].files()


def test_training_asks_for_token_and_repository_before_it_starts(hub, run_command, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(Failed, match="does not accept the token"):
        run_command("train", "--method", "coop", "--push_to_hub", "me/codes", "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_trained_adapter_is_published_and_its_cards_example_runs_elsewhere(hub, run_command, tmp_path):
    for split, name, colour in itertools.product(("train", "test"), ("red", "blue"), (200, 220)):
        (tmp_path / "pictures" / split / name).mkdir(parents=True, exist_ok=True)
        colour += 5 * (split == "test")
        pixel = (colour, 20, 20) if name == "red" else (20, 20, colour)
        Image.new("RGB", (64, 64), pixel).save(tmp_path / "pictures" / split / name / f"{colour}.png")
    arguments = ("--dataset", tmp_path / "pictures", "--shots", 2, "--batch_size", 2, "--max_steps", 2)
    where = ("--model", "toy", "--output_dir", tmp_path / "run", "--push_to_hub", "me/colours", "--private")
    run_command("train", "--method", "coop", *arguments, *where)
    repository = hub.repositories["me/colours"]
    assert repository.private
    # The data have no validation split, and nobody has asked where it looks.
    assert set(FILES) - {"calibration.json", "attention.png"} <= set(repository.files())
    config = json.loads(repository.files()["adapter_config.json"])
    assert config["base_model_name_or_path"] == "hf-tgpt-toy-clip"
    assert (config["trained_on"]["dataset"], config["trained_on"]["shots"]) == ("a local folder", 2)
    assert not [name for name, content in repository.files().items() if str(tmp_path).encode() in content]
    assert len(repository.files()["training_log.jsonl"].splitlines()) >= 1
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (90, 70), (200, 20, 20)).save(elsewhere / "picture.jpg")
    card = repository.files()["README.md"].decode()
    example = card[card.index("```python\n") + 10 :]
    example = example[: example.index("```")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(elsewhere / "home"), "HF_TOKEN": "hf_writer"}
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().strip("[]'") in config["class_names"]
