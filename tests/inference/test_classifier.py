"""A trained adapter as a function from pictures to class names."""

import http.server
import io
import itertools
import os
import re
import shutil
import threading

import datasets
import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, METHODS, ImageProcessor, make_classifier, make_clip, shake
from PIL import Image

import hf_tgpt
from hf_tgpt.data import decode_image

SIDE = 32


def picture(seed, size=(40, 50)):
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = make_clip("plain", tmp_path_factory.mktemp("base"))
    ImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture
def save(base, tmp_path):
    """save("maple") -> the folder of an adapter or reference that is not as it started."""

    def make(name, class_names=CLASS_NAMES):
        torch.manual_seed(1)
        clip = hf_tgpt.load_clip(base).eval()
        fields = METHODS[name].fields if name in METHODS else {}
        model = make_classifier(name, clip, class_names, **fields).eval()
        shake(model)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def classifier(save):
    return hf_tgpt.load_classifier(save("maple"))


@pytest.mark.parametrize("name", hf_tgpt.available_methods())
def test_it_says_what_the_loaded_model_says(name, save, base):
    folder = save(name)
    classifier = hf_tgpt.load_classifier(folder, "cpu")
    assert re.fullmatch(rf"Classifier\(\w+, {len(CLASS_NAMES)} classes: {CLASS_NAMES[0]!r}, .*\)", repr(classifier))
    model = hf_tgpt.load_trained(hf_tgpt.load_clip(base).eval(), folder).eval()
    pictures = [picture(seed) for seed in range(3)]
    inputs = ImageProcessor.from_pretrained(base)(images=pictures, return_tensors="pt")
    expected = model(inputs.pixel_values).logits.softmax(-1)
    for answer, scores in zip(classifier(pictures, top_k=None), expected, strict=True):
        assert [part["label"] for part in answer] == [CLASS_NAMES[i] for i in scores.argsort(descending=True)]
        assert [part["score"] for part in answer] == pytest.approx(sorted(scores.tolist(), reverse=True), abs=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].open] + ["zero-shot", "lora"])
def test_open_methods_take_other_class_names_for_one_call(name, save):
    classifier = hf_tgpt.load_classifier(save(name))
    before = classifier(picture(0))
    other = classifier(picture(0), class_names=["circle", "forest"])
    assert {part["label"] for part in other} == {"circle", "forest"}
    assert classifier(picture(0)) == before


@pytest.mark.parametrize("name", ["tgpt", "linear-probe"])
def test_closed_methods_choose_among_their_classes_and_refuse_others(name, save):
    classifier = hf_tgpt.load_classifier(save(name))
    assert not classifier.takes_new_classes
    answer = classifier(picture(0), class_names=["forest", "cat"])
    assert {part["label"] for part in answer} == {"forest", "cat"}
    assert sum(part["score"] for part in answer) == pytest.approx(1)
    with pytest.raises(ValueError, match="has 4 classes, fixed when it was trained, but not 'zebra'"):
        classifier(picture(0), class_names=["forest", "zebra"])


@pytest.mark.parametrize("name", ["maple", "tgpt"])
def test_an_empty_class_list_is_refused(name, save):
    classifier = hf_tgpt.load_classifier(save(name))
    with pytest.raises(ValueError, match=r"`class_names`=\[\]: pass a list"):
        classifier(picture(0), class_names=[])


def test_one_picture_of_every_kind_gives_one_answer(classifier, tmp_path):
    image = picture(0)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    array = np.asarray(image)
    kinds = [
        image,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        {"bytes": data, "path": None},
        {"image": image, "label": 3},
        array,
        array.astype(np.float64) / 255,
        torch.from_numpy(array.copy()).movedim(-1, 0),
        torch.from_numpy(array.copy()).movedim(-1, 0) / 255,
    ]
    expected = classifier(image)
    assert len(expected) == len(CLASS_NAMES)
    for kind in kinds:
        assert classifier(kind) == expected
    assert classifier(kinds, batch_size=4) == [
        [{**part, "score": pytest.approx(part["score"], abs=1e-6)} for part in expected]
    ] * len(kinds)


