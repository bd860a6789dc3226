"""The toy world, local folders and Hub datasets all come out in one form, and what does not fit is named."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import datasets
import pytest
from conftest import ROOT
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from datasets import Image as ImageFeature
from PIL import Image

from hf_tgpt.data import DataWarning, class_names, decode_image, load_splits, load_toyworld, sources

SHARED_DATA = Path(os.environ.get("HF_TGPT_DATA", ROOT.parent / "shared" / "data"))
# The pictures made here are alike in all splits.
pytestmark = pytest.mark.filterwarnings("ignore:.*test images? (is|are) in the train split too")


def write_images(folder, count=1, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{number}{suffix}")


def write_splits(root, splits=("train", "val", "test"), classes=("big_cat", "ant"), count=2):
    for split in splits:
        for name in classes:
            write_images(root / split / name, count)
    return root


def files(dataset, root):
    records = dataset.cast_column("image", ImageFeature(decode=False))["image"]
    return [Path(record["path"]).relative_to(root).as_posix() for record in records]


def sizes(splits):
    return {split: len(data) for split, data in splits.items()}


def refuses(source, message, **options):
    with pytest.raises(ValueError, match=message):
        load_splits(source, **options)


# Toy world -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("toyworld", ("coloured_shapes", "photo")),
        ("toyworld:shapes", ("shapes", "photo")),
        ("toyworld:shapes/fog", ("shapes", "fog")),
    ],
)
def test_toyworld_sources_name_task_and_domain(monkeypatch, source, asked):
    calls = []

    def few_pictures(task, domain):
        calls.append((task, domain))
        return load_toyworld(task, domain, train_per_class=1, validation_per_class=1, test_per_class=1)

    monkeypatch.setattr(sources, "load_toyworld", few_pictures)
    splits = load_splits(source)
    assert calls == [asked]
    assert list(splits) == ["train", "validation", "test"]
    assert splits["train"].column_names == ["image", "label", "caption"]
    assert splits["train"][0]["image"].mode == "RGB"


def test_an_unknown_toyworld_task_is_refused():
    refuses("toyworld:cats", "`task`='cats'")


# Folders with splits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validation", ["val", "validation", "valid", "dev", "Val"])
def test_split_folders_become_splits(tmp_path, validation):
    splits = load_splits(str(write_splits(tmp_path, ("train", validation, "test"))))
    assert sizes(splits) == {"train": 4, "validation": 4, "test": 4}
    for split, folder in {"train": "train", "validation": validation, "test": "test"}.items():
        assert splits[split].column_names == ["image", "label"]
        assert class_names(splits[split]) == ["ant", "big cat"]
        assert splits[split]["label"][:] == [0, 0, 1, 1]
        assert files(splits[split], tmp_path) == [f"{folder}/{c}/{n}.png" for c in ("ant", "big_cat") for n in (0, 1)]
    assert splits["train"][0]["image"].size == (4, 4)


def test_files_are_not_opened(tmp_path):
    write_splits(tmp_path, ("train", "test"))
    (tmp_path / "train" / "ant" / "broken.jpg").write_text("no image")
    assert len(load_splits(tmp_path)["train"]) == 5


def test_images_are_found_by_suffix_at_any_depth_and_hidden_ones_are_not(tmp_path):
    write_splits(tmp_path, ("train", "test"), count=0)
    taken = ["a.JPG", "b.jpeg", "c.Png", "d.bmp", "e.webp", "f.gif", "g.tif", "h.tiff", "nested/deep/i.png"]
    ignored = ["._a.jpg", "notes.txt", "a.jpg.md5", ".cache/a.png"]
    for split in ("train", "test"):
        for name in ("ant", "big_cat"):
            for file in taken + ignored:
                path = tmp_path / split / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    left_out = r": left out: 2 \.md5, 2 \.txt"
    with pytest.warns(DataWarning, match=f"train{left_out}"), pytest.warns(DataWarning, match=f"test{left_out}"):
        train = load_splits(tmp_path)["train"]
    assert files(train, tmp_path) == [f"train/{name}/{file}" for name in ("ant", "big_cat") for file in taken]


def test_other_things_at_the_top_are_ignored(tmp_path):
    write_splits(tmp_path, ("train", "test"))
    write_images(tmp_path / ".thumbnails" / "x")
    write_images(tmp_path / "docs")
    for name in ("MANIFEST.json", ".DS_Store", "cover.png"):
        (tmp_path / name).touch()
    write_images(tmp_path / "train" / ".ipynb_checkpoints")
    with pytest.warns(DataWarning, match="beside the folders of its splits, these are left out: docs"):
        assert sizes(load_splits(tmp_path)) == {"train": 4, "test": 4}


def test_classes_are_those_of_train_even_if_test_lacks_one(tmp_path):
    write_images(tmp_path / "train" / "a")
    write_splits(tmp_path, ("train", "test"), ("b", "c"))
    splits = load_splits(tmp_path)
    assert splits["train"].features["label"] == splits["test"].features["label"] == ClassLabel(names=["a", "b", "c"])
    assert splits["test"]["label"][:] == [1, 1, 2, 2]


@pytest.mark.parametrize(("folder", "split"), [("val", "validation"), ("test", "test")])
def test_a_class_that_train_lacks_is_named(tmp_path, folder, split):
    write_splits(tmp_path)
    write_images(tmp_path / folder / "zebra")
    refuses(tmp_path, f"'zebra' in row 4 of the {split} split")


def test_without_a_test_folder_the_validation_folder_is_test_and_a_warning_says_so(tmp_path):
    write_splits(tmp_path, ("train", "val"))
    with pytest.warns(UserWarning, match="validation split is used for the test"):
        splits = load_splits(tmp_path)
    assert sizes(splits) == {"train": 4, "test": 4}
    assert files(splits["test"], tmp_path)[0] == "val/ant/0.png"


def test_incomplete_split_folders_are_refused(tmp_path):
    refuses(write_splits(tmp_path / "a", ("train",)), "neither a test nor a val folder")
    refuses(write_splits(tmp_path / "b", ("test",)), "no train folder")
    refuses(write_splits(tmp_path / "c", ("train", "val", "valid")), "two validation folders, val and valid")


def test_folders_without_classes_or_images_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "has no class folders")
    write_images(tmp_path / "flat")
    refuses(tmp_path / "flat", "has no class folders")
    for split in ("train", "test"):
        write_images(tmp_path / "unsorted" / split)
    refuses(tmp_path / "unsorted", "has no class folders")
    for split in ("train", "test"):
        (tmp_path / "hollow" / split / "ant").mkdir(parents=True)
    refuses(tmp_path / "hollow", "has no images in class folders")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_folder_without_a_picture_is_left_out_with_a_remark(tmp_path, split):
    (write_splits(tmp_path, ("train", "test")) / split / "hollow").mkdir()
    with pytest.warns(DataWarning, match="1 class folder is left out, for lack of a picture: hollow"):
        splits = load_splits(tmp_path)
    assert sizes(splits) == {"train": 4, "test": 4}
    assert class_names(splits["train"]) == ["ant", "big cat"]


def test_class_names_that_would_become_the_same_are_refused(tmp_path):
    refuses(write_splits(tmp_path, ("train", "test"), ("big_cat", "big cat")), "big cat, big_cat; rename one")


# Folders without splits ----------------------------------------------------------------------------------------------


def test_a_folder_without_splits_is_split_by_class_in_coops_proportions(tmp_path):
    write_images(tmp_path / "ant", 20)
    write_images(tmp_path / "big_cat", 10)
    splits = load_splits(tmp_path)
    counts = {split: Counter(data["label"]) for split, data in splits.items()}
    assert counts == {"train": {0: 10, 1: 5}, "validation": {0: 4, 1: 2}, "test": {0: 6, 1: 3}}
    everything = [file for data in splits.values() for file in files(data, tmp_path)]
    assert len(set(everything)) == 30
    assert class_names(splits["test"]) == ["ant", "big cat"]


@pytest.mark.parametrize("count", range(3, 12))
def test_every_split_gets_an_image_of_every_class(tmp_path, count):
    write_images(tmp_path / "ant", count)
    parts = sizes(load_splits(tmp_path))
    assert sum(parts.values()) == count
    assert min(parts.values()) >= 1
    assert parts["train"] >= parts["validation"]


def test_the_split_follows_the_seed(tmp_path):
    write_images(tmp_path / "ant", 20)
    once, again, other = (files(load_splits(tmp_path, seed=seed)["train"], tmp_path) for seed in (0, 0, 1))
    assert once == again
    assert once != other


def test_a_class_too_small_to_split_is_named(tmp_path):
    write_images(tmp_path / "ant", 3)
    write_images(tmp_path / "bee", 2)
    write_images(tmp_path / "cat", 1)
    with pytest.warns(DataWarning, match=r"2 classes are too small to be split .*: 'bee' \(2\), 'cat' \(1\)\. Of two"):
        splits = load_splits(tmp_path)
    assert {split: data["label"][:] for split, data in splits.items()} == {
        "train": [0, 1, 2], "validation": [0], "test": [0, 1]
    }  # fmt: skip


def test_a_folder_with_a_picture_for_each_class_has_nothing_to_test_with(tmp_path):
    write_images(tmp_path / "ant", 1)
    write_images(tmp_path / "bee", 1)
    with pytest.warns(DataWarning, match="too small"):
        refuses(tmp_path, "no class has 2 images, so nothing is left to test with")


def test_without_a_seed_what_is_not_split_is_all_to_be_tested(tmp_path):
    write_images(tmp_path / "ant", 1)
    write_images(tmp_path / "bee", 4)
    assert sizes(load_splits(tmp_path, seed=None)) == {"test": 5}
    assert sizes(load_splits(write_splits(tmp_path / "split"), seed=None)) == sizes(load_splits(tmp_path / "split"))


def test_a_class_may_be_called_train(tmp_path):
    write_images(tmp_path / "train", 3)
    write_images(tmp_path / "tram", 3)
    assert class_names(load_splits(tmp_path)["train"]) == ["train", "tram"]


def test_a_folder_of_domains_is_not_taken_for_one_of_classes(tmp_path):
    for domain in ("photo", "sketch"):
        write_splits(tmp_path / domain, ("train", "test"))
    refuses(tmp_path, "photo has splits of its own")
    assert sizes(load_splits(tmp_path / "sketch")) == {"train": 4, "test": 4}


# Captions ------------------------------------------------------------------------------------------------------------


def write_captions(root, entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False) for entry in entries]
    (root / "captions.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")


def captions_of_all(root):
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    return [{"file_name": path, "caption": f"Größe\u2028of {path}"} for path in paths]


def test_captions_go_to_their_images(tmp_path):
    write_captions(write_splits(tmp_path), captions_of_all(tmp_path))
    for data in load_splits(tmp_path).values():
        assert data["caption"][:] == [f"Größe\u2028of {file}" for file in files(data, tmp_path)]


def test_captions_follow_a_seeded_split(tmp_path):
    write_images(tmp_path / "ant", 6)
    write_captions(tmp_path, captions_of_all(tmp_path))
    for data in load_splits(tmp_path).values():
        assert data["caption"][:] == [f"Größe\u2028of {file}" for file in files(data, tmp_path)]


def test_missing_captions_are_counted_and_the_first_is_named(tmp_path):
    entries = captions_of_all(write_splits(tmp_path))
    write_captions(tmp_path, [entry for entry in entries if "train/big" not in entry["file_name"]])
    refuses(tmp_path, r"no caption for 2 of 4 images in .*train, the first is train/big_cat/0\.png")


@pytest.mark.parametrize("line", ["{", "[]", '"x"', '{"caption": "x"}', '{"file_name": "x", "caption": null}'])
def test_a_malformed_caption_is_named_by_its_line(tmp_path, line):
    write_captions(write_splits(tmp_path), [*captions_of_all(tmp_path)[:1], "", line])
    refuses(tmp_path, r"captions\.jsonl, line 3: .*; correct it")


def test_empty_and_repeated_captions_are_refused(tmp_path):
    write_splits(tmp_path)
    write_captions(tmp_path, [{"file_name": "a.png", "caption": " "}])
    refuses(tmp_path, r"line 1: a\.png has an empty caption")
    write_captions(tmp_path, [{"file_name": name, "caption": "x"} for name in ("a.png", "./a.png")])
    refuses(tmp_path, r"line 2: a\.png is there twice")


def test_a_caption_column_that_is_not_there_is_named(tmp_path):
    refuses(write_splits(tmp_path), "`caption_column`='text' .*available: image, label", caption_column="text")


# Paths and the Hub ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "data/no/where", "../x"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(monkeypatch, tmp_path, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("the Hub was asked"))
    with pytest.raises(FileNotFoundError, match=f"`source`={re.escape(repr(source))} does not exist"):
        load_splits(source)


def test_the_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_splits(tmp_path / "pets")
    assert len(load_splits("~/pets")) == 3


@pytest.mark.parametrize("source", ["user/pets", "pets", ""])
def test_a_failure_of_the_hub_names_the_source_and_what_it_may_be(monkeypatch, source):
    def fail(source):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    refuses(source, f"`source`='{source}' .*offline.*'toyworld:TASK', a folder that exists or the id")


def table(rows, **columns):
    """`rows` tiny pictures and further columns, each (feature, values)."""
    pictures = [Image.new("RGB", (4, 4), (row, 0, 0)) for row in range(rows)]
    features = {name: feature for name, (feature, _) in columns.items()}
    values = {name: list(values) for name, (_, values) in columns.items()}
    return Dataset.from_dict({"image": pictures, **values}, features=Features({"image": ImageFeature(), **features}))


def labelled(labels, names=("ant", "big_cat")):
    return table(len(labels), label=(ClassLabel(names=list(names)), labels))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Serves datasets as `load_dataset` does: from Parquet files, under the id "user/pets"."""

    def serve(**splits):
        for split, data in splits.items():
            data.to_parquet(tmp_path / f"{split}.parquet")

        def load_dataset(source):
            assert source == "user/pets"
            return DatasetDict(
                {
                    split: Dataset.from_parquet(str(tmp_path / f"{split}.parquet"), cache_dir=str(tmp_path / "cache"))
                    for split in splits
                }
            )

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    datasets.disable_progress_bars()
    yield serve
    datasets.enable_progress_bars()


