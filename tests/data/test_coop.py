"""CoOp's split files and published few-shot draws give exactly the partition that they name."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from hf_tgpt.data import class_names, load_coop_split, load_splits, sample_few_shot, select_draw
from hf_tgpt.data.readers.coop import image_paths, match_images

SHARED_DATA = Path(os.environ.get("HF_TGPT_DATA", ROOT.parent / "shared" / "data"))
CLASSES = {"Faces": "face", "car_side": "car_side"}  # folder -> class name; label order is not alphabetical


def write_picture(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade % 256, shade // 256, 0)).save(path)


def entries(numbers):
    return [
        [f"{folder}/image_{number:04d}.jpg", label, name]
        for label, (folder, name) in enumerate(CLASSES.items())
        for number in numbers
    ]


PARTITION = {"train": entries([5, 1, 3]), "val": entries([2]), "test": entries([4, 6])}


def write_split(root, partition=PARTITION, name="split_zhou_Made.json"):
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(partition))
    return root / name


# Where each layout keeps the picture that the split file calls folder/file.
LAYOUTS = {
    "as released": lambda split, folder, file: f"images/{folder}/{file}",
    "sorted by split and class": lambda split, folder, file: f"{split}/{CLASSES[folder]}/{file}",
    "in flattened names": lambda split, folder, file: f"{split}/{CLASSES[folder]}/{folder}_{file}",
    "class names as words": lambda split, folder, file: f"{CLASSES[folder].replace('_', ' ').title()}/{file}",
}


def write_layout(root, layout, partition=PARTITION):
    for split, rows in partition.items():
        for number, (path, _, _) in enumerate(rows):
            write_picture(root / LAYOUTS[layout](split, *path.split("/")), number + 20 * len(split))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_files_partition_in_its_order(tmp_path, layout):
    write_layout(tmp_path, layout)
    splits = load_coop_split(write_split(tmp_path), tmp_path)
    assert list(splits) == ["train", "val", "test"]
    for split, rows in PARTITION.items():
        assert splits[split]["label"][:] == [label for _, label, _ in rows]
        expected = [str(tmp_path / LAYOUTS[layout](split, *path.split("/"))) for path, _, _ in rows]
        assert image_paths(splits[split]) == expected
        assert splits[split].features["label"].names == ["face", "car_side"]
    assert splits["train"][0]["image"].size == (8, 8)


@pytest.mark.parametrize("given", ["split_zhou_Made.json", "absolute"])
def test_load_splits_takes_the_split_file_and_cleans_its_names(tmp_path, given):
    write_layout(tmp_path, "in flattened names")
    file = write_split(tmp_path)
    splits = load_splits(tmp_path, splits=file if given == "absolute" else given)
    assert {split: len(data) for split, data in splits.items()} == {"train": 6, "validation": 2, "test": 4}
    assert class_names(splits["train"]) == ["face", "car side"]
    assert splits["train"]["label"][:] == [0, 0, 0, 1, 1, 1]


def test_coops_own_folder_needs_no_option(tmp_path):
    write_layout(tmp_path, "as released")
    write_split(tmp_path)
    assert class_names(load_splits(tmp_path)["test"]) == ["face", "car side"]
    write_split(tmp_path, name="split_zhou_Other.json")
    with pytest.raises(ValueError, match=r"has 2 split files, split_zhou_Made\.json and others; name one as `splits`"):
        load_splits(tmp_path)


def test_files_without_folders_are_found_by_name(tmp_path):
    rows = [["Abyssinian_1.jpg", 0, "abyssinian"], ["beagle_1.jpg", 1, "beagle"]]
    for shade, (path, _, name) in enumerate(rows):
        write_picture(tmp_path / "train" / name / path, shade)
    splits = load_coop_split(write_split(tmp_path, {"train": rows}), tmp_path)
    assert [Path(path).name for path in image_paths(splits["train"])] == ["Abyssinian_1.jpg", "beagle_1.jpg"]


def test_files_of_one_name_and_class_are_told_apart_by_their_folder(tmp_path):
    rows = {"train": [["cars_train/05266.jpg", 0, "Audi"]], "test": [["cars_test/05266.jpg", 0, "Audi"]]}
    for shade, split in enumerate(rows):
        write_picture(tmp_path / f"cars_{split}" / "05266.jpg", shade)
    splits = load_coop_split(write_split(tmp_path, rows), tmp_path)
    assert {split: Path(image_paths(data)[0]).parent.name for split, data in splits.items()} == {
        "train": "cars_train",
        "test": "cars_test",
    }


def test_a_picture_that_could_be_two_is_refused():
    files = ["train/ant/1.jpg", "test/ant/1.jpg"]
    with pytest.raises(ValueError, match=r"'split.json': ants/1\.jpg could be any of 2 pictures"):
        match_images([("ants/1.jpg", "ant")], Path("split.json"), files)
    assert match_images([("test/ant/1.jpg", "ant"), ("bee/1.jpg", "bee")], Path("split.json"), files) == [1, None]


def test_missing_images_are_counted_and_the_first_five_named(tmp_path):
    write_layout(tmp_path, "as released")
    for number in (1, 3, 5):
        for folder in CLASSES:
            (tmp_path / "images" / folder / f"image_{number:04d}.jpg").unlink()
    five = ", ".join(path for path, _, _ in PARTITION["train"][:5])
    with pytest.raises(ValueError, match=f"names 6 of 12 images that are not in .*; the first are {five}\\. Add them"):
        load_coop_split(write_split(tmp_path), tmp_path)


def test_class_names_that_differ_from_the_folders_are_named(tmp_path):
    write_layout(tmp_path, "sorted by split and class")
    for split in PARTITION:
        (tmp_path / split / "face").rename(tmp_path / split / "human")
    message = "no folder is named like the file's face, and no class like the folder's human; rename"
    with pytest.raises(ValueError, match=message):
        load_coop_split(write_split(tmp_path), tmp_path)


def test_images_in_train_and_in_test_are_counted(tmp_path):
    write_layout(tmp_path, "as released")
    file = write_split(tmp_path, PARTITION | {"test": PARTITION["train"][:2] + PARTITION["test"]})
    with pytest.warns(UserWarning, match="has 2 images both in train and in test"):
        load_coop_split(file, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a split file"),
        ("[]", "is not a split file"),
        ('{"train": [["a.jpg", 0]]}', "is not a split file"),
        ('{"train": []}', "no training images"),
        ('{"train": [["a.jpg", 0, "a"], ["b.jpg", 0, "b"]]}', r"calls label 0 both 'a' and 'b' \(b\.jpg\)"),
        ('{"train": [["a.jpg", 1, "a"]]}', "labels from 1 to 1; number from 0"),
        ('{"train": [["a.jpg", 0, "a"], ["b.jpg", 1, "a"]]}', "several labels to the class 'a'"),
    ],
)
def test_a_damaged_split_file_is_refused(tmp_path, content, message):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_coop_split(tmp_path / "split.json", tmp_path)


def test_a_split_file_or_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"split\.json' does not exist"):
        load_coop_split(tmp_path / "split.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere' is not a folder"):
        load_coop_split(write_split(tmp_path), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="needs a folder with the pictures"):
        load_splits("toyworld", splits=tmp_path / "split_zhou_Made.json")


# Few-shot draws ------------------------------------------------------------------------------------------------------


def write_draw(file, **parts):
    draw = {
        split: {
            "data": [{"impath": f"./data/made/{path}", "label": label, "classname": name} for path, label, name in rows]
        }
        for split, rows in parts.items()
    }
    file.write_text(json.dumps(draw))
    return file


def test_a_published_draw_selects_its_pictures(tmp_path):
    write_layout(tmp_path, "in flattened names")
    write_split(tmp_path)
    rows = [PARTITION["train"][1], PARTITION["train"][3]]
    draw = write_draw(tmp_path / "shot_1-seed_1.json", train=rows, val=PARTITION["val"])
    splits = load_splits(tmp_path, splits="split_zhou_Made.json", draw=draw)
    names = [Path(path).name for path in image_paths(splits["train"])]
    assert names == ["Faces_image_0001.jpg", "car_side_image_0005.jpg"]
    assert {split: len(data) for split, data in splits.items()} == {"train": 2, "validation": 2, "test": 4}
    assert len(load_coop_split(draw, tmp_path)["train"]) == 2


def test_a_draw_from_other_data_is_refused(tmp_path):
    write_layout(tmp_path, "as released")
    splits = load_splits(tmp_path, splits=write_split(tmp_path))
    draw = write_draw(tmp_path / "draw.json", train=PARTITION["test"])
    with pytest.raises(ValueError, match=r"draws 4 of 4 pictures that the train split does not have"):
        select_draw(draw, splits)


# The published files -------------------------------------------------------------------------------------------------

needs_pictures = pytest.mark.skipif(not (SHARED_DATA / "dtd10").is_dir(), reason="needs the shared real pictures")


@needs_pictures
@pytest.mark.parametrize(
    ("folder", "file"),
    [("caltech101", "split_zhou_Caltech101.subset.json"), ("dtd10", "split_zhou_DescribableTextures.subset.json")],
)
def test_real_pictures_are_coops_partition(folder, file):
    root = SHARED_DATA / folder
    written = json.loads((root / file).read_text())
    manifest = json.loads((root / "MANIFEST.json").read_text())["files"]
    place = {entry["source"].partition("/")[2]: entry["path"] for entry in manifest}
    splits = load_coop_split(root / file, root)
    for split, rows in written.items():
        assert image_paths(splits[split]) == [str((root / place[path]).absolute()) for path, _, _ in rows]
        assert splits[split]["label"][:] == [label for _, label, _ in rows]
    names = {label: name for _, label, name in written["train"]}
    assert splits["train"].features["label"].names == [names[label] for label in range(len(names))]
    assert sum(map(len, load_splits(root, splits=file).values())) == len(manifest)


@needs_pictures
@pytest.mark.parametrize("shots", [1, 4, 16])
def test_a_published_draw_of_real_pictures_is_used_as_it_is(tmp_path, shots):
    root = SHARED_DATA / "dtd10"
    splits = load_splits(root, splits="split_zhou_DescribableTextures.subset.json")
    file = SHARED_DATA / "coop" / "indices" / "dtd" / f"shot_{shots}-seed_1.json"
    with pytest.raises(ValueError, match=f"draws {37 * shots} of {47 * shots} pictures"):
        select_draw(file, splits)
    ours = set(class_names(splits["train"]))
    draw = json.loads(file.read_text())
    for part in draw.values():
        part["data"] = [entry for entry in part["data"] if entry["classname"] in ours]
    (tmp_path / "draw.json").write_text(json.dumps(draw))
    drawn = select_draw(tmp_path / "draw.json", splits)
    assert Counter(drawn["train"]["label"]) == dict.fromkeys(range(10), shots)
    assert Counter(drawn["validation"]["label"]) == dict.fromkeys(range(10), min(4, shots))
    assert [Path(path).name for path in image_paths(drawn["train"])] == [
        Path(entry["impath"]).name for entry in draw["train"]["data"]
    ]
    # A draw of exactly as many shots is left as it is by our own sampling.
    again = sample_few_shot(drawn["train"], shots)
    assert set(image_paths(again)) == set(image_paths(drawn["train"]))


@pytest.mark.skipif(not (SHARED_DATA / "coop").is_dir(), reason="needs the shared split files")
@pytest.mark.parametrize(
    ("name", "split"),
    [("caltech101", "Caltech101"), ("dtd", "DescribableTextures"), ("oxford_pets", "OxfordPets")],
)
def test_published_draws_are_indices_into_the_published_splits(name, split):
    whole = json.loads((SHARED_DATA / "coop" / "splits" / f"split_zhou_{split}.json").read_text())
    for file in (SHARED_DATA / "coop" / "indices" / name).glob("*.json"):
        for part, drawn in json.loads(file.read_text()).items():
            files = [path for path, _, _ in whole[part]]
            wanted = [(entry["impath"], entry["classname"]) for entry in drawn["data"]]
            assert match_images(wanted, file, files, classes=[name for _, _, name in whole[part]]) == drawn["indices"]


@needs_pictures
def test_a_split_file_for_more_pictures_than_there_are_is_refused():
    message = r"names 6979 of 7349 images that are not in .*pets37; the first are Abyssinian_122\.jpg"
    with pytest.raises(ValueError, match=message):
        load_coop_split(SHARED_DATA / "coop" / "splits" / "split_zhou_OxfordPets.json", SHARED_DATA / "pets37")


@needs_pictures
def test_each_domain_of_pacs_is_a_folder_of_its_own():
    photo, sketch = (load_splits(SHARED_DATA / "pacs" / domain) for domain in ("photo", "sketch"))
    assert class_names(photo["train"]) == class_names(sketch["test"])
    assert {split: len(data) for split, data in sketch.items()} == {"train": 224, "test": 252}
    with pytest.raises(ValueError, match="art_painting has splits of its own, so it is not a class"):
        load_splits(SHARED_DATA / "pacs")
