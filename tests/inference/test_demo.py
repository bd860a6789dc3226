"""The web page of `hf-tgpt demo`: the answer it shows, the server behind it, and the page in a browser."""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, METHODS, ImageProcessor, make_classifier, make_clip, many_names, shake
from PIL import Image, ImageDraw

import hf_tgpt
from hf_tgpt.cli import demo as command
from hf_tgpt.cli.main import main
from hf_tgpt.data import DataWarning, ImageTransform, load_splits
from hf_tgpt.inference.classifier import Classifier
from hf_tgpt.inference.confusions import PredictedAs, read_predictions
from hf_tgpt.inference.demo import Demonstration
from hf_tgpt.inference.examples import Examples
from hf_tgpt.inference.explain import attention_pictures
from hf_tgpt.training.run_folder import write_seen_pictures
from hf_tgpt.utils.files import write_json

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
PROCESSOR = ImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture
def classifier(load_clip):
    def make(name, class_names=CLASS_NAMES):
        torch.manual_seed(1)
        fields = METHODS[name].fields if name in METHODS else {}
        model = make_classifier(name, load_clip(), class_names, **fields).eval()
        shake(model)
        return Classifier(model, ImageTransform.from_processor(PROCESSOR, train=False))

    return make


@pytest.fixture
def drop(tmp_path):
    """drop(picture) -> what the page hands over for it."""

    def save(picture, name="picture.png", **options):
        picture.save(tmp_path / name, **options)
        return {"path": str(tmp_path / name), "orig_name": name}

    return save


def lines(names=CLASS_NAMES):
    return "\n".join(names)


def shown(html):
    """[(class, adapter's percentage, zero-shot's), ...] as a reader sees them."""
    rows = re.findall(r'class="name">([^<]*)<.*?<span>([\d.]+) %.*?<span>([\d.]+) %', html, re.DOTALL)
    return [(name, float(adapted), float(zero_shot)) for name, adapted, zero_shot in rows]


# The answer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hf_tgpt.available_methods())
def test_beside_every_method_stands_its_base_model_alone(name, classifier):
    asked = classifier(name)
    before, alone = asked(PICTURE), {part["label"]: part["score"] for part in classifier("zero_shot")(PICTURE)}
    scores = Demonstration(asked).compare(PICTURE, CLASS_NAMES)
    assert [(score.label, score.adapted) for score in scores] == [(part["label"], part["score"]) for part in before]
    assert {score.label: score.zero_shot for score in scores} == pytest.approx(alone, abs=1e-6)
    assert (name == "zero_shot") == (max(abs(score.adapted - score.zero_shot) for score in scores) == 0)
    assert asked(PICTURE) == before


def test_zero_shot_reads_the_templates_that_the_adapter_was_trained_with(load_clip, classifier, drop):
    templates = ["a drawing of a {}.", "a {}."]
    model = make_classifier("tgpt", load_clip(), CLASS_NAMES, **METHODS["tgpt"].fields, templates=templates).eval()
    alone = make_classifier("zero_shot", load_clip(), CLASS_NAMES, templates=templates).eval()
    transform = ImageTransform.from_processor(PROCESSOR, train=False)
    demonstration = Demonstration(Classifier(model, transform))
    expected = {part["label"]: part["score"] for part in Classifier(alone, transform)(PICTURE)}
    assert {s.label: s.zero_shot for s in demonstration.compare(PICTURE, CLASS_NAMES)} == expected
    assert "“a drawing of a {}.” and 1 more for each class" in demonstration.answer(drop(PICTURE), lines())


