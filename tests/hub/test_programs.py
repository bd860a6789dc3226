"""Adapters that run on the Hub: the handler of an Inference Endpoint, a Space, and `hf-tgpt push`."""

import base64
import importlib.util
import io
import json
import re
import runpy

import pytest
import torch
from conftest import CLASS_NAMES, METHODS, ROOT, Failed, ImageProcessor, make_classifier, make_clip, shake
from hub_server import Repository
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from PIL import Image

import hf_tgpt
from hf_tgpt import HubError, push_folder
from hf_tgpt.cli.main import parse
from hf_tgpt.hub.programs import GRADIO, endpoint_files
from hf_tgpt.hub.space import push_space

PICTURE = Image.linear_gradient("L").resize((40, 50)).convert("RGB")


def png(picture=PICTURE):
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


@pytest.fixture
def run(tmp_path):
    """An adapter on the toy CLIP, which the package has wherever it is installed."""
    torch.manual_seed(1)
    model = make_classifier("maple", hf_tgpt.load_clip(hf_tgpt.TOY_CLIP), CLASS_NAMES, prompt_depth=2).eval()
    shake(model)
    model.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text('{"cache_dir": "/home/me/secret"}')
    return tmp_path / "run"


def repository(hub, name, folder):
    """The files of a repository in a folder."""
    for path, content in hub.repositories[name].files().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


# Inference Endpoints -------------------------------------------------------------------------------------------------


@pytest.fixture
def handler(run, tmp_path):
    """The handler as the Hub's toolkit finds it, without the network."""
    for name, text in endpoint_files().items():
        (run / name).write_text(text)
    spec = importlib.util.spec_from_file_location("custom_handler", run / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(run))


def test_the_handler_answers_pictures_in_each_form_as_the_classifier_does(handler, run):
    classifier = hf_tgpt.load_classifier(run)
    text = base64.b64encode(png()).decode()
    for inputs in (PICTURE, png(), text, f"data:image/png;base64,{text}"):
        assert handler({"inputs": inputs}) == classifier(PICTURE)
    parameters = {"top_k": 1, "candidate_labels": ["red circle", "a cat"]}
    expected = classifier(PICTURE, top_k=1, class_names=["red circle", "a cat"])
    (first, second) = handler({"inputs": [text, png()], "parameters": parameters})
    assert json.dumps(first) == json.dumps(second)
    assert first[0]["label"] == expected[0]["label"]
    assert first[0]["score"] == pytest.approx(expected[0]["score"], abs=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "`inputs` is missing"),
        (
            {"inputs": "https://example.org/cat.png"},
            "`inputs` cannot be read: it is an address, and nothing is fetched",
        ),
        ({"inputs": ["/etc/passwd"]}, r"`inputs\[0\]` cannot be read: it is not base64"),
        ({"inputs": b"no picture"}, "not a picture of a known kind"),
        ({"inputs": png(), "parameters": {"topk": 1}}, "has 'topk'; known are top_k, class_names"),
        ({"inputs": png(), "parameters": {"coverage": 0.9}}, "`coverage`=0.9 needs a calibrated adapter"),
    ],
)
def test_the_handler_names_what_is_wrong(data, message, handler):
    with pytest.raises(ValueError, match=message):
        handler(data)


def test_an_endpoints_files_are_pushed_if_asked_for(run, hub):
    push_folder(run, "me/cats")
    assert not {"handler.py", "requirements.txt"} & set(hub.repositories["me/cats"].files())
    push_folder(run, "me/cats", endpoint=True, package="https://example.org/hf_tgpt.whl")
    files = hub.repositories["me/cats"].files()
    assert files["requirements.txt"] == b"https://example.org/hf_tgpt.whl\n"
    assert b"EndpointHandler" in files["handler.py"]


# Spaces --------------------------------------------------------------------------------------------------------------


def test_a_space_holds_the_adapter_and_starts_the_demo_with_it(run, hub, tmp_path, monkeypatch):
    push_space(run, "me/my-page", private=True)
    assert hub.repositories["spaces/me/my-page"].private
    assert len([path for command, path in hub.requests if "/commit/" in path]) == 1
    folder = repository(hub, "spaces/me/my-page", tmp_path / "space")
    assert not [path for path in folder.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
    data = SpaceCard.load(folder / "README.md").data
    assert (data.sdk, data.app_file, data.sdk_version) == ("gradio", "app.py", GRADIO)
    (requirement,) = map(Requirement, (folder / "requirements.txt").read_text().split())
    assert (requirement.name, requirement.extras) == ("hf-tgpt", {"demo"})
    monkeypatch.chdir(folder)
    started = []
    monkeypatch.setattr("hf_tgpt.cli.main.main", lambda words: started.append(parse(words)) or 0)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path("app.py", run_name="__main__")
    assert (started[0].command, started[0].host, started[0].port) == ("demo", "0.0.0.0", 7860)
    assert hf_tgpt.load_classifier(started[0].adapter)(PICTURE) == hf_tgpt.load_classifier(run)(PICTURE)
    push_space(run, "me/my-page")  # again


def test_a_space_takes_the_gradio_that_the_page_needs():
    text = (ROOT / "pyproject.toml").read_text()
    assert f"{re.search(r'gradio>=([0-9.]+)', text)[1]}.0" == GRADIO


def test_a_space_of_another_kind_is_left_alone(run, hub):
    hub.repositories["spaces/me/chat"] = Repository(files={"app.py": b"import chat"})
    with pytest.raises(HubError, match="is a Space of another kind; choose another name"):
        push_space(run, "me/chat")
    assert set(hub.repositories["spaces/me/chat"].files()) == {"app.py"}


def test_what_the_hub_could_not_load_is_refused_before_anything_is_made(hub, tmp_path):
    base = make_clip("plain", tmp_path / "base")
    ImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(base)
    make_classifier("coop", hf_tgpt.load_clip(base), CLASS_NAMES, **METHODS["coop"].fields).save_pretrained(
        tmp_path / "r"
    )
    for push in (push_space, lambda *place: push_folder(*place, endpoint=True)):
        with pytest.raises(ValueError, match="is no model on the Hub, so nothing there can load it; upload it"):
            push(tmp_path / "r", "me/cats")
    assert not hub.repositories


# The command ---------------------------------------------------------------------------------------------------------


def test_push_publishes_and_prints_the_address(run, hub, run_command):
    assert run_command("push", run, "me/cats", "--endpoint", "--private").strip().endswith("/me/cats")
    assert hub.repositories["me/cats"].private
    assert "handler.py" in hub.repositories["me/cats"].files()
    address = json.loads(run_command("push", run, "me/page", "--space", "--json"))
    assert address["url"].endswith("/spaces/me/page")
    assert address["commit"] in hub.repositories["spaces/me/page"].commits
    with pytest.raises(Failed, match="--package is what --space or --endpoint installs"):
        run_command("push", run, "me/cats", "--package", "x")
    with pytest.raises(Failed, match="--revision is for models"):
        run_command("push", run, "me/page", "--space", "--revision", "v2")