def test_batches_give_a_list(classifier):
    arrays = np.stack([np.asarray(picture(seed)) for seed in range(3)])
    expected = [[part["label"] for part in classifier(array)] for array in arrays]
    for batch in (arrays, torch.from_numpy(arrays).movedim(-1, 1), list(arrays), tuple(arrays)):
        assert [[part["label"] for part in answer] for answer in classifier(batch)] == expected
    assert classifier([]) == []


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "exif"])
def test_pictures_of_all_modes_are_read_as_in_training(mode, classifier, tmp_path):
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "exif") else "a.png")
    image, exif = picture(0), Image.Exif()
    if mode == "exif":
        exif[0x0112] = 6  # turned to the right
    elif mode == "I;16":
        image = Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50) * 30)
    else:
        image = image.convert(mode)
    image.save(path, exif=exif) if mode == "exif" else image.save(path)
    assert classifier(path) == classifier(decode_image(path))
    assert classifier(Image.open(path)) == classifier(path)


def test_a_generator_is_read_batch_by_batch(classifier):
    read = []

    def pictures():
        for seed in itertools.count():
            read.append(seed)
            yield picture(seed)

    answers = classifier(pictures(), batch_size=2)
    assert read == []
    assert next(answers)
    assert len(read) == 2
    next(answers), next(answers)
    assert len(read) == 4


def test_reading_ahead_changes_no_answer(classifier, tmp_path, monkeypatch):
    names = [f"{seed}.png" for seed in range(9)]
    for seed, name in enumerate(names):
        picture(seed).save(tmp_path / name)
    for name in ("3.png", "4.png"):
        (tmp_path / name).write_bytes(b"no picture")
    paths = [tmp_path / name for name in names]

    def ask(pictures):
        skipped = []
        answers = classifier.stream(pictures, skip=lambda path, error: skipped.append((path, str(error))), batch_size=2)
        return list(answers), skipped

    readers, read = set(), classifier.pixel_values
    monkeypatch.setattr(
        classifier, "pixel_values", lambda image: readers.add(threading.current_thread().name) or read(image)
    )
    answers, skipped = ask(paths)
    assert threading.current_thread().name not in readers
    assert [path.name for path, _ in answers] == [name for name in names if name not in ("3.png", "4.png")]
    assert [path.name for path, _ in skipped] == ["3.png", "4.png"]
    monkeypatch.setattr("hf_tgpt.inference.classifier.has_state", lambda image: True)  # all in this thread
    readers.clear()
    assert ask(paths) == (answers, skipped)
    assert readers == {threading.current_thread().name}


def test_one_open_picture_may_be_given_many_times(classifier, tmp_path):
    picture(0, (400, 500)).save(tmp_path / "a.png")
    expected = classifier([tmp_path / "a.png"] * 8, batch_size=4)
    with Image.open(tmp_path / "a.png") as image:
        assert classifier([image] * 8, batch_size=4) == expected


def test_a_picture_that_cannot_be_read_is_named_after_the_batches_before_it(classifier, tmp_path):
    (tmp_path / "b.png").write_bytes(b"no picture")
    picture(0).save(tmp_path / "a.png")
    answers = classifier.stream([tmp_path / "a.png"] * 4 + [tmp_path / "b.png"], batch_size=2)
    assert len([next(answers) for _ in range(4)]) == 4
    with pytest.raises(ValueError, match=r"cannot read .*b\.png"):
        next(answers)


def test_datasets_are_read_by_their_column_of_images(classifier):
    pictures = [picture(seed) for seed in range(3)]
    data = datasets.Dataset.from_dict({"photo": pictures, "label": [0, 1, 2]}).cast_column("photo", datasets.Image())
    expected = [[part["label"] for part in answer] for answer in classifier(pictures)]
    assert [[part["label"] for part in answer] for answer in classifier(data)] == expected
    stream = classifier(data.to_iterable_dataset())
    assert not isinstance(stream, list)
    assert [[part["label"] for part in answer] for answer in stream] == expected
    with pytest.raises(ValueError, match="1 columns and columns of images: none"):
        classifier(data.select_columns(["label"]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.png", r"cannot read missing\.png: .*replace or remove"),
        (np.zeros((3, 40, 50)), r"shape \(3, 40, 50\) is not a picture"),
        (np.full((40, 50, 3), 300), "from 300 to 300 is not a picture"),
        (torch.randn(3, 40, 50), "Normalised pixel values go to the model itself"),
        (np.full((4, 4), np.nan), "from nan to nan is not a picture"),
        (np.zeros((0, 4, 3)), "is not a picture"),
        ({"label": 1}, "a row with label has no picture"),
        (3, "`images` is a int"),
        ([None], "NoneType is not an image"),
    ],
)
def test_what_is_no_picture_is_named(image, message, classifier):
    with pytest.raises(ValueError, match=message):
        classifier(image)