def test_of_many_classes_the_ten_likeliest_are_shown_and_zero_shots_first(classifier, monkeypatch):
    names = many_names(30)
    demonstration = Demonstration(classifier("maple", names))
    beside = {part["label"]: part["score"] for part in demonstration.zero_shot(PICTURE, top_k=None)}
    rows = demonstration.adapted(PICTURE, top_k=None)
    firsts = set()
    for first in (rows[4], rows[20]):
        forced = [{"label": first["label"], "score": 1.0}] + [
            {"label": name, "score": 0.0} for name in beside if name != first["label"]
        ]
        monkeypatch.setattr(demonstration.zero_shot, "stream", lambda *_, said=forced, **__: iter([(PICTURE, said)]))
        scores = demonstration.compare(PICTURE, names)
        assert [score.label for score in scores[:10]] == [row["label"] for row in rows[:10]]
        firsts.add((len(scores), scores[-1].label == first["label"]))
    assert firsts == {(10, False), (11, True)}


def test_an_answer_shows_percentages_and_pictures(classifier, drop):
    asked = classifier("maple")
    demonstration = Demonstration(asked)
    html = demonstration.answer(drop(PICTURE), lines())
    scores = demonstration.compare(PICTURE, CLASS_NAMES)
    assert shown(html) == [(s.label, round(100 * s.adapted, 1), round(100 * s.zero_shot, 1)) for s in scores]
    assert "adapter (maple)" in html
    assert html.count('src="data:image/png;base64,') == 2
    assert "Shown are" not in html


def test_open_methods_take_an_edited_list_and_come_back_from_it(classifier, drop):
    demonstration, picture = Demonstration(classifier("maple")), drop(PICTURE)
    before = demonstration.answer(picture, lines())
    html = demonstration.answer(picture, "  forest \n\nzebra crossing\n")
    assert {name for name, _, _ in shown(html)} == {"forest", "zebra crossing"}
    expected = {
        part["label"]: part["score"] for part in classifier("maple")(PICTURE, class_names=["forest", "zebra crossing"])
    }
    assert {name: adapted for name, adapted, _ in shown(html)} == pytest.approx(
        {name: 100 * score for name, score in expected.items()}, abs=0.051
    )
    demonstration.answer(picture, "forest\nforest")
    assert demonstration.answer(picture, lines()) == before


@pytest.mark.parametrize("name", ["tgpt", "linear_probe"])
def test_closed_methods_refuse_other_classes(name, classifier, drop):
    demonstration = Demonstration(classifier(name))
    html = demonstration.answer(drop(PICTURE), "cat\nzebra")
    assert "but not &#39;zebra&#39;" in html
    assert 'role="alert"' in html
    assert not shown(html)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("", "The class list is empty; write a class on each line."),
        (" \n \n", "The class list is empty"),
        ("cat\nforest\nCat", "holds &#39;Cat&#39; twice"),
        (lines(map(str, range(1001))), "The list has 1001 classes and this page takes 1000"),
        ("cat\n" + "forest " * 50, "forest"),  # longer than the text tower reads
    ],
)
def test_a_bad_class_list_is_said_on_the_page(classes, message, classifier, drop):
    html = Demonstration(classifier("maple")).answer(drop(PICTURE), classes)
    assert 'role="alert"' in html
    assert message in html
    assert not shown(html)


def test_no_picture_asks_for_one_and_what_is_none_is_named(classifier, tmp_path):
    demonstration = Demonstration(classifier("maple"))
    assert "Drop a picture" in demonstration.answer(None, lines())
    (tmp_path / "notes.png").write_text("no picture")
    html = demonstration.answer({"path": str(tmp_path / "notes.png"), "orig_name": "notes.png"}, lines())
    assert "notes.png cannot be read as a picture; drop another one." in html
    assert str(tmp_path) not in html
    assert "This file cannot be read" in demonstration.answer({"path": None, "url": "data:,"}, lines())


