"""What is wrong with pictures is found before training: each planted fault, and nothing beside them."""

import base64
import csv
import io
import json
import re
import shutil

import numpy as np
import pytest
from conftest import make_clip
from PIL import Image

from hf_tgpt.cli.main import main

COLOURS = {"ripe_tomato": (210, 30, 20), "lime": (120, 200, 40), "plum": (70, 20, 110)}


def write(path, colour, rng, size=(64, 60)):
    """A picture of a colour with a structure of its own, such as no other has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = rng.integers(-25, 26, (8, 8, 1))
    pixels = np.kron(coarse, np.ones((8, 8, 1), dtype=int)) + np.array(colour)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize(size).save(path, quality=95)


def fill(root, rng, names=COLOURS):
    for split, count in {"train": 12, "test": 6}.items():
        for name in names:
            for i in range(count):
                write(root / split / name / f"{split}-{i}.jpg", COLOURS[name], rng)
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_clip("plain", tmp_path_factory.mktemp("base"))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def check(capsys, *arguments):
    """The object that a check prints, and what it says on stderr."""
    capsys.readouterr()
    assert main(["check", *map(str, arguments), "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


LISTS = (
    "label_errors", "duplicates", "outliers", "unreadable", "blank", "tiny", "spelled_alike",
)  # fmt: skip


def test_each_planted_fault_is_reported_and_nothing_else(base, rng, tmp_path, capsys):
    root = fill(tmp_path / "pictures", rng)
    train, test = root / "train", root / "test"
    swapped = train / "lime" / "swapped.jpg"
    write(swapped, COLOURS["plum"], rng)
    shutil.copy(train / "plum" / "train-3.jpg", test / "plum" / "copied.jpg")
    with Image.open(train / "lime" / "train-4.jpg") as picture:
        picture.resize((50, 47)).save(train / "lime" / "saved again.jpg", quality=80)
    Image.new("RGB", (60, 60)).save(train / "plum" / "black.png")
    whole = (train / "lime" / "train-5.jpg").read_bytes()
    (train / "lime" / "cut off.jpg").write_bytes(whole[: len(whole) // 2])
    write(test / "lime" / "thumb.png", COLOURS["lime"], rng, (6, 6))
    for i in range(5):
        write(train / "Plum" / f"other-{i}.jpg", COLOURS["plum"], rng)
    facts, err = check(capsys, root, "--model", base, "--output_dir", tmp_path / "out")

    (wrong,) = facts["label_errors"]
    assert (wrong["file"], wrong["label"], wrong["suggested"]) == (str(swapped), "lime", "plum")
    assert 0.5 < wrong["score"] <= 1
    copied, again = facts["duplicates"]
    assert (copied["kind"], copied["across_splits"], copied["across_classes"]) == ("exact", True, False)
    assert [file["file"][-11:] for file in copied["files"]] == ["train-3.jpg", "/copied.jpg"]
    assert (again["kind"], again["across_splits"]) == ("near", False)
    assert {file["file"] for file in again["files"]} == {
        str(train / "lime" / name) for name in ("train-4.jpg", "saved again.jpg")
    }
    (cut,) = facts["unreadable"]
    assert cut["file"] == str(train / "lime" / "cut off.jpg")
    assert "truncated" in cut["problem"]
    assert [found["file"] for found in facts["blank"]] == [str(train / "plum" / "black.png")]
    assert [found["file"] for found in facts["tiny"]] == [str(test / "lime" / "thumb.png")]
    assert facts["spelled_alike"] == [["Plum", "plum"]]
    assert facts["outliers"] == []
    assert facts["imbalance"]["smallest"] == {"label": "Plum", "pictures": 5}
    assert "Traceback" not in err

    with (tmp_path / "out" / "problems.csv").open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:6] == ["file", "problem", "label", "suggested", "score", "split"]
    assert sorted(row["problem"] for row in rows) == [
        "blank", "exact duplicate", "exact duplicate", "label error", "near duplicate", "near duplicate", "tiny",
        "unreadable",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "check.json").read_text()) == facts


def test_pictures_without_a_fault_have_none(base, rng, tmp_path, capsys):
    facts, _ = check(capsys, fill(tmp_path / "pictures", rng), "--model", base, "--output_dir", tmp_path / "out")
    assert {kind: facts[kind] for kind in LISTS} == {kind: [] for kind in LISTS}
    assert facts["splits"] == {"train": 36, "test": 18}
    assert facts["cross_validated_accuracy"] == 1
    assert {one["label"]: one["pictures"] for one in facts["per_class"]} == {"lime": 18, "plum": 18, "ripe tomato": 18}
    assert main(["check", str(tmp_path / "pictures"), "--model", base, "--output_dir", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("54 pictures of 3 classes\n")


def test_the_worst_label_is_the_first_and_a_stranger_is_an_outlier(base, rng, tmp_path, capsys):
    root = fill(tmp_path / "pictures", rng)
    write(root / "train" / "lime" / "swapped.jpg", COLOURS["ripe_tomato"], rng)
    mixed = tuple(np.mean([COLOURS["lime"], COLOURS["ripe_tomato"]], axis=0))
    write(root / "train" / "lime" / "in between.jpg", mixed, rng)
    write(root / "train" / "plum" / "sky.jpg", (140, 200, 255), rng)
    facts, _ = check(capsys, root, "--model", base, "--output_dir", tmp_path / "out")
    scores = [found["score"] for found in facts["label_errors"]]
    assert scores == sorted(scores, reverse=True)
    assert facts["label_errors"][0]["file"].endswith(("swapped.jpg", "sky.jpg"))
    assert facts["outliers"][0]["file"].endswith("sky.jpg")


def test_the_page_stands_alone_and_shows_as_many_as_it_is_asked_to(base, rng, tmp_path, capsys):
    root = fill(tmp_path / "pictures", rng)
    for i in range(3):
        write(root / "train" / "lime" / f"<b>{i}.jpg", COLOURS["plum"], rng)
    check(capsys, root, "--model", base, "--output_dir", tmp_path / "out", "--count", 2)
    html = (tmp_path / "out" / "check.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|(src|href)=.?(http|//|file)|url\(|@import", html)
    addresses = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert len(addresses) == 2
    for address in addresses:
        assert max(Image.open(io.BytesIO(base64.b64decode(address))).size) <= 160
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
    assert "labelled lime; looks like plum" in html
    assert "These are 2 of 3; problems.csv lists all of them." in html
    assert "color-scheme: light dark" in html


def test_a_second_check_of_the_same_pictures_does_not_ask_the_tower_again(base, rng, tmp_path, capsys, monkeypatch):
    root = fill(tmp_path / "pictures", rng)
    first, _ = check(capsys, root, "--model", base, "--output_dir", tmp_path / "out")
    monkeypatch.setattr("hf_tgpt.training.features._states_of", None)
    second, _ = check(capsys, root, "--model", base, "--output_dir", tmp_path / "out")
    assert {**second, "seconds": 0} == {**first, "seconds": 0}


def test_classes_that_another_split_spells_otherwise_are_reported_and_do_not_stop_it(base, rng, tmp_path, capsys):
    root = fill(tmp_path / "pictures", rng)
    (root / "test" / "lime").rename(root / "test" / "Lime")
    (root / "test" / "plum").rename(root / "test" / "plum_")
    facts, _ = check(capsys, root, "--model", base, "--output_dir", tmp_path / "out")
    assert facts["spelled_alike"] == [["lime", "Lime"], ["plum", "plum_"]]
    assert facts["label_errors"] == []
    assert facts["pictures"] == 54


def test_class_folders_without_splits_have_no_split_and_a_check_is_not_taken_for_a_class(
    base, rng, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, colour in COLOURS.items():
        for i in range(6):
            write(tmp_path / name / f"{i}.jpg", colour, rng)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "plum" / "red.png")
    for _ in range(2):
        facts, _ = check(capsys, ".", "--model", base)
        assert facts["splits"] == {"": 19}
        assert facts["blank"][0]["split"] == ""
        assert facts["output_dir"].startswith("runs/check-")
        shutil.move(facts["output_dir"], "runs/earlier")
        monkeypatch.setattr(shutil, "move", lambda *paths: None)


def test_a_table_and_one_class_and_classes_of_one_picture_are_checked_too(base, rng, tmp_path, capsys):
    write(tmp_path / "a.jpg", COLOURS["lime"], rng)
    write(tmp_path / "b.jpg", COLOURS["plum"], rng)
    (tmp_path / "table.csv").write_text("image,kind\na.jpg,lime\nb.jpg,lime\nb.jpg,lime\n")
    options = ("--label_column", "kind", "--model", base)
    facts, _ = check(capsys, tmp_path / "table.csv", *options, "--output_dir", tmp_path / "one")
    assert [len(group["files"]) for group in facts["duplicates"]] == [2]
    (tmp_path / "table.csv").write_text("image,kind\na.jpg,lime\nb.jpg,plum\n")
    facts, _ = check(capsys, tmp_path / "table.csv", *options, "--output_dir", tmp_path / "two")
    assert facts["label_errors"] == []
    assert {one["label"] for one in facts["imbalance"]["few"]} == {"lime", "plum"}


def test_what_is_wrong_is_said_in_the_words_of_the_command(base, rng, tmp_path, capsys):
    def refused(*arguments):
        assert main(["check", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    assert "PICTURES='./missing' does not exist; correct the path" in refused("./missing")
    root = fill(tmp_path / "pictures", rng)
    assert "holds other files; choose a new folder" in refused(root, "--output_dir", root)
    assert "--model='./no' is not a folder" in refused(root, "--model", "./no", "--output_dir", tmp_path / "new")
    for file in root.rglob("*.jpg"):
        file.write_bytes(b"")
    assert "none of the 54 pictures can be read" in refused(root, "--model", base, "--output_dir", tmp_path / "out")