def test_a_stream_may_leave_out_what_cannot_be_read(classifier, tmp_path):
    (tmp_path / "b.png").write_bytes(b"no picture")
    picture(0).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "c.png")
    refused = []
    given = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    answers = list(classifier.stream(given, skip=lambda image, error: refused.append((image.name, str(error)))))
    assert [image.name for image, _ in answers] == ["a.png", "c.png"]
    assert refused[0][0] == "b.png"
    assert "cannot read" in refused[0][1]
    assert list(classifier.stream([tmp_path / "b.png"], skip=lambda *_: None)) == []


@pytest.mark.parametrize("name", ["top_k", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, "2", 2.5, True, [1]])
def test_counts_must_be_positive_whole_numbers(name, value, classifier):
    with pytest.raises(ValueError, match=rf"`{name}`={re.escape(repr(value))}: choose 1 or more"):
        classifier([picture(0)], **{name: value})


@pytest.mark.parametrize(
    "names", ["cat", b"cat", {"cat": "dog"}, {"cat", "dog"}, iter(["cat"]), [], ["a", "A"], [1, 2]]
)
def test_class_names_are_a_list_of_distinct_names(names, classifier):
    with pytest.raises(ValueError, match="`class_names"):
        classifier(picture(0), class_names=names)


def test_the_bytes_of_a_picture_and_an_open_file_are_one_picture(tmp_path, classifier):
    picture(3).save(tmp_path / "a.png")
    expected, data = classifier(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()
    for one in (data, bytearray(data), memoryview(data), io.BytesIO(data)):
        assert classifier(one) == expected
    with (tmp_path / "a.png").open("rb") as file:
        assert classifier(file) == expected
    assert len(classifier([data, io.BytesIO(data)])) == 2
    with pytest.raises(ValueError, match="an open text file is not a picture"):
        classifier(io.StringIO("a.png"))
    with pytest.raises(ValueError, match="cannot read image in memory"):
        classifier(b"no picture")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_is_named_and_not_waited_for(tmp_path, classifier):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match=r"pipe\.jpg: it is a folder, a pipe or a device"):
        classifier(tmp_path / "pipe.jpg")


def test_image_conditioned_methods_hold_a_bounded_number_of_class_texts(save, monkeypatch):
    classifier = hf_tgpt.load_classifier(save("cocoop"))
    pictures = [picture(seed) for seed in range(5)]
    sizes, forward = [], classifier.model.forward
    expected = classifier(pictures)
    monkeypatch.setattr("hf_tgpt.inference.classifier._PAIRS", 2 * len(CLASS_NAMES) + 1)
    monkeypatch.setattr(classifier.model, "forward", lambda batch: sizes.append(len(batch)) or forward(batch))
    answers = classifier(pictures)
    assert sizes == [2, 2, 1]
    assert [answer[0]["label"] for answer in answers] == [answer[0]["label"] for answer in expected]


def test_a_long_class_list_is_encoded_chunk_by_chunk(classifier, monkeypatch):
    names = [f"cat {' '.join(word)}" for word in itertools.product(["cat", "red", "circle", "forest"], repeat=5)]
    widest, encode = [], hf_tgpt.available_methods()["maple"].learner_class.text_features

    def watched(self, clip, input_ids, *rest):
        widest.append(len(input_ids))
        return encode(self, clip, input_ids, *rest)

    monkeypatch.setattr(hf_tgpt.available_methods()["maple"].learner_class, "text_features", watched)
    answer = classifier(picture(0), class_names=names, top_k=None)
    assert len(answer) == len(names) == 1024
    assert max(widest) < 200


# URLs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """A web server with one picture, /a.png."""
    stored = io.BytesIO()
    picture(0).save(stored, "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/a.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(stored.getvalue() if found else b"none")

        def log_message(self, *args):
            """Silent."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def test_a_url_is_fetched_where_there_is_a_network_and_else_refused(classifier, server, monkeypatch):
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set, so nothing is downloaded"):
        classifier(f"{server}/a.png")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    try:
        assert classifier(f"{server}/a.png") == classifier(picture(0))
        with pytest.raises(ValueError, match=r"cannot read http://.*/b\.png: .*404.*check the address"):
            classifier(f"{server}/b.png")
    finally:
        close_session()


# Loading -------------------------------------------------------------------------------------------------------------


def test_a_base_model_without_image_processor_is_named(save, base, tmp_path):
    without = shutil.copytree(base, tmp_path / "without", ignore=shutil.ignore_patterns("*processor*"))
    with pytest.raises(ValueError, match="has no image processor that could be loaded"):
        hf_tgpt.load_classifier(save("maple"), base_model=str(without))