@pytest.mark.parametrize("kind", ["CMYK", "RGBA", "P", "L", "I;16", "upright"])
def test_pictures_of_every_mode_are_taken_as_prediction_takes_them(kind, classifier, drop):
    options, name = {}, "picture.png"
    if kind == "upright":
        exif = Image.Exif()
        exif[274] = 6  # turned by a quarter
        picture, options, name = PICTURE, {"exif": exif, "quality": 95}, "picture.jpg"
    elif kind == "I;16":
        picture = Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50) * 30)
    else:
        picture, name = PICTURE.convert(kind), "picture.tif" if kind == "CMYK" else name
    dropped, asked = drop(picture, name, **options), classifier("tgpt")
    html = Demonstration(asked).answer(dropped, lines())
    rows = [(part["label"], round(100 * part["score"], 1)) for part in asked(dropped["path"])]
    assert [row[:2] for row in shown(html)] == rows


def test_names_are_text_and_never_markup(classifier, drop):
    html = Demonstration(classifier("coop", ["<script>x</script>", "cat"])).answer(drop(PICTURE), "<b>a</b>\ncat")
    assert "<b>" not in html
    assert "<script>" not in html
    assert "&lt;b&gt;a&lt;/b&gt;" in html


def test_tgpt_shows_its_queries_and_other_methods_the_cls_token(classifier):
    maps = attention_pictures(classifier("tgpt"), PICTURE)
    assert list(maps) == [
        "what the model sees", "where the category queries look", "where the content queries look",
    ]  # fmt: skip
    for name in ("maple", "cocoop", "lora", "linear_probe", "zero_shot"):
        maps = attention_pictures(classifier(name), PICTURE)
        assert list(maps) == ["what the model sees", "where CLS looks in the last layer"]
    assert {picture.size for picture in maps.values()} == {(32, 32)}


def test_the_toy_clip_knows_a_red_circle_on_the_page(drop):
    names = ["blue square", "red circle", "green triangle"]
    clip = hf_tgpt.load_clip(hf_tgpt.TOY_CLIP).eval()
    transform = ImageTransform.from_processor(ImageProcessor.from_pretrained(hf_tgpt.TOY_CLIP), train=False)
    picture = Image.new("RGB", (640, 640), (110, 110, 110))
    ImageDraw.Draw(picture).ellipse((160, 160, 480, 480), fill=(220, 30, 30))
    asked = Classifier(make_classifier("maple", clip, names, prompt_depth=2).eval(), transform)
    (name, adapted, zero_shot), *others = shown(Demonstration(asked).answer(drop(picture), lines(names)))
    assert name == "red circle"
    assert min(adapted, zero_shot) > 90
    assert max(share for _, *shares in others for share in shares) < 10


# What an answer rests on ---------------------------------------------------------------------------------------------


def text_of(html):
    return " ".join(re.sub("<style>.*</style>|<[^>]*>", " ", html, flags=re.DOTALL).split())


def test_beside_an_answer_stands_what_such_answers_were_worth_in_the_test(classifier, drop, tmp_path):
    names = ["cat", "=forest", "red circle"]
    asked = classifier("coop", names)
    best = asked(PICTURE, 1)[0]["label"]
    others = [name for name in names if name != best]
    rows = [(best, best), (best, best), (others[0], best), (best, others[0]), (others[1], others[0])]
    cells = [[name.replace("=", "'=") for name in row] for row in rows]  # as spreadsheets need them
    table = "".join(f"{i}.jpg,{label},{guess},0.5000,true\n" for i, (label, guess) in enumerate(cells))
    file = tmp_path / "predictions.csv"
    file.write_text("file,label,prediction,score,correct\n" + table, encoding="utf-8-sig")
    demonstration = Demonstration(asked, predictions=read_predictions(tmp_path, names))
    says = f"Of 3 test pictures that were taken for {best}, 2 were {best} (precision 67 %), 1 was {others[0]}."
    assert says in text_of(demonstration.answer(drop(PICTURE), lines(names)))
    assert "test picture" not in text_of(demonstration.answer(drop(PICTURE), lines(["cat", "zebra"])))
    assert read_predictions(tmp_path, names)[others[1]] == PredictedAs(0, 0, [], tested=5)

    for broken in ("file,label\na.jpg,cat\n", "", "label,prediction\ncat,zebra\n"):
        file.write_text(broken)
        with pytest.warns(DataWarning, match="is not used"):
            assert read_predictions(tmp_path, names) == {}
    file.unlink()
    assert read_predictions(tmp_path, names) == {}