def test_a_hub_dataset_comes_in_the_same_form(hub):
    hub(train=labelled([0, 1, 1]), validation=labelled([1]), test=labelled([0, 1]))
    splits = load_splits("user/pets")
    assert list(splits) == ["train", "validation", "test"]
    assert splits["train"].column_names == ["image", "label"]
    assert class_names(splits["train"]) == ["ant", "big cat"]
    assert splits["train"]["label"][:] == [0, 1, 1]
    assert decode_image(splits["train"][2]["image"]).getpixel((0, 0)) == (2, 0, 0)


def test_columns_are_found_by_type_and_others_dropped(hub):
    data = table(
        2,
        img_id=(Value("string"), "ab"),
        species=(ClassLabel(names=["x", "y"]), [1, 0]),
        caption=(Value("string"), "cd"),
    ).rename_column("image", "picture")
    hub(train=data, test=data)
    test = load_splits("user/pets")["test"]
    assert test.column_names == ["image", "label", "caption"]
    assert (test["label"][:], test["caption"][:]) == ([1, 0], ["c", "d"])


def test_string_labels_become_classes_in_the_order_of_train(hub):
    hub(
        train=table(3, labels=(Value("string"), ["bee", "ant", "big_cat"])),
        test=table(2, labels=(Value("string"), ["big_cat", "bee"])),
    )
    splits = load_splits("user/pets")
    assert splits["train"].features["label"] == splits["test"].features["label"]
    assert class_names(splits["test"]) == ["ant", "bee", "big cat"]
    assert splits["train"]["label"][:] == [1, 0, 2]
    assert splits["test"]["label"][:] == [2, 1]


