"""A folder as people have it trains at the first try, and is then evaluated on what was held out of it."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Failed
from PIL import Image

from hf_tgpt.cli.main import main

SPECIES = [
    "Löwenzahn",
    "Gänseblümchen (weiß)",
    "Mohn 🌺",
    "Klatsch-Nelke",
    "Distel",
    "Veilchen",
    "Kamille",
    "Ackerwinde",
]
TRAIN = ("--model", "toy", "--method", "coop", "--max_steps", "2")


def write(path, rng, size=(40, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eight species and one with a single picture, in ten kinds of disorder."""
    root, rng = tmp_path_factory.mktemp("messy") / "Meine Fotos", np.random.default_rng(0)
    for species in SPECIES:
        for number in range(20):
            write(root / species / f"Foto ({number}) ä.jpg", rng)
    write(root / "Seltene Orchidee" / "einzig.jpg", rng)
    whole = (root / "Distel" / "Foto (1) ä.jpg").read_bytes()
    (root / "Distel" / "halb.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "Distel" / "leer.jpg").write_bytes(b"")
    (root / "Distel" / "umbenannt.jpg").write_bytes(b"%PDF-1.7")
    (root / "Veilchen" / "Notizen.txt").write_text("am Bach")
    (root / "Veilchen" / "film.mov").write_bytes(b"")
    shutil.copy(root / "Distel" / "Foto (2) ä.jpg", root / "Kamille" / "auch Distel.jpg")
    Image.new("RGB", (50, 50)).save(root / "Kamille" / "schwarz.jpg")
    Image.new("RGB", (50, 50), "red").save(root / "lose.png")
    (root / "leerer Ordner").mkdir()
    (root / "@eaDir" / "thumbs").mkdir(parents=True)
    write(root / "@eaDir" / "thumbs" / "small.jpg", rng)
    return root


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """The run of one command, and what it said on stderr."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("sys.stderr.write", said.append, raising=False)
        assert main(["train", "--dataset", str(photos), *TRAIN, "--output_dir", str(folder)]) == 0
    return folder, "".join(said)


def test_the_messy_folder_trains_by_one_command_and_every_oddity_is_said(photos, trained):
    folder, said = trained
    assert said.startswith("10 remarks:")
    for words in (
        "1 class folder is left out, for lack of a picture: leerer Ordner",
        "left out: 1 .mov, 1 .txt;",
        "1 picture is left out, outside the class folders",
        "'Gänseblümchen (weiß)' is 'Gänseblümchen weiß'",
        "3 images are skipped, of 166 images, because they cannot be read:",
        f"{photos / 'Distel' / 'halb.jpg'} (image file is truncated",
        f"{photos / 'Distel' / 'leer.jpg'} (it is not a picture of a known kind)",
        f"{photos / 'Distel' / 'umbenannt.jpg'} (it is not a picture of a known kind)",
        f"of one colour or nearly black: {photos / 'Kamille' / 'schwarz.jpg'}",
        f"1 image is in two classes: {photos / 'Distel' / 'Foto (2) ä.jpg'} (Distel) and "
        f"{photos / 'Kamille' / 'auch Distel.jpg'} (Kamille)",
        "too small to be split into train, validation and test (3 images): 'Seltene Orchidee' (1)",
        "trained on fewer than 16 images: 'Ackerwinde' (10), 'Distel' (10)",
        "1 class is not tested, for lack of an image: Seltene Orchidee",
    ):
        assert words in said, said
    assert ".py:" not in said
    assert "`" not in said
    results = json.loads((folder / "results.json").read_text())
    assert results["training_images"] == 82
    assert "| images per class | up to 16 |" in (folder / "README.md").read_text()
    names = json.loads((folder / "adapter_config.json").read_text())["class_names"]
    assert "Mohn 🌺" in names
    assert "Seltene Orchidee" in names
    assert "thumbs" not in names


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf_8_are_named_and_passed_over(tmp_path, run_command, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        for i in range(8):
            write(tmp_path / "photos" / name / f"{i}.jpg", rng)
    os.rename(b"photos/ant/3.jpg", b"photos/ant/k\xe4fer.jpg")
    os.mkdir(b"photos/gr\xfcn")
    write(tmp_path / "photos" / "fly.jpg", rng)
    os.rename(b"photos/fly.jpg", b"photos/gr\xfcn/0.jpg")
    assert main(["train", "--dataset", "photos", *TRAIN, "--output_dir", "run"]) == 0
    said = capsys.readouterr().err
    assert r"left out: 1 gr\xfcn (its name is not UTF-8; rename it), 1 k\xe4fer.jpg (its name" in said
    for command in (["predict", "run", "photos/ant", os.fsdecode(b"photos/ant/k\xe4fer.jpg")], ["check", "photos"]):
        output = ["--output", "rows.csv"] if command[0] == "predict" else ["--model", "toy", "--output_dir", "check"]
        run_command(*command, *output)
    assert len(Path("rows.csv").read_text("utf-8-sig").splitlines()) == 8
    with pytest.raises(Failed, match=r"no picture in photos/ant/k\\xe4fer\.jpg"):
        run_command("predict", "run", os.fsdecode(b"photos/ant/k\xe4fer.jpg"))


def test_strict_refuses_what_is_odd_and_makes_no_folder(photos, tmp_path, capsys):
    assert main(["train", "--dataset", str(photos), *TRAIN, "--strict", "--output_dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("hf-tgpt train: --strict, and there are ")
    assert "halb.jpg" in said
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_class_is_refused_with_what_was_seen_and_no_folder_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "photos" / "a.jpg", np.random.default_rng(0))
    assert main(["train", "--dataset", "photos", *TRAIN]) == 1
    assert "has no class folders; put the images of each class into" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def evaluate(*arguments, capsys):
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_the_runs_own_folder_is_evaluated_on_what_was_held_out_wherever_it_lies(photos, trained, tmp_path, capsys):
    folder, _ = trained
    moved = shutil.copytree(photos, tmp_path / "moved")
    results, said = evaluate("--adapter", folder, "--dataset", moved, capsys=capsys)
    held_out = (folder / "seen_pictures.txt").read_text().count(" test\n")
    assert results["images"] == held_out == 49
    assert results["seen_in_training"] == []
    assert "These are the run's own pictures: the 49 of 163 that it held out are tested." in said
    assert results["accuracy"] == json.loads((folder / "results.json").read_text())["accuracy"]


def test_a_strangers_folder_is_evaluated_whole_and_training_pictures_in_it_are_named(photos, trained, tmp_path, capsys):
    folder, _ = trained
    rng, other = np.random.default_rng(1), tmp_path / "other"
    for species in ("Distel", "Kamille"):
        for number in range(5):
            write(other / species / f"{number}.jpg", rng)
    (digest, _), *_ = (line.split() for line in (folder / "seen_pictures.txt").read_text().splitlines())
    (borrowed,) = (
        path for path in photos.rglob("*.jpg") if hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest)
    )
    shutil.copy(borrowed, other / "Distel" / "borrowed.jpg")
    results, said = evaluate("--adapter", folder, "--dataset", other, capsys=capsys)
    assert results["images"] == 11
    assert results["seen_in_training"] == [str(other / "Distel" / "borrowed.jpg")]
    assert "1 picture is also in the training data" in said
    results, _ = evaluate("--adapter", folder, "--dataset", other, "--seed", 3, capsys=capsys)
    assert results["images"] == 4  # a seed cuts it, as in training


def test_an_adapter_that_does_not_tell_its_pictures_and_one_that_was_cut_off_say_so(photos, trained, tmp_path, capsys):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    (folder / "seen_pictures.txt").unlink()
    results, said = evaluate("--adapter", folder, "--dataset", photos, capsys=capsys)
    assert results["images"] == 49  # split as the run's results.json says
    assert "does not record which pictures it was trained on" in said
    (folder / "results.json").unlink()
    _, said = evaluate("--adapter", folder, "--dataset", photos, capsys=capsys)
    assert "was interrupted; continue with `hf-tgpt train --resume`" in said