@pytest.mark.parametrize("name", ["gda", "tgpt", "lora", "maple", "mmrl", "mutual_prompt"])
def test_the_nearest_training_pictures_are_shown_by_class(name, classifier, pictures, drop, tmp_path):
    asked = classifier(name, ["lime", "ripe tomato"])
    asked.model.requires_grad_(False)
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    (folder / "train" / "lime" / "1.jpg").write_bytes(b"no picture")
    with pytest.warns(DataWarning, match="1 picture is passed over: .*1.jpg"):
        examples = Examples(load_splits(folder)["train"], asked, tmp_path / "features")
    assert len(examples) == 9
    image = Image.open(folder / "train" / "lime" / "3.jpg")
    nearest = examples.nearest(image, "lime")
    assert [example.label for example in nearest] == ["lime"] * 3 + ["ripe tomato"]
    assert nearest[0].cosine == pytest.approx(1, abs=1e-5)
    assert [e.cosine for e in nearest[:3]] == sorted((e.cosine for e in nearest[:3]), reverse=True)
    (folder / "train" / "lime" / "3.jpg").unlink()  # after the start
    assert [example.label for example in examples.nearest(image, "lime")] == ["lime"] * 3 + ["ripe tomato"]
    assert [example.label for example in examples.nearest(image, "zebra")] in (["lime"], ["ripe tomato"])

    html = Demonstration(asked, examples).answer(drop(image, "3.jpg"), lines(["lime", "ripe tomato"]))
    assert html.count("data:image/jpeg") == 4
    assert "Nearest training pictures" in html
    assert ".jpg" not in html  # the names of files may be private


def test_of_very_many_pictures_some_of_each_class_are_compared(classifier, pictures, monkeypatch):
    monkeypatch.setattr("hf_tgpt.inference.examples.MOST", 7)
    with pytest.warns(DataWarning, match="Of 10 training pictures 3 of each class are compared"):
        assert len(Examples(load_splits(pictures)["train"], classifier("gda"))) == 6


def test_the_command_finds_the_runs_own_training_pictures(pictures, tmp_path, monkeypatch, capsys):
    base, run, shown = make_clip("plain", tmp_path / "base"), tmp_path / "run", []
    PROCESSOR.save_pretrained(base)
    make_classifier("gda", hf_tgpt.load_clip(base), ["lime", "ripe tomato"], **METHODS["gda"].fields).save_pretrained(
        run
    )
    splits = load_splits(pictures)
    write_seen_pictures(run, {"train": splits["train"].select(range(4)), "test": splits["test"]})
    monkeypatch.setattr(command, "require_gradio", lambda: None)
    monkeypatch.setattr(command, "make_page", lambda demonstration, title: shown.append(demonstration))
    monkeypatch.setattr(command, "serve", lambda page, listener: None)

    def demo(*options):
        status = main(["demo", str(run), "--port", "0", *options])
        return status, capsys.readouterr().err

    assert demo("--examples")[1].endswith("does not record its data set; name one: --examples DATASET.\n")
    write_json(run / "results.json", {"dataset": str(pictures)})
    assert demo("--examples")[0] == 0
    assert (len(shown[-1].examples), shown[-1].examples.described) == (4, "training pictures")
    assert list((run / "features").iterdir())
    assert demo()[0] == 0
    assert shown[-1].examples is None
    other = shutil.copytree(pictures / "test", tmp_path / "other")
    _, error = demo("--examples", str(other))
    assert (len(shown[-1].examples), shown[-1].examples.described) == (8, "labelled pictures")
    assert "so all are examples" in error
    write_json(run / "results.json", {"dataset": str(tmp_path / "gone")})
    _, error = demo("--examples")
    assert error.startswith("hf-tgpt demo: --examples names no data set, and the run's own cannot be read; name it.")
    assert f"--examples='{tmp_path / 'gone'}' does not exist" in error


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "nothing"]) == 1
    assert capsys.readouterr().err == 'hf-tgpt demo: The page needs gradio: pip install "hf-tgpt[demo]".\n'