def test_splits_that_number_their_classes_differently_are_brought_together(hub):
    hub(train=labelled([0, 1]), test=labelled([0, 1], ("big_cat", "ant")))
    assert load_splits("user/pets")["test"]["label"][:] == [1, 0]


def test_a_class_of_test_that_train_lacks_is_named(hub):
    hub(train=labelled([0, 1]), test=labelled([0, 1, 0], ("ant", "bee")))
    refuses("user/pets", "`label`='bee' in row 1 of the test split")


def test_several_candidates_are_listed_and_one_can_be_named(hub):
    fine, coarse = (ClassLabel(names=["a", "b"]), [0, 1]), (ClassLabel(names=["c", "d"]), [1, 0])
    data = table(2, fine_label=fine, coarse_label=coarse, mask=(ImageFeature(), [Image.new("L", (4, 4))] * 2))
    hub(train=data, test=data)
    refuses("user/pets", "`image_column`=None but several columns fit: image, mask")
    refuses("user/pets", "`label_column`=None but .*: fine_label, coarse_label", image_column="image")
    splits = load_splits("user/pets", image_column="mask", label_column="coarse_label")
    assert class_names(splits["test"]) == ["c", "d"]
    assert splits["test"][0]["image"].mode == "L"


def test_columns_that_do_not_serve_are_refused(hub):
    several = (Sequence(Value("string")), [["x"], ["y"]])
    data = table(2, label=(Value("int64"), [0, 1]), text=(Value("string"), "ab"), caption=several)
    hub(train=data, test=data)
    refuses("user/pets", "`label_column`='label' holds .*int64")
    refuses("user/pets", "`label_column`='kind' .*available: image, label, text, caption", label_column="kind")
    refuses("user/pets", "`image_column`='text' holds", image_column="text")
    refuses("user/pets", "`caption_column`='caption' holds", caption_column="caption", label_column="text")
    refuses("user/pets", "`caption_column`='text' name one column twice", caption_column="text", label_column="text")
    assert load_splits("user/pets", label_column="text")["train"].column_names == ["image", "label"]


