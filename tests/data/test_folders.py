"""A folder is listed once, and again when it has changed; large ones are neither slow nor in memory."""

import os
import time

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from hf_tgpt.data import count_duplicates, load_splits, sample_few_shot, split_base_new
from hf_tgpt.data.readers import folders
from hf_tgpt.data.readers.coop import image_paths


@pytest.fixture
def pictures(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name / "deep").mkdir(parents=True)
        for file in ("a.png", "deep/b.png"):
            (tmp_path / name / file).touch()
    return tmp_path


def make_old(root):
    """Sets every folder's time back, beyond doubt that nothing has changed since it was listed."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (1e9, 1e9))


@pytest.fixture
def walks(monkeypatch):
    """The folders that are listed anew."""
    walked = []
    walk = folders._walk

    def counted(folder, *args):
        walked.append(folder)
        return walk(folder, *args)

    monkeypatch.setattr(folders, "_walk", counted)
    return walked


def test_an_unchanged_folder_is_not_listed_again(pictures, walks):
    make_old(pictures)
    first = folders.image_index(pictures)
    listed = len(walks)
    again = folders.image_index(pictures)
    assert len(walks) == listed > 0
    assert image_paths(first) == image_paths(again) == sorted(str(path) for path in pictures.rglob("*.png"))
    assert again["label"][:] == ["ant", "ant", "bee", "bee"]


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "ant" / "deep" / "new.png").touch(),
        lambda root: (root / "bee" / "a.png").unlink(),
        lambda root: (root / "bee" / "a.png").rename(root / "bee" / "z.png"),
        lambda root: (root / "bee").rename(root / "wasp"),
        lambda root: (root / "fly").mkdir(),
    ],
    ids=["deep file added", "file removed", "file renamed", "class renamed", "class added"],
)
def test_a_changed_folder_is_listed_again(pictures, walks, change):
    make_old(pictures)
    folders.image_index(pictures)
    listed = len(walks)
    change(pictures)
    index = folders.image_index(pictures)
    assert len(walks) > listed
    assert image_paths(index) == sorted(str(path) for path in pictures.rglob("*.png"))


def test_a_folder_that_changed_just_now_is_not_trusted(pictures, walks):
    folders.image_index(pictures)
    listed = len(walks)
    folders.image_index(pictures)
    assert len(walks) > listed


def test_indexing_shows_progress(pictures, monkeypatch):
    bars = []
    monkeypatch.setattr(folders, "tqdm", lambda rows, **options: bars.append(options) or rows)
    folders.image_index(pictures)
    assert bars == [dict(desc=f"indexing {pictures}", unit=" images", delay=1, disable=None)]


def test_a_class_may_be_a_link_and_links_may_go_round(pictures, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "c.png").touch()
    (pictures / "cat").symlink_to(elsewhere)
    (pictures / "ant" / "round").symlink_to(pictures)
    index = folders.image_index(pictures)
    assert [label for label, path in zip(index["label"], image_paths(index), strict=True) if "c.png" in path] == ["cat"]
    assert len(index) == 5


# Large inputs --------------------------------------------------------------------------------------------------------


def test_sixty_thousand_images_of_twenty_thousand_classes_are_indexed_in_little_memory(monkeypatch, tmp_path):
    classes, per_class = 20_000, 3
    rows = [(f"{tmp_path}/{c:05d}/{i}.jpg", f"{c:05d}") for c in range(classes) for i in range(per_class)]
    monkeypatch.setattr(folders, "_walk", lambda *args: iter(rows))
    pool = pa.total_allocated_bytes()
    start = time.process_time()
    index = folders.image_index(tmp_path)
    assert len(index) == classes * per_class
    assert pa.total_allocated_bytes() - pool < 2_000_000  # the paths lie in a file
    monkeypatch.setattr(folders, "_load_class_folders", lambda *args: index)
    (tmp_path / "0").mkdir()
    monkeypatch.setattr("hf_tgpt.data.sources.remark_on_duplicates", lambda *_, **__: None)
    splits = load_splits(tmp_path)
    assert {split: len(data) for split, data in splits.items()} == {
        "train": classes,
        "validation": classes,
        "test": classes,
    }
    assert len(sample_few_shot(splits["train"], 1)) == classes
    base, _ = split_base_new(splits["test"])
    assert base.features["label"].num_classes == classes // 2
    assert time.process_time() - start < 30  # a few seconds; quadratic steps would take minutes


# Duplicates ----------------------------------------------------------------------------------------------------------


def write_split(root, split, shades):
    (root / split / "ant").mkdir(parents=True, exist_ok=True)
    for number, shade in enumerate(shades):
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(root / split / "ant" / f"{split}{number}.png")


def test_images_in_train_and_in_test_are_counted_in_a_warning(tmp_path):
    write_split(tmp_path, "train", [1, 2, 3])
    write_split(tmp_path, "test", [3, 4, 1, 1])
    with pytest.warns(UserWarning, match="3 test images are in the train split too .*test0.png"):
        load_splits(tmp_path)


def test_equal_images_within_a_split_or_in_validation_are_no_matter(tmp_path):
    write_split(tmp_path, "train", [1, 1, 3])
    write_split(tmp_path, "val", [1])
    write_split(tmp_path, "test", [4, 4])
    splits = load_splits(tmp_path)
    assert count_duplicates(splits["train"], splits["test"]) == 0


def test_large_pictures_that_differ_at_their_end_are_not_the_same(tmp_path):
    for split, shade in (("train", 1), ("test", 2)):
        (tmp_path / split / "ant").mkdir(parents=True)
        picture = Image.new("RGB", (1000, 800))
        picture.putpixel((999, 0), (shade, shade, shade))  # the file's last row: a BMP is written from below
        picture.save(tmp_path / split / "ant" / "0.bmp")
    splits = load_splits(tmp_path)
    assert count_duplicates(splits["train"], splits["test"]) == 0


def test_duplicates_are_found_in_images_that_are_no_files(tmp_path):
    write_split(tmp_path, "train", [1, 2])
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["ant"])})
    held = [{"bytes": (tmp_path / "train" / "ant" / "train0.png").read_bytes(), "path": None}] * 2
    packed = Dataset.from_dict({"image": held, "label": [0, 0]}, features=features)
    files = Dataset.from_dict(
        {"image": [str(tmp_path / "train" / "ant" / f"train{i}.png") for i in (0, 1)], "label": [0, 0]},
        features=features,
    )
    assert count_duplicates(files, packed) == 2
    assert count_duplicates(packed, files) == 1