# The page and its server ---------------------------------------------------------------------------------------------


@pytest.fixture
def serving(tmp_path, tmp_path_factory):
    """serving(name) -> (address, process) of `hf-tgpt demo` on an adapter, on a machine that reaches nothing else.

    A request of the process to another machine would go to the proxy, which must stay alone.
    """
    pytest.importorskip("gradio")
    base = make_clip("plain", tmp_path_factory.mktemp("base"))
    PROCESSOR.save_pretrained(base)
    proxy = socket.create_server(("127.0.0.1", 0))
    proxies = dict.fromkeys(["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"], f"http://127.0.0.1:{proxy.getsockname()[1]}")
    environment = {name: value for name, value in os.environ.items() if name.upper() not in {*proxies, "NO_PROXY"}}
    environment |= proxies | {"GRADIO_TEMP_DIR": str(tmp_path / "dropped")}
    environment.pop("HF_HUB_OFFLINE", None)
    started = []

    def start(name):
        model = make_classifier(name, hf_tgpt.load_clip(base), CLASS_NAMES, **METHODS[name].fields)
        model.save_pretrained(tmp_path / name)
        command = [sys.executable, "-m", "hf_tgpt", "demo", str(tmp_path / name), "--port", "0"]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        address = process.stdout.readline().split()
        assert address, process.communicate(timeout=30)[1]
        return address[0], process

    with proxy:
        yield start
        for process in started:
            process.kill()
            process.communicate()
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