def test_a_dataset_without_images_or_labels_is_refused(hub):
    data = table(2, kind=(Value("string"), "ab"))
    hub(train=data, test=data)
    refuses("user/pets", "`label_column`=None and no column holds the label; name one of: image, kind")
    data = data.remove_columns("image")
    hub(train=data, test=data)
    refuses("user/pets", "`image_column`=None and no column holds the image")


def test_a_missing_caption_is_named_by_its_row(hub):
    column = (Value("string"), ["x", None])
    data = table(2, label=(ClassLabel(names=["a", "b"]), [0, 1]), caption=column)
    hub(train=data, test=data)
    refuses("user/pets", "`caption`=None in row 1 of the train split")


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_the_hubs_validation_split_serves_where_there_is_no_test(hub, name):
    hub(**{"train": labelled([0, 1]), name: labelled([1])})
    with pytest.warns(UserWarning, match="validation split is used for the test"):
        assert sizes(load_splits("user/pets")) == {"train": 2, "test": 1}


def test_a_test_split_whose_labels_are_kept_back_is_none(hub):
    hub(train=labelled([0, 1]), validation=labelled([1]), test=labelled([-1, -1, -1]))
    with pytest.warns(UserWarning, match="validation split is used for the test"):
        assert sizes(load_splits("user/pets")) == {"train": 2, "test": 1}


