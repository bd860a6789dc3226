"""Features go to other programs with what is known of the pictures, and predicted pictures into folders as links."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import METHODS, make_classifier, make_clip, shake
from PIL import Image

import hf_tgpt
from hf_tgpt.cli.main import main
from hf_tgpt.cli.sorting import Sorter, folder_names

NAMES = ["cat", "black/white cat"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """{"base": folder, "maple": folder, ...}"""
    root = tmp_path_factory.mktemp("adapters")
    make_clip("plain", root / "base")
    for name in ("maple", "tgpt", "mutual_prompt", "coop"):
        torch.manual_seed(1)
        base = hf_tgpt.load_clip(str(root / "base")).eval()
        model = make_classifier(name, base, NAMES, **METHODS[name].fields).eval()
        shake(model)
        model.save_pretrained(root / name)
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture
def pictures(tmp_path):
    """A train and a test split of two classes, and a damaged picture."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for i in range(2):
                noise = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / "pictures" / split / name / f"{i}.jpg")
    (tmp_path / "pictures" / "test" / "dog" / "9.jpg").write_bytes(b"\xff\xd8")
    return tmp_path / "pictures"


def run(*arguments):
    return main([str(argument) for argument in arguments])


def base_features(adapters, files):
    clip = hf_tgpt.load_clip(adapters["base"]).eval()
    transform = hf_tgpt.data.ImageTransform.from_processor(
        hf_tgpt.encoders.loading.load_image_processor(adapters["base"]), train=False
    )
    pixels = torch.stack([transform(hf_tgpt.data.decode_image(str(file))) for file in files])
    with torch.no_grad():
        features = clip.get_image_features(pixels)
    features = getattr(features, "pooler_output", features)
    return torch.nn.functional.normalize(features).numpy()


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_features_are_written_with_files_labels_and_splits_and_damaged_files_are_named(
    suffix, adapters, pictures, tmp_path, capsys
):
    output = tmp_path / "new" / f"features{suffix}"
    assert run("embed", pictures, "--output", output, "--model", adapters["base"], "--json") == 3
    out, err = capsys.readouterr()
    assert json.loads(out) == {"output": str(output), "pictures": 8, "width": 32, "labelled": True, "skipped": 1}
    assert "1 of 9 files could not be read and were skipped:" in err
    assert "9.jpg" in err
    many = "s" if suffix == ".npz" else ""
    table = np.load(output) if many else pq.read_table(output).to_pydict()
    files = [Path(file) for file in table[f"file{many}"]]
    assert [list(map(str, row)) for row in zip(table[f"split{many}"], table[f"label{many}"], strict=True)] == [
        [file.parts[-3], file.parts[-2]] for file in files
    ]
    np.testing.assert_allclose(np.array(table["features"]), base_features(adapters, files), atol=1e-5)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_pictures_without_class_folders_are_embedded_without_labels(adapters, pictures, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(pictures / "train" / "cat" / "0.jpg", flat / "b.jpg")
    for place, count in ((flat, 1), (flat / "b.jpg", 1)):
        assert run("embed", place, "--output", tmp_path / "f.parquet", "--model", adapters["base"]) == 0
        table = pq.read_table(tmp_path / "f.parquet").to_pydict()
        assert (len(table["file"]), table["label"], table["split"]) == (count, [None], [None])


@pytest.mark.parametrize(
    ("name", "other"), [("maple", True), ("tgpt", False), ("coop", False), ("mutual_prompt", None)]
)
def test_features_of_an_adapter_are_those_of_its_image_tower(name, other, adapters, pictures, tmp_path, capsys):
    (pictures / "test" / "dog" / "9.jpg").unlink()
    output = tmp_path / "f.npz"
    status = run("embed", pictures, "--output", output, "--adapter", adapters[name])
    if other is None:
        assert status == 1
        assert "image features depend on the class texts" in capsys.readouterr().err
        return
    table = np.load(output)
    assert np.allclose(table["features"], base_features(adapters, table["files"]), atol=1e-5) != other


def test_an_output_of_another_kind_is_refused_before_the_work(adapters, pictures, tmp_path, capsys):
    assert run("embed", pictures, "--output", tmp_path / "f.csv", "--model", adapters["base"]) == 1
    assert "ends with neither .npz nor .parquet" in capsys.readouterr().err


# Sorting --------------------------------------------------------------------------------------------------------------


def test_pictures_are_linked_into_a_folder_for_each_answer_and_none_is_moved(adapters, pictures, tmp_path, capsys):
    before = sorted(pictures.rglob("*"))
    command = ("predict", adapters["maple"], pictures, "--sort-into", tmp_path / "sorted", "--min-score", "0.5")
    assert run(*command) == 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    links = {os.readlink(path): path for path in (tmp_path / "sorted").rglob("*.jpg")}
    assert sorted(pictures.rglob("*")) == before
    assert links.keys() == {row["image"] for row in rows if "label" in row}
    assert len(links) == 8  # though only two file names are among them
    for row in rows:
        if "label" in row:
            place = links[row["image"]].relative_to(tmp_path / "sorted").parts
            assert place[0] == row["label"].replace("/", "_")
            assert len(place) == 2
    assert run(*command) == 3
    assert sum(path.is_symlink() for path in (tmp_path / "sorted").rglob("*")) == 8  # the second time adds nothing


def test_low_scores_go_to_unsure_and_copies_are_made_if_asked_for(adapters, pictures, tmp_path, capsys):
    picture = pictures / "train" / "cat" / "0.jpg"
    options = ("--sort_into", tmp_path / "sorted", "--min_score", "1", "--copy")
    for _ in range(2):
        assert run("predict", adapters["coop"], picture, *options) == 0
    (copied,) = (tmp_path / "sorted").rglob("*.jpg")
    assert copied == tmp_path / "sorted" / "unsure" / "0.jpg"
    assert not copied.is_symlink()
    assert copied.read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--min_score", "0.5"), "--min_score is for --sort_into; name a folder there"),
        (("--copy",), "--copy is for --sort_into"),
        (("--sort_into", "{pictures}/sorted"), "so a later call would take what is sorted for pictures"),
        (("--sort_into", "{pictures}/train/cat/0.jpg/x"), "--sort_into='"),
        (("--format", "parquet"), "--format='parquet' needs a file; name one as --output"),
    ],
)
def test_what_cannot_be_sorted_is_refused_in_options(options, message, adapters, pictures, tmp_path, capsys):
    picture = pictures / "train" if "{pictures}/sorted" in options else pictures / "train" / "cat" / "1.jpg"
    picture = pictures if "{pictures}/sorted" in options else picture
    assert run("predict", adapters["coop"], picture, *(option.format(pictures=pictures) for option in options)) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("score", ["-1", "2", "x", "nan"])