def stop(process, number):
    """The exit status and what stderr tells after a signal."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


def fetch(address, data=None, **headers):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(urllib.request.Request(address, data, headers), timeout=30)


def upload(address, data, name):
    """What the page hands over for a file after it has been sent."""
    body = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    (path,) = json.load(fetch(address + "/gradio_api/upload", body + data + b"\r\n--x--\r\n", **headers))
    return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def ask(address, picture, classes):
    """(kind, data) of the event that ends an answer."""
    call = json.dumps({"data": [picture, classes]}).encode()
    event = json.load(fetch(address + "/gradio_api/call/classify", call, **{"Content-Type": "application/json"}))
    with fetch(f"{address}/gradio_api/call/classify/{event['event_id']}") as stream:
        kind, data = stream.read().decode().strip().splitlines()[-2:]
    return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_the_page_answers_over_http_and_ctrl_c_ends_it_and_takes_its_files_along(serving, tmp_path):
    address, process = serving("tgpt")
    assert fetch(address).status == 200
    config = json.load(fetch(address + "/config"))
    assert (config["title"], config["analytics_enabled"]) == ("tgpt", False)
    (box,) = [part["props"] for part in config["components"] if part["type"] == "textbox"]
    assert (box["label"], box["interactive"], box["value"]) == ("Classes, fixed in training", False, lines())

    file = io.BytesIO()
    PICTURE.save(file, "png")
    picture = upload(address, file.getvalue(), "a.png")
    kind, (html,) = ask(address, picture, lines())
    assert kind == "complete"
    assert {name for name, _, _ in shown(html)} == set(CLASS_NAMES)
    assert "but not &#39;zebra&#39;" in ask(address, picture, "zebra")[1][0]
    notes = upload(address, b"no picture", "notes.png")
    assert "notes.png cannot be read as a picture" in ask(address, notes, lines())[1][0]
    PICTURE.save(tmp_path / "private.png")  # a file of the machine that nobody has dropped
    assert ask(address, picture | {"path": str(tmp_path / "private.png")}, lines())[0] == "error"

    call = json.dumps({"data": [picture, lines()]}).encode()
    with pytest.raises(urllib.error.HTTPError, match="404"):  # past the queue, two could switch one adapter at once
        fetch(address + "/gradio_api/run/classify", call, **{"Content-Type": "application/json"})

    assert [path.name for path in (tmp_path / "dropped").rglob("a.png")] == ["a.png"]
    with fetch(address + "/gradio_api/heartbeat/somebody"):  # what an open page holds
        status, errors = stop(process, signal.SIGINT)
    assert status == 0, errors
    assert "CancelledError" not in errors
    assert not list((tmp_path / "dropped").rglob("*.png"))


def test_a_port_in_use_is_refused_before_anything_is_loaded(capsys):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "no adapter at all", "--port", str(port)]) == 1
    out, err = capsys.readouterr()
    assert err == f"hf-tgpt demo: --port={port} is in use on 127.0.0.1; choose another.\n"
    assert not out
    assert main(["demo", "no adapter at all", "--host", "192.0.2.1", "--port", "0"]) == 1
    assert "cannot listen on --host='192.0.2.1'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "no adapter at all", "--port", "70000"])
    assert "argument --port: 70000: choose 0 to 65535" in capsys.readouterr().err


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


@pytest.fixture
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-quic", *QUIET]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


def test_in_a_browser_the_page_shows_edits_and_explains_and_asks_no_other_machine(serving, browser, tmp_path):
    address, process = serving("coop")
    page, asked, broken = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.on("response", lambda response: response.status >= 400 and broken.append(response.url))
    page.goto(address)
    answer, classes = page.locator(".answer"), page.get_by_label("Any classes, one per line")
    answer.get_by_text("Drop a picture").wait_for()
    assert page.title() == "coop"
    assert classes.input_value() == lines()
    page.get_by_role("button", name="Classify").click()
    answer.get_by_text("Drop a picture").wait_for()

    PICTURE.convert("CMYK").save(tmp_path / "a.jpg")
    page.locator("input[type=file]").set_input_files(tmp_path / "a.jpg")
    answer.locator(".class").first.wait_for()
    assert set(answer.locator(".name").all_inner_texts()) == set(CLASS_NAMES)
    assert answer.locator(".score").count() == 2 * len(CLASS_NAMES)
    best = answer.locator(".class").first.locator(".bar > i.adapter")
    share = float(answer.locator(".class").first.locator(".score > span").first.inner_text().removesuffix(" %"))
    whole = answer.locator(".class").first.locator(".bar").first.bounding_box()["width"]
    assert best.bounding_box()["width"] == pytest.approx(whole * share / 100, abs=2)
    for image in answer.locator(".maps img").all():
        assert image.evaluate("image => image.complete && image.naturalWidth") == 32

    def classify(text):
        classes.fill(text)
        page.get_by_role("button", name="Classify").click()

    classify("forest\n<i>zebra</i>")
    answer.get_by_text("<i>zebra</i>").wait_for()
    assert set(answer.locator(".name").all_inner_texts()) == {"forest", "<i>zebra</i>"}
    for text, problem in (("", "The class list is empty"), ("cat\ncat", "holds 'cat' twice")):
        classify(text)
        answer.get_by_role("alert").get_by_text(problem).wait_for()
        assert answer.locator(".class").count() == 0
    classify("forest\nzebra")
    answer.locator(".class").first.wait_for()
    page.get_by_role("button", name="Remove Image").or_(page.get_by_label("Clear")).first.click()
    answer.get_by_text("Drop a picture").wait_for()
    (tmp_path / "notes.png").write_text("no picture")
    page.locator("input[type=file]").set_input_files(tmp_path / "notes.png")
    answer.get_by_role("alert").get_by_text("notes.png cannot be read as a picture").wait_for()

    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert not broken
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()
    status, errors = stop(process, signal.SIGTERM)
    assert status == -signal.SIGTERM
    assert "Traceback" not in errors