def test_a_single_labelled_row_missing_is_an_error_not_a_missing_split(hub):
    hub(train=labelled([0, 1]), test=labelled([0, -1]))
    refuses("user/pets", "`label`=-1 in row 1")


@pytest.mark.parametrize("name", ["train", "full"])
def test_a_hub_dataset_of_one_split_is_split_by_class(hub, name):
    hub(**{name: labelled([0, 1] * 10)})
    assert sizes(load_splits("user/pets")) == {"train": 10, "validation": 4, "test": 6}


def test_a_hub_dataset_without_a_train_split_is_refused(hub):
    hub(first=labelled([0]), second=labelled([1]))
    refuses("user/pets", "no split 'train', only first, second")


# Real pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED_DATA / "dtd10").is_dir(), reason="needs the shared real pictures")
@pytest.mark.parametrize(("name", "classes"), [("dtd10", 10), ("caltech101", 100)])
def test_real_folders_load_in_full_and_decode_to_rgb(name, classes):
    root = SHARED_DATA / name
    listed = Counter(entry["path"].split("/")[0] for entry in json.loads((root / "MANIFEST.json").read_text())["files"])
    splits = load_splits(root)
    assert {split: len(data) for split, data in splits.items()} == {
        "train": listed["train"],
        "validation": listed["val"],
        "test": listed["test"],
    }
    names = class_names(splits["train"])
    assert len(names) == classes
    assert not any("_" in class_name for class_name in names)

    test = splits["test"].cast_column("image", ImageFeature(decode=False))
    grey = []
    for record in test["image"]:
        with Image.open(record["path"]) as image:
            if image.mode == "L":
                grey.append(record)
    assert bool(grey) == (name == "caltech101")
    assert {decode_image(record).mode for record in [*grey, test[0]["image"]]} == {"RGB"}