def test_a_score_is_0_to_1(score, adapters, capsys):
    with pytest.raises(SystemExit):
        run("predict", adapters["coop"], "x.jpg", f"--min_score={score}")
    assert f"{score}: choose 0 to 1" in capsys.readouterr().err


def test_no_class_leads_out_of_the_folder_or_into_anothers():
    names = ["../..", "/etc", "a/b", "a_b", "A_B", "..", ".", " ", "unsure", "x" * 300, "é\n", "\ud800"]
    folders = folder_names(names)
    assert list(folders) == names
    assert len({folder.casefold() for folder in folders.values()} | {"unsure"}) == len(names) + 1
    for folder in folders.values():
        assert Path(folder).name == folder
        assert folder not in (".", "..")
        assert len(folder.encode()) < 255


def test_another_picture_of_the_same_name_does_not_replace_one(tmp_path):
    put = Sorter(tmp_path / "sorted", ["cat"])
    for i in range(3):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "same.jpg").write_bytes(b"%d" % i)
        put(str(tmp_path / str(i) / "same.jpg"), "cat", 1.0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "sorted" / "cat").iterdir()} == {
        "same.jpg": b"0", "same (2).jpg": b"1", "same (3).jpg": b"2",
    }  # fmt: skip


def test_rows_in_parquet_are_those_in_csv(adapters, pictures, tmp_path):
    for suffix in ("csv", "parquet"):
        assert run("predict", adapters["maple"], pictures, "--output", tmp_path / f"rows.{suffix}") == 3
    with (tmp_path / "rows.csv").open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table.column_names == list(rows[0])
    for row, other in zip(rows, table.to_pylist(), strict=True):
        assert (row["image"], row["label"] or None) == (other["image"], other["label"])
        assert (row["error"] or None) == other["error"]
        assert row["score"] == ("" if other["score"] is None else f"{other['score']:.4f}")
    assert not list(tmp_path.glob("*.part*"))
