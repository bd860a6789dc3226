"""Which pictures to label next: new ones, each once; and their labels become the next training's data."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import METHODS, make_classifier, make_clip, shake
from datasets import Image as Undecoded
from PIL import Image

import hf_tgpt
from hf_tgpt.cli.main import main
from hf_tgpt.data import class_names, load_splits
from hf_tgpt.inference.suggest import suggest_pictures

COLOURS = {"lime": (120, 200, 40), "plum": (70, 20, 110), "ripe tomato": (210, 30, 20)}
SKY = (140, 200, 255)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write(path, colour, rng, quality=95):
    """A picture of a colour with a structure of its own, such as no other has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.kron(rng.integers(-25, 26, (8, 8, 1)), np.ones((8, 8, 1), dtype=int))
    Image.fromarray((coarse + np.array(colour)).clip(0, 255).astype(np.uint8)).save(path, quality=quality)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the pictures of a run, in `pictures`, the run, and pictures without labels in `pool`."""
    root, rng = tmp_path_factory.mktemp("suggest"), np.random.default_rng(0)
    base = make_clip("plain", root / "base")
    for split, count in {"train": 3, "test": 2}.items():
        for name, colour in COLOURS.items():
            for i in range(count):
                write(root / "pictures" / split / name / f"{split}-{i}.jpg", colour, rng)
    for i in range(4):
        for name, colour in COLOURS.items():
            write(root / "pool" / "new" / f"{name} {i}.jpg", colour, rng)
    options = ["--dataset", root / "pictures", "--model", base, "--output_dir", root / "run", "--cache_features", 1]
    assert main(["train", *map(str, options)]) == 0
    return root


@pytest.fixture
def work(trained, tmp_path, monkeypatch):
    """The same for one test alone, which stands in its folder."""
    for name in ("pictures", "pool", "run"):
        shutil.copytree(trained / name, tmp_path / name)
    note = tmp_path / "run" / "run.json"
    note.write_text(note.read_text().replace(str(trained / "pictures"), str(tmp_path / "pictures")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def suggest(capsys, *arguments, status=0):
    """The object that the command prints, and what it says on stderr."""
    capsys.readouterr()
    assert main(["suggest", *map(str, arguments), "--json"]) == status
    out, err = capsys.readouterr()
    return json.loads(out), err


def read(table):
    with table.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def answer(table, **labels):
    """Fills in labels by the names of the files."""
    rows = [row | {"label": labels.get(row["file"].rpartition("/")[2].removesuffix(".jpg"), "")} for row in read(table)]
    with table.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_new_pictures_are_suggested_each_once_and_none_that_has_a_label_or_cannot_have_one(work, capsys):
    pool, known = work / "pool", work / "pictures" / "train" / "plum" / "train-0.jpg"
    shutil.copy(known, pool / "known.jpg")
    with Image.open(known) as picture:
        picture.resize((50, 50)).save(pool / "known again.jpg", quality=80)
    shutil.copy(pool / "new" / "lime 0.jpg", pool / "twin.jpg")
    Image.new("RGB", (60, 60)).save(pool / "black.png")
    (pool / "broken.jpg").write_bytes(b"\xff\xd8")
    facts, err = suggest(capsys, "run", "pool", "--count", 50, status=3)
    assert (facts["pictures"], facts["known"], facts["copies"], facts["blank"]) == (17, 2, 1, 1)
    assert [found["file"] for found in facts["unreadable"]] == [str(pool / "broken.jpg")]
    assert "1 of 17 files could not be read" in err
    files = [each["file"] for each in facts["suggestions"]]
    assert len(files) == len(set(files)) == facts["candidates"] == 12
    for left_out in ("known.jpg", "known again.jpg", "black.png", "broken.jpg"):
        assert str(pool / left_out) not in files
    rows = read(work / "to-label" / "answers.csv")
    assert list(rows[0]) == ["file", "suggested", "score", "label"]
    assert [row["file"] for row in rows] == files
    assert {row["label"] for row in rows} == {""}
    links = list((work / "to-label" / "pictures").iterdir())
    assert sorted(str(link.resolve()) for link in links) == sorted(files)
    assert all(link.is_symlink() for link in links)
    # What it made in a folder of pictures is none of them, and stored features are used again.
    shutil.move(work / "to-label", pool / "to-label")
    again, _ = suggest(capsys, "run", "pool", "--count", 3, "--output", pool / "to-label", status=3)
    assert (again["pictures"], len(again["suggestions"])) == (17, 3)
    assert len(list((pool / "to-label" / "pictures").iterdir())) == 3


def test_a_second_call_does_not_ask_the_tower_again(work, capsys, monkeypatch):
    first, _ = suggest(capsys, "run", "pool", "--count", 2)
    monkeypatch.setattr("hf_tgpt.training.features._states_of", None)
    second, _ = suggest(capsys, "run", "pool", "--count", 2)
    assert first["suggestions"] == second["suggestions"]


@pytest.mark.parametrize("name", ["gda", "maple", "tgpt", "mutual_prompt"])
def test_the_labels_of_any_method_are_those_of_its_classifier(name, trained):
    torch.manual_seed(1)
    clip = hf_tgpt.load_clip(str(trained / "base")).eval()
    model = make_classifier(name, clip, ["cat", "dog"], **METHODS[name].fields).eval()
    shake(model)
    transform = hf_tgpt.load_classifier(trained / "run").transform
    classifier = hf_tgpt.Classifier(model, transform)
    files = [str(path) for path in sorted((trained / "pool").rglob("*.jpg"))[:5]]
    facts = suggest_pictures(classifier, files, 3)
    for each in facts["suggestions"]:
        (best, *_) = classifier(each["file"])
        assert (each["suggested"], each["score"]) == (best["label"], pytest.approx(best["score"], abs=1e-4))


def test_answers_join_the_pictures_of_the_run_and_the_next_run_knows_them(work, capsys):
    suggest(capsys, "run", "pool", "--count", 12)
    write(work / "elsewhere.jpg", SKY, np.random.default_rng(5))
    table = work / "to-label" / "answers.csv"
    answer(table, **{"lime 0": "LIME", "plum 0": "ripe_tomato", "plum 1": "plumm", "lime 1": "sky", "lime 2": "sky"})
    with table.open("a") as file:
        file.write("elsewhere.jpg,lime,0.5,sky\nno such.jpg,lime,0.5,lime\n")
        file.write(f"{work / 'pictures/test/lime/test-0.jpg'},lime,0.5,lime\n{work / 'pool/new/lime 2.jpg'},,,lime\n")
    found, err = suggest(capsys, "run", "--answers", "to-label/answers.csv")
    assert (found["answers"], found["empty"], sorted(found["new_classes"])) == (5, 7, ["plumm", "sky"])
    assert sorted(line.rpartition("/")[2] for line in found["passed_over"]) == [
        "lime 2.jpg: it has two labels", "no such.jpg: there is no such picture",
        "test-0.jpg: it is in the run's test split already",
    ]  # fmt: skip
    assert "'plumm' is a new class; did you mean 'plum'?" in err
    assert "sky" not in err.partition("passed over")[0]

    splits = load_splits("to-label/labelled.csv")
    assert splits.num_rows == {"train": 14, "test": 6}
    names, train = (
        class_names(splits["train"]),
        splits["train"].cast_column("image", Undecoded(decode=False)),
    )
    of = {row["image"]["path"].rpartition("/")[2]: names[row["label"]] for row in train}
    assert (of["lime 0.jpg"], of["plum 0.jpg"], of["elsewhere.jpg"]) == ("lime", "ripe tomato", "sky")

    assert main([*found["command"].split()[1:]]) == 0
    assert json.loads((work / "runs/next/run.json").read_text())["model"] == json.loads(
        (work / "run/run.json").read_text())["model"]  # fmt: skip
    assert "sky" in hf_tgpt.load_classifier("runs/next").class_names
    following, _ = suggest(capsys, "runs/next", "pool", "--count", 12, "--output", "following")
    assert (following["known"], len(following["suggestions"])) == (4, 8)


def test_answers_that_were_not_taken_in_are_not_replaced(work, capsys):
    suggest(capsys, "run", "pool", "--count", 12)
    answer(work / "to-label" / "answers.csv", **{"lime 0": "lime"})
    before = (work / "to-label" / "answers.csv").read_text()
    assert main(["suggest", "run", "pool"]) == 1
    assert "--output='to-label' holds 1 labels in answers.csv that were not taken in" in capsys.readouterr().err
    assert (work / "to-label" / "answers.csv").read_text() == before
    suggest(capsys, "run", "--answers", "to-label/answers.csv")
    facts, _ = suggest(capsys, "run", "pool", "--count", 12)
    assert facts["known"] == 1


def test_where_all_have_labels_nothing_is_suggested_now_and_later(work, capsys):
    for _ in range(2):
        facts, _ = suggest(capsys, "run", "pictures")
        assert (facts["known"], facts["suggestions"]) == (15, [])
    assert main(["suggest", "run", "pictures"]) == 0
    assert "There is nothing left to label." in capsys.readouterr().out


def test_a_run_that_does_not_record_its_pictures_leaves_the_answers_alone(work, capsys):
    (work / "run" / "seen_pictures.txt").unlink()
    (work / "answers.csv").write_text("file,label\nnew/lime 0.jpg,lime\nnew/plum 0.jpg,plum\n")
    _, err = suggest(capsys, "run", "pool", "--answers", "answers.csv", "--output", "new")
    assert "does not record which pictures it was trained on" in err
    assert read(work / "new" / "labelled.csv") == [
        {"file": str(work / "pool" / "new" / f"{name} 0.jpg"), "label": name} for name in ("lime", "plum")
    ]


def test_what_is_wrong_is_said_in_the_words_of_the_command(work, capsys):
    def refused(*arguments):
        assert main(["suggest", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    assert "No picture is given" in refused("run")
    assert "'https://a/b.jpg' is an address" in refused("run", "https://a/b.jpg")
    assert "--output='pictures' holds other files" in refused("run", "pool", "--output", "pictures")
    assert "--answers='no.csv' does not exist" in refused("run", "--answers", "no.csv")
    (work / "a.csv").write_text("file,kind\nx.jpg,lime\n")
    assert "has the columns file, kind; it needs 'file' and 'label'" in refused("run", "--answers", "a.csv")
    (work / "a.csv").write_text("file,label\nx.jpg,\ny.jpg,lime\n")
    assert "has no new label: 1 empty, 1 passed over" in refused("run", "--answers", "a.csv")


def test_in_a_browser_the_page_takes_answers_and_saves_the_table_without_a_request(work, capsys):
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    shutil.copy(work / "pool" / "new" / "lime 0.jpg", work / 'a "b", <i>.jpg')
    facts, _ = suggest(
        capsys, "run", work / 'a "b", <i>.jpg', *(work / "pool" / "new" / f"plum {i}.jpg" for i in (0, 1, 2))
    )
    html = (work / "to-label" / "suggest.html").read_text(encoding="utf-8")
    assert not re.search(r"<link|(src|href)=.?(http|//|file)|url\(|@import|fetch\(|<i>", html)
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page, asked, broken = browser.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto((work / "to-label" / "suggest.html").as_uri())
        cards = page.locator("fieldset")
        cards.nth(0).get_by_role("radio").nth(1).check()
        cards.nth(1).get_by_role("combobox").fill(" sea, green ")
        cards.nth(2).get_by_text("none, or not sure").click()
        assert page.locator("#count").inner_text() == "2"
        with page.expect_download() as download:
            page.get_by_role("button", name="Save answers.csv").click()
        download.value.save_as(work / "saved.csv")
        browser.close()
    assert not broken
    assert all(address.startswith(("file:", "data:", "blob:")) for address in asked)
    rows = read(work / "saved.csv")
    assert [row["file"] for row in rows] == [each["file"] for each in facts["suggestions"]]
    assert [row["label"] for row in rows] == [facts["suggestions"][0]["guesses"][1]["label"], "sea, green", "", ""]
    taken, _ = suggest(capsys, "run", "--answers", "saved.csv")
    assert (taken["answers"], taken["new_classes"]) == (2, ["sea, green"])
