"""People's folders as they are: splits by other names, systems' folders, folders in folders, odd files."""

import itertools
import json
import os
import unicodedata
import warnings

import pytest
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_tgpt.data import DataWarning, class_names, load_splits
from hf_tgpt.data.readers.folders import is_picture, split_of

INPUTS = int(os.environ.get("HF_TGPT_FOLDERS", 20))  # of the property test; see tests/FAULTS.md
SPLITS = {
    "train": ["train", "Training", "TRAIN", "train ", "training_set", "trainset", "Train-Images", "train_data"],
    "validation": ["val", "Validation", "valid", "dev", "eval", "validation_set", "Val Images"],
    "test": ["test", "Testing", "TEST", "test_set", "testset", "holdout", "hold-out", "test_images"],
}
shades = itertools.count(1)


def write(folder, count=2, suffix=".png"):
    """Pictures of which no two are alike."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        shade = next(shades)
        picture = Image.new("RGB", (4, 4), (shade % 256, shade // 256 % 256, shade // 65536))
        picture.save(folder / f"{number}{suffix}", format=None if suffix else "PNG")


def quietly(folder):
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        splits = load_splits(folder)
    return splits, [str(remark.message) for remark in remarks]


@pytest.mark.parametrize(("split", "name"), [(split, name) for split, names in SPLITS.items() for name in names])
def test_a_split_is_known_by_its_usual_names(split, name):
    assert split_of(name) == split


@pytest.mark.parametrize("name", ["trains", "cat", "set", "testimony", "trainer", "value", "images", "", "contest"])
def test_other_names_are_no_splits(name):
    assert split_of(name) is None


@pytest.mark.parametrize("names", [("set1", "set2"), ("alt", "neu"), ("fold_a", "fold_b", "fold_c")])
def test_folders_that_hold_the_same_folders_are_refused_as_classes(tmp_path, names):
    for name in names:
        for inner in ("cat", "dog"):
            write(tmp_path / name / inner)
    with pytest.raises(ValueError, match=r"contain the same folders \(cat, dog\), so they look like splits"):
        load_splits(tmp_path)


def test_folders_within_class_folders_are_remarked(tmp_path):
    for inner in ("animal/cat", "animal/dog", "plant/rose"):
        write(tmp_path / inner, 3)
    with pytest.warns(
        DataWarning, match=r"2 class folders contain folders themselves \(animal: cat, dog; plant: rose\)"
    ):
        splits = load_splits(tmp_path)
    assert class_names(splits["train"]) == ["animal", "plant"]


@pytest.mark.parametrize("system", ["@eaDir", "lost+found", "__pycache__", "__MACOSX", "$RECYCLE.BIN", ".thumbs"])
def test_folders_of_systems_are_no_data(tmp_path, system):
    for name in ("cat", "dog", system, f"cat/{system}"):
        write(tmp_path / name, 4)
    splits, remarks = quietly(tmp_path)
    assert class_names(splits["train"]) == ["cat", "dog"]
    assert sum(map(len, splits.values())) == 8
    assert not remarks


@pytest.mark.parametrize("run", ["runs/coop-1", "my-run", "runs/a"])
def test_the_output_of_a_training_is_no_data(tmp_path, run):
    for name in ("cat", "dog", run):
        write(tmp_path / name, 3)
    (tmp_path / run / "run.json").write_text("{}")
    assert class_names(quietly(tmp_path)[0]["train"]) == ["cat", "dog"]


def test_a_name_is_the_same_however_a_system_writes_its_accents(tmp_path):
    for split, form in {"train": "NFC", "test": "NFD"}.items():
        for name in ("café", "naïve"):
            write(tmp_path / split / unicodedata.normalize(form, name))
    splits, remarks = quietly(tmp_path)
    assert class_names(splits["train"]) == class_names(splits["test"]) == ["café", "naïve"]
    assert not remarks


def test_all_kinds_of_pictures_are_read_and_others_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_tgpt.data.readers.folders.reads_heic", lambda: False)
    for suffix in (".jpg", ".JFIF", ".avif", ".webp", "", ".tiff"):
        write(tmp_path / "cat" / (suffix.strip(".") or "none"), 1, suffix.lower())
    write(tmp_path / "dog", 3)
    for odd in ("a.heic", "b.HEIC", "c.cr2", "notes"):
        (tmp_path / "dog" / odd).write_bytes(b"no picture")
    splits, remarks = quietly(tmp_path)
    assert sum(map(len, splits.values())) == 9
    left_out = 'left out: 1 .cr2, 2 .heic, 1 without suffix (pip install "hf-tgpt[heic]" reads .heic)'
    assert sum(left_out in remark for remark in remarks) == 1


def test_a_file_counts_as_a_picture_by_its_suffix_or_its_first_bytes(tmp_path):
    write(tmp_path, 1, "")
    (tmp_path / "text").write_text("a cat")
    (tmp_path / "damaged.jpg").write_text("a cat")
    assert [is_picture(tmp_path / name) for name in ("0", "text", "damaged.jpg", "missing.jpg", ".")] == [
        True, False, True, False, False
    ]  # fmt: skip


NAMES = st.sampled_from(["cat", "dog", "café", "Blau (hell)", "größe", "a b", "x_y", "train", "[1]", "été*", "日本"])


@settings(max_examples=INPUTS, deadline=None)
@given(
    classes=st.lists(NAMES, min_size=2, max_size=4, unique=True),
    splits=st.one_of(
        st.none(),
        st.tuples(*(st.sampled_from(SPLITS[split]) for split in ("train", "test"))),
        st.tuples(*(st.sampled_from(SPLITS[split]) for split in ("train", "validation", "test"))),
    ),
    form=st.sampled_from(["NFC", "NFD"]),
    junk=st.lists(st.sampled_from(["@eaDir/x.png", "Thumbs.db", ".DS_Store", "lost+found/a", "note.txt"]), max_size=2),
    data=st.data(),
)
def test_a_folder_is_read_as_it_is_meant(tmp_path_factory, classes, splits, form, junk, data):
    """Every picture comes out once, in its split, under its folder's name; nothing else does."""
    root = tmp_path_factory.mktemp("folder")
    truth = {}
    for place in splits or ("",):
        for name in classes:
            folder = root / place / unicodedata.normalize(form, name)
            count = data.draw(st.integers(3, 4))
            write(folder, count)
            for path in folder.iterdir():
                truth[str(path)] = (split_of(place) if place else None, name)
            for file in junk:
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_bytes(b"")
    loaded, _ = quietly(root)
    rows = {}
    for split, dataset in loaded.items():
        names = class_names(dataset)
        for row in dataset.cast_column("image", ImageFeature(decode=False)):
            rows[row["image"]["path"]] = split, names[row["label"]]
    assert rows.keys() == truth.keys()
    for path, (split, name) in truth.items():
        cleaned = " ".join(name.replace("_", " ").replace("(", " ").replace(")", " ").split())
        assert rows[path][1] == cleaned, json.dumps(path)
        assert split is None or rows[path][0] == split
