"""`hf-tgpt serve`: the same answers as a classifier's over HTTP, in shared batches, within limits."""

import asyncio
import base64
import importlib.util
import io
import os
import re
import signal
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, METHODS, ImageProcessor, make_classifier, make_clip, shake
from fastapi.testclient import TestClient
from PIL import Image

import hf_tgpt
from hf_tgpt.cli.main import main
from hf_tgpt.evaluation.calibration import calibrate, settings_of
from hf_tgpt.inference.batching import Batcher
from hf_tgpt.inference.demo import listen
from hf_tgpt.inference.loading import load_classifiers
from hf_tgpt.inference.requests import Limits
from hf_tgpt.inference.server import Service, make_app, serve

SIDE = 32
CAT = "image/png"
# With prompts in both towers, a head alone, new layers in the towers, other weights in them.
KINDS = ["maple", "gda", "lora", "two_stage"]


def picture(seed, size=(40, 50), kind="png"):
    """The bytes of a picture file."""
    noise, file = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


PICTURES = [picture(seed) for seed in range(6)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{method: the folder of an adapter}, all on one base model."""
    root = tmp_path_factory.mktemp("runs")
    base = make_clip("plain", tmp_path_factory.mktemp("base"))
    ImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(base)
    for name in KINDS:
        torch.manual_seed(1)
        fields = METHODS[name].fields if name in METHODS else {}
        model = make_classifier(name, hf_tgpt.load_clip(base).eval(), CLASS_NAMES, **fields).eval()
        shake(model)
        model.save_pretrained(root / name)
    return {name: root / name for name in KINDS}


@pytest.fixture(scope="module")
def classifiers(runs):
    """An open method and a closed one; the latter is calibrated."""
    found = load_classifiers({"open": runs["maple"], "closed": runs["gda"]})
    logits, labels = 2 * torch.eye(4).repeat(30, 1), torch.arange(4).repeat(30)
    labels[:20] = 0
    settings = settings_of(found["closed"].model.learner.config)
    found["closed"].calibration = calibrate(logits, labels, CLASS_NAMES, settings=settings)
    return found


@pytest.fixture
def client(classifiers):
    """client(limit=...) -> a client of a server with these limits; all stop with the test."""
    clients = []

    def start(max_batch=8, max_wait=0.0, **limits):
        service = Service(classifiers, Limits(**limits), max_batch, max_wait)
        made = TestClient(make_app(service), raise_server_exceptions=False)
        clients.append(made.__enter__())
        made.service = service
        return made

    yield start
    for made in clients:
        made.__exit__(None, None, None)


def files(*contents):
    return [("images", (f"{number}.png", content)) for number, content in enumerate(contents)]


def rows(answers):
    """Answers without the last digits of their scores, which the size of a batch may change."""
    return [
        [(guess["label"], guess.get("nearest"), round(guess["score"], 5)) for guess in answer] for answer in answers
    ]


def top(response):
    return rows([row["top_k"] for row in response.json()["results"]])


# Answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("open", {}),
        ("open", {"top_k": 1, "class_names": ["a cat", "red forest", "dog"]}),
        ("closed", {"top_k": 2, "class_names": ["forest", "cat"]}),
        ("closed", {"coverage": 0.8}),
        ("closed", {"reject": True, "top_k": 3}),
    ],
)
def test_every_form_of_request_has_the_answers_of_the_classifier(name, options, client, classifiers):
    expected = rows(classifiers[name](PICTURES[:2], **({"top_k": 5} | options)))
    asked, ask = options | {"model": name}, client().post
    text = [base64.b64encode(PICTURES[0]).decode(), "data:image/png;base64," + base64.encodebytes(PICTURES[1]).decode()]
    assert top(ask("/predict", files=files(*PICTURES[:2]), params=asked)) == expected
    assert top(ask("/predict", files=files(*PICTURES[:2]), data=asked)) == expected
    assert top(ask("/predict", json={"images": text} | asked)) == expected
    both = ask("/predict", data=asked | {"images": text[1]}, files=files(PICTURES[0]))
    assert top(both) == expected[::-1]
    body = ask("/predict", content=PICTURES[0], headers={"Content-Type": "image/png"}, params=asked)
    assert top(body) == expected[:1]
    row = body.json()["results"][0]
    assert (row["label"], round(row["score"], 5)) == (expected[0][0][0], expected[0][0][2])
    assert ("labels" in row) == ("coverage" in options)


def test_requests_at_the_same_time_share_batches_and_each_gets_its_own_answer(client, classifiers):
    ask, lists = client(max_wait=0.3).post, [None, ["forest", "a cat"]]
    kinds = [(seed, top_k, names) for seed in range(6) for top_k in (1, 3) for names in lists]
    with ThreadPoolExecutor(len(kinds)) as threads:
        found = list(
            threads.map(
                lambda kind: ask(
                    "/predict",
                    files=files(PICTURES[kind[0]]),
                    data={"model": "open", "top_k": kind[1]} | ({"class_names": kind[2]} if kind[2] else {}),
                ),
                kinds,
            )
        )
    for (seed, top_k, names), response in zip(kinds, found, strict=True):
        assert top(response) == rows([classifiers["open"](PICTURES[seed], top_k, class_names=names)])
    counts = ask.__self__.get("/metrics").text
    batches = float(re.search(r"hf_tgpt_batch_pictures_count ([\d.]+)", counts)[1])
    assert float(re.search(r"hf_tgpt_batch_pictures_sum ([\d.]+)", counts)[1]) == len(kinds)
    assert batches <= len(kinds) / 2
    assert f'hf_tgpt_requests_total{{status="200"}} {len(kinds)}.0' in counts
    assert "hf_tgpt_queue_pictures 0.0" in counts


def test_a_bad_picture_among_several_is_named_and_the_others_are_answered(client, classifiers):
    ask = client(pixels=3000).post
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
    response = ask("/predict?model=closed", files=files(b"no picture", PICTURES[0], picture(1, (80, 80)), postscript))
    bad, good, large, kind = response.json()["results"]
    assert response.status_code == 200
    assert rows([good["top_k"]]) == rows([classifiers["closed"](PICTURES[0])])
    assert bad["image"] == "0.png"
    assert "not a picture of a known kind; send a JPEG" in bad["error"]
    assert "80 x 80 pixels; make it smaller, of at most 3,000" in large["error"]
    assert "not a picture of a known kind" in kind["error"]
    given = ["https://example.org/cat.png", "file:///etc/passwd", "/etc/passwd", "###", 7, "data:image/png,abc"]
    response = ask("/predict", json={"images": given, "model": "closed"})
    assert response.status_code == 422
    assert "`images` has no picture that can be read (images[0]: it is an address" in response.json()["error"]
    reasons = ["nothing is fetched", "nothing is fetched", "not base64", "not base64", "not a string", "without base64"]
    for place, (row, reason) in enumerate(zip(response.json()["results"], reasons, strict=True)):
        assert row["image"] == f"images[{place}]"
        assert reason in row["error"]


@pytest.mark.parametrize(
    ("request_", "status", "field", "message"),
    [
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "body", "is not JSON"),
        ({"json": []}, 400, "body", "not an object"),
        ({"json": {"images": []}}, 400, "images", "send one or more"),
        ({"json": {"images": 5}}, 422, "images", "is not a list"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "body", "form cannot be read"),
        ({"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415, "Content-Type", "send multipart/form-data"),
        ({"files": files(b"x" * 200_000)}, 413, "body", "larger than 100,000 bytes"),
        ({"content": iter([b"x" * 60_000] * 2), "headers": {"Content-Type": CAT}}, 413, "body", "larger than 100,000"),
        ({"files": files(*[PICTURES[0]] * 4)}, 413, "images", "too many pictures; send at most 2"),
        ({"json": {"images": ["x"] * 3}}, 413, "images", "has 3 pictures; send at most 2"),
        ({"json": {"images": ["x"], "model": "dogs"}}, 422, "model", "'dogs' is not served; name one of open, closed"),
        ({"json": {"images": ["x"]}}, 422, "model", "is not given and several are served"),
        ({"params": {"topk": 3}}, 422, "topk", "did you mean `top_k`?"),
        ({"json": {"image": "x"}}, 422, "image", "did you mean `images`?"),
        ({"params": {"model": "open", "class_names": "ant,dog"}}, 422, "class_names", "repeat it for each"),
        ({"params": {"images": "x"}}, 422, "images", "`images` is unknown; known are model, top_k"),
        ({"params": {"top_k": 0}}, 422, "top_k", "`top_k`='0': input should be greater than or equal to 1"),
        ({"params": {"top_k": [1, 2]}}, 422, "top_k", "is there twice"),
        ({"params": {"model": "open", "coverage": 0.9}}, 422, "coverage", "needs a calibrated adapter"),
        ({"params": {"model": "closed", "coverage": 0.999}}, 422, "coverage", "ask for less"),
        ({"params": {"model": "closed", "class_names": "zebra"}}, 422, "class_names", "but not 'zebra'"),
        ({"params": {"model": "open", "class_names": ["cat", "cat"]}}, 422, "class_names", "twice"),
        ({"params": {"model": "open", "class_names": list("abcd")}}, 422, "class_names", "at most 4"),
        ({"params": {"model": "open", "scores": "sigmoid"}}, 422, "scores", "trained with a sigmoid"),
    ],
)
def test_a_request_that_cannot_be_answered_names_the_field_and_the_remedy(request_, status, field, message, client):
    if "params" in request_:
        request_ = {"files": files(PICTURES[0])} | request_
    if message == "at most 4":
        request_["params"]["class_names"] = [f"cat {number}" for number in range(5)]
    response = client(body=100_000, pictures=2, class_names=3).post("/predict", **request_)
    assert (response.status_code, response.json()["field"]) == (status, field)
    assert message in response.json()["error"]


def test_a_full_queue_and_a_slow_answer_say_when_to_come_again(client, classifiers, monkeypatch):
    go = threading.Event()
    answers_to = classifiers["open"].answers_to
    monkeypatch.setattr(classifiers["open"], "answers_to", lambda *asked: go.wait(20) and answers_to(*asked))
    made = client(queue=2, timeout=0.5)
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(made.post, "/predict?model=open", files=files(*PICTURES[:2]))
        while made.service._in_use < 2:
            time.sleep(0.01)
        full = made.post("/predict?model=open", files=files(PICTURES[0]))
        assert (full.status_code, full.headers["Retry-After"]) == (503, "1")
        assert "too many pictures are waiting" in full.json()["error"]
        assert made.get("/health").status_code == 200
        assert slow.result().status_code == 503
        assert "took more than 0.5 seconds" in slow.result().json()["error"]
        go.set()
    assert made.post("/predict?model=open", files=files(PICTURES[0])).status_code == 200


def test_bodies_of_all_requests_together_are_limited(client):
    made = client(body=100_000)
    made.service._held = 8 * 100_000 - len(PICTURES[0])
    full = made.post("/predict?model=open", files=files(PICTURES[0]))
    assert (full.status_code, full.headers["Retry-After"]) == (503, "1")
    assert "large requests" in full.json()["error"]
    made.service._held = 0
    assert made.post("/predict?model=open", files=files(PICTURES[0])).status_code == 200
    assert made.service._held == 0


def test_a_fault_is_an_error_in_json_and_the_server_goes_on(client, classifiers, monkeypatch):
    ask = client().post
    with monkeypatch.context() as patch:
        patch.setattr(classifiers["open"], "answers_to", lambda *asked: 1 / 0)
        failed = ask("/predict?model=open", files=files(PICTURES[0]))
    assert (failed.status_code, failed.json()["error"]) == (500, "The server failed; its log says why.")
    assert ask("/predict?model=open", files=files(PICTURES[0])).status_code == 200


def test_the_other_pages_tell_what_is_served_and_load_nothing_from_elsewhere(client):
    made = client()
    assert made.get("/health").json() == {"status": "ready", "models": ["open", "closed"]}
    first, second = made.get("/models").json()["models"]
    assert (first["takes_new_classes"], first["calibrated"], first["class_names"]) == (True, False, CLASS_NAMES)
    assert (second["method"], second["takes_new_classes"], second["calibrated"]) == ("gda", False, True)
    page = made.get("/docs").text
    assert "coverage" in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=.?(https?:)?//", page)
    described = made.get("/openapi.json").json()["paths"]["/predict"]["post"]
    assert {each["name"] for each in described["parameters"]} >= {"model", "top_k", "class_names", "coverage", "reject"}
    assert made.get("/nothing").json()["error"] == "/nothing: Not Found; see /docs."


# Batches -------------------------------------------------------------------------------------------------------------


def test_a_batch_that_fails_or_is_given_up_takes_no_other_with_it():
    done = []

    def work(key, items):
        time.sleep(0.05)
        done.append((key, items))
        return [1 / item for item in items]

    async def all_of_them():
        async with Batcher(work, max_batch=2, max_wait=0) as batcher:
            given_up = asyncio.create_task(batcher("c", [5]))
            failing = asyncio.create_task(batcher("a", [1, 0]))
            others = asyncio.create_task(batcher("b", [1, 2, 4]))
            await asyncio.sleep(0)
            given_up.cancel()
            return await asyncio.gather(failing, others, return_exceptions=True)

    failed, found = asyncio.run(all_of_them())
    assert isinstance(failed, ZeroDivisionError)
    assert found == [1, 0.5, 0.25]
    assert done == [("a", [1, 0]), ("b", [1, 2]), ("b", [4])]


def test_an_item_waits_for_others_until_the_batch_is_full_or_its_time_is_over():
    sizes = []

    def work(key, items):
        sizes.append(len(items))
        return items

    async def later(batcher):
        await asyncio.sleep(0.05)
        return await batcher("a", [2])

    async def waits():
        async with Batcher(work, max_batch=2, max_wait=60) as batcher:
            await asyncio.gather(batcher("a", [1]), later(batcher))
        async with Batcher(work, max_batch=2, max_wait=0.05) as batcher:
            await batcher("a", [1])

    start = time.monotonic()
    asyncio.run(waits())
    assert sizes == [2, 1]
    assert time.monotonic() - start < 30


# Several adapters ----------------------------------------------------------------------------------------------------


def test_adapters_of_one_base_model_share_its_weights_and_answer_as_if_alone(runs):
    shared = load_classifiers(runs)
    owners = {}
    for name, classifier in shared.items():
        weights = {key: weight for key, weight in classifier.model.named_parameters() if weight.ndim > 1}
        for key, weight in weights.items():
            owners.setdefault(weight.data_ptr(), []).append((name, key))
    vision = [names for names in owners.values() if any("vision_model.encoder" in key for _, key in names)]
    assert max(map(len, vision)) == len(runs)
    for name, folder in runs.items():
        alone = hf_tgpt.load_classifier(folder)
        assert rows(shared[name](PICTURES[:2])) == rows(alone(PICTURES[:2])), name


# The program ---------------------------------------------------------------------------------------------------------


def test_sigterm_lets_waiting_requests_finish(classifiers, monkeypatch):
    answers_to, under_way = classifiers["open"].answers_to, threading.Event()

    def slow(*asked):
        under_way.set()
        time.sleep(0.5)
        return answers_to(*asked)

    monkeypatch.setattr(classifiers["open"], "answers_to", slow)
    with listen("127.0.0.1", 0) as listener, ThreadPoolExecutor(1) as threads:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def ask():
            request = urllib.request.Request(f"{address}/predict?model=open", PICTURES[0], {"Content-Type": CAT})
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
                return answer.status

        asked = threads.submit(ask)
        stopper = threading.Thread(target=lambda: under_way.wait(20) and os.kill(os.getpid(), signal.SIGTERM))
        stopper.start()
        serve(make_app(Service(classifiers, Limits())), listener, 10)
        stopper.join()
        assert asked.result() == 200


def test_the_command_refuses_what_cannot_work_before_it_loads_anything(runs, capsys, monkeypatch):
    assert main(["serve", str(runs["maple"]), f"maple={runs['gda']}", "--port", "0"]) == 1
    assert "Two adapters are named 'maple'" in capsys.readouterr().err
    assert main(["serve", "=x", "--port", "0"]) == 1
    assert "'=x' is not of the form NAME=ADAPTER" in capsys.readouterr().err
    assert main(["serve", "x", "--max-queue", "5"]) == 1
    assert "--max_queue=5 has no room for a request of --max_pictures=64; set it to 64" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["serve", "nothing"]) == 1
    assert 'pip install "hf-tgpt[serve]"' in capsys.readouterr().err
