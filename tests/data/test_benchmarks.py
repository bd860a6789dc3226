"""The catalogue's names are usable class names in CoOp's order, and they reach data of any layout and spelling."""

import json
import os
import warnings
from pathlib import Path

import datasets
import pytest
from conftest import ROOT
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_tgpt.data import BENCHMARKS, DataWarning, class_names, load_splits
from hf_tgpt.data.class_lists import clean_class_name, normalized_name, read_class_names, rename_classes
from hf_tgpt.utils.names import check_class_names

SHARED_DATA = Path(os.environ.get("HF_TGPT_DATA", ROOT.parent / "shared" / "data"))
CLASS_NAME_FILES = ROOT / "hf_tgpt" / "data" / "benchmark_classes"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_entry_has_distinct_class_names_and_usable_templates(name):
    entry = BENCHMARKS[name]
    assert entry.name == name
    assert len(entry.class_names()) == entry.num_classes
    check_class_names(entry.class_names())
    assert not any("_" in class_name for class_name in entry.class_names())
    assert all("{}" in template for template in entry.templates)
    assert entry.licence
    assert entry.tested_split in ("test", "validation")


def test_the_field_s_data_sets_are_there_and_every_file_of_names_is_used():
    assert len(BENCHMARKS) == 15
    assert sum(entry.only_tested for entry in BENCHMARKS.values()) == 4
    used = {entry.class_names_of or entry.name for entry in BENCHMARKS.values()}
    assert used == {file.stem for file in CLASS_NAME_FILES.iterdir()}


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_the_robustness_sets_have_imagenets_own_names(name):
    imagenet = BENCHMARKS["imagenet"].names()
    assert all(imagenet[synset] == class_name for synset, class_name in BENCHMARKS[name].names().items())


@pytest.mark.skipif(not (SHARED_DATA / "coop").is_dir(), reason="needs the shared split files")
@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("caltech101", "Caltech101"),
        ("dtd", "DescribableTextures"),
        ("eurosat", "EuroSAT"),
        ("flowers102", "OxfordFlowers"),
        ("oxford_pets", "OxfordPets"),
        ("stanford_cars", "StanfordCars"),
        ("ucf101", "UCF101"),
    ],
)
def test_names_and_order_are_those_of_coops_split_files(name, split):
    parts = json.loads((SHARED_DATA / "coop" / "splits" / f"split_zhou_{split}.json").read_text())
    names = {label: name for rows in parts.values() for _, label, name in rows}
    assert BENCHMARKS[name].class_names() == [clean_class_name(names[label]) for label in range(len(names))]


# Loading by name -----------------------------------------------------------------------------------------------------


def write_images(folder, count, shade):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (8, 8), (number, shade, 0)).save(folder / f"{number}.png")


@pytest.mark.parametrize("name", ["eurosat", "EuroSAT"])
def test_a_folder_gets_the_catalogues_names_and_order(tmp_path, name):
    for shade, folder in enumerate(["SeaLake", "AnnualCrop", "Highway or Road"]):
        write_images(tmp_path / folder, 4, shade)
    splits = load_splits(f"{name}:{tmp_path}")
    assert class_names(splits["train"]) == ["Annual Crop Land", "Highway or Road", "Sea or Lake"]
    assert splits["train"][0]["image"].getpixel((0, 0))[1] == 1  # an annual crop


def test_a_folder_with_other_classes_keeps_its_names_with_a_warning(tmp_path):
    for shade, folder in enumerate(["SeaLake", "Desert_(dry)"]):
        write_images(tmp_path / folder, 4, shade)
    with pytest.warns(UserWarning, match=r"EuroSAT in the data are not the catalogue's and are kept: .*\(Desert_\(dry"):
        splits = load_splits(f"eurosat:{tmp_path}")
    assert class_names(splits["train"]) == ["Desert dry", "SeaLake"]


def test_imagenets_validation_folder_is_tested_without_a_warning(tmp_path):
    for shade, split in enumerate(["train", "val"]):
        for number, synset in enumerate(["n01443537", "n04355933"]):
            write_images(tmp_path / split / synset, 2, 10 * shade + number)
    splits = load_splits(f"imagenet:{tmp_path}")
    assert list(splits) == ["train", "test"]
    assert class_names(splits["test"]) == ["goldfish", "sunglass"]


def test_a_robustness_set_is_a_test_split_alone(tmp_path):
    write_images(tmp_path / "n01498041", 2, 0)
    splits = load_splits(f"imagenet_a:{tmp_path}")
    assert {split: len(data) for split, data in splits.items()} == {"test": 2}
    assert class_names(splits["test"]) == ["stingray"]


@pytest.fixture
def hub(monkeypatch):
    """hub(id, **splits) serves datasets under the one id."""

    def serve(hub_id, **splits):
        def load_dataset(source):
            assert source == hub_id
            return DatasetDict(splits)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    return serve


def table(labels, feature, start=0, column="label"):
    pictures = [Image.new("RGB", (8, 8), (start + row, 0, 0)) for row in range(len(labels))]
    features = Features({"image": ImageFeature(), column: feature})
    return Dataset.from_dict({"image": pictures, column: labels}, features=features)


def test_a_catalogue_name_asks_the_hub_and_brings_its_classes_into_order(hub):
    feature = ClassLabel(names=["Zigzagged", "polka_dotted", "banded"])
    hub("tanganke/dtd", train=table([0, 1, 2], feature), test=table([2, 1], feature, start=10))
    splits = load_splits("dtd")
    assert class_names(splits["train"]) == ["banded", "polka-dotted", "zigzagged"]
    assert splits["train"]["label"][:] == [2, 1, 0]
    assert splits["test"]["label"][:] == [0, 1]


def test_class_numbers_get_the_catalogues_names(hub):
    hub("clip-benchmark/wds_imagenetv2", test=table([0, 999], Value("int64"), column="cls"))
    splits = load_splits("ImageNet V2")
    assert list(splits) == ["test"]
    names = class_names(splits["test"])
    assert [names[label] for label in splits["test"]["label"]] == ["tench", "toilet paper"]


def test_imagenets_long_names_on_the_hub_are_named_by_their_order(hub):
    feature = ClassLabel(names=[f"name, {i}" for i in range(1000)])
    hub("ILSVRC/imagenet-1k", train=table([1, 657], feature), validation=table([744], feature, start=9))
    splits = load_splits("imagenet")
    names = class_names(splits["train"])
    assert [names[label] for label in splits["train"]["label"]] == ["goldfish", "missile"]
    assert names[splits["test"]["label"][0]] == "projectile"


def test_an_unknown_name_is_answered_with_the_nearest(monkeypatch):
    def fail(source):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"`source`='caltec101' .* Did you mean 'caltech101'"):
        load_splits("caltec101")
    with pytest.raises(ValueError, match=r"Did you mean 'oxford_pets'\?"):
        load_splits("pets")


def test_a_set_without_a_copy_on_the_hub_asks_for_a_folder():
    with pytest.raises(ValueError, match=r"'UCF101' has no copy on the Hub .*'ucf101:FOLDER'"):
        load_splits("UCF101")
    with pytest.raises(FileNotFoundError, match="'ucf101:nowhere' does not exist"):
        load_splits("ucf101:nowhere")


# Names of the user's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [("car_side", "car side"), ("kite_(bird of prey)", "kite bird of prey"), (" a__b ", "a b"), ("plain", "plain")],
)
def test_names_are_cleaned_of_underscores_and_parentheses(name, words):
    assert clean_class_name(name) == words


@pytest.fixture
def pictures(tmp_path):
    for shade, name in enumerate(["ant", "bee", "cat"]):
        write_images(tmp_path / "pictures" / name, 4, shade)
    return tmp_path / "pictures"


@pytest.mark.parametrize(
    ("file", "text", "names", "label_of_cat"),
    [
        ("names.txt", "small ant\nhoney bee\nhouse cat\n", ["small ant", "honey bee", "house cat"], 2),
        ("names.txt", "Cat\nbee\nant\nunused\n", ["Cat", "bee", "ant"], 0),
        ("names.txt", "# mine\ncat\thouse cat\nant\nbee\thoney bee", ["house cat", "ant", "honey bee"], 0),
        ("names.json", '{"ant": "small ant", "bee": "bee", "cat": "house cat"}', ["small ant", "bee", "house cat"], 2),
        ("names.json", '{"ant": "bee", "bee": "ant", "cat": "cat"}', ["bee", "ant", "cat"], 2),
        ("names.json", '{"cat": "ant", "ant": "bee", "bee": "cat"}', ["ant", "bee", "cat"], 0),
        ("names.json", '{"x": "cat", "y": "ant", "z": "bee"}', ["cat", "ant", "bee"], 0),
        ("names.json", '["a", "b", "c"]', ["a", "b", "c"], 2),
    ],
)
def test_a_file_renames_and_orders_the_classes(tmp_path, pictures, file, text, names, label_of_cat):
    (tmp_path / file).write_text(text)
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always", DataWarning)
        splits = load_splits(pictures, class_names_file=tmp_path / file)
    renamed_by_position = text in ("small ant\nhoney bee\nhouse cat\n", '["a", "b", "c"]')
    assert ["'ant' -> " in str(remark.message) for remark in remarks] == [True] * renamed_by_position
    assert class_names(splits["test"]) == names
    cats = [row for row in splits["train"] if row["label"] == label_of_cat]
    assert {row["image"].getpixel((0, 0))[1] for row in cats} == {2}


@pytest.mark.parametrize("names", ["cat, ants, bee", "bees, cats, ants", "bee, x, y", "ants, cat, bees", "Cats, x, y"])
def test_a_list_that_names_a_class_in_anothers_place_is_refused(tmp_path, pictures, names):
    (tmp_path / "names.txt").write_text("\n".join(names.split(", ")))
    with pytest.raises(ValueError, match=r"would rename by position, 'ant' -> .* looks like the data's class"):
        load_splits(pictures, class_names_file=tmp_path / "names.txt")


@settings(max_examples=int(os.environ.get("HF_TGPT_NAMES", 50)))
@given(st.permutations(["ant", "bee", "cat", "dog"]), st.permutations(["ant", "bee", "cat", "dog"]))
def test_a_mapping_gives_every_class_the_name_that_stands_beside_its_own(keys, values):
    given = dict(zip(keys, values, strict=True))
    own = sorted(keys)
    labels = ClassLabel(names=own)
    splits = DatasetDict(train=Dataset.from_dict({"label": [0, 1, 2, 3]}, features=Features(label=labels)))
    renamed = rename_classes(splits, given)["train"]
    names_now = [renamed.features["label"].names[label] for label in renamed["label"]]
    assert names_now == [given[name] for name in own]


def test_a_mapping_that_could_mean_two_things_is_refused(tmp_path, pictures):
    (tmp_path / "names.json").write_text('{"ant": "bee", "x": "ant", "y": "cat", "bee": "z"}')
    with pytest.raises(ValueError, match="as the old name of one class and the new name of another"):
        load_splits(pictures, class_names_file=tmp_path / "names.json")


def test_folders_with_numbers_for_names_are_renamed_in_the_order_of_the_numbers(tmp_path):
    for number in range(12):
        write_images(tmp_path / "pictures" / str(number), 3, number)
    (tmp_path / "names.txt").write_text("\n".join(f"sign {number}" for number in range(12)))
    with pytest.warns(DataWarning, match="'1' -> 'sign 1', '2' -> 'sign 2'"):
        splits = load_splits(tmp_path / "pictures", class_names_file=tmp_path / "names.txt")
    for row in splits["train"]:
        assert row["image"].getpixel((0, 0))[1] == row["label"]


@settings(max_examples=int(os.environ.get("HF_TGPT_NAMES", 50)))
@given(st.permutations(["ant", "bee", "cat", "C", "C++", "🐝", "été"]), st.data())
def test_a_list_of_names_gives_every_class_its_own_name_or_is_refused(names, data):
    """A class whose name, or its plural, stands in the list keeps it; whatever the order."""
    given_names = [
        data.draw(st.sampled_from([name, name + "s", name.upper(), f"new {i}"]))
        for i, name in enumerate(data.draw(st.permutations(names)))
    ]
    own = names[:4]
    labels = ClassLabel(names=own)
    splits = DatasetDict(train=Dataset.from_dict({"label": [0, 1, 2, 3]}, features=Features(label=labels)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        try:
            renamed = rename_classes(splits, given_names[: data.draw(st.sampled_from([4, 7]))])["train"]
        except ValueError:
            return
    names_now = [renamed.features["label"].names[label] for label in renamed["label"]]
    of_the_data = {name.lower() + ending for name in own for ending in ("", "s")}
    for before, now in zip(own, names_now, strict=True):
        assert now.lower() in (before.lower(), before.lower() + "s") or now.lower() not in of_the_data


def test_coops_list_of_synsets_is_read(tmp_path):
    (tmp_path / "classnames.txt").write_text("n01440764 tench\nn01443537 gold fish\n")
    assert read_class_names(tmp_path / "classnames.txt") == {"n01440764": "tench", "n01443537": "gold fish"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x\ny", "lists 2, but the classes of the data are 3"),
        ("ant\tx\nbee\ty", r"does not name 1 of the data's 3 classes \(cat\); add them"),
        ("x\nX\ny", "holds 'X' twice"),
        ("", "pass a list with the name of every class"),
        ("ant\tx\nant\ty\nbee\nz", "names a class of the data twice"),
    ],
)
def test_a_file_of_names_that_does_not_fit_is_refused(tmp_path, pictures, text, message):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_splits(pictures, class_names_file=tmp_path / "names.txt")


def test_spellings_are_alike_up_to_case_and_punctuation():
    assert normalized_name("Polka_dotted") == normalized_name("polka-dotted") == normalized_name("polka dotted")
    assert len({normalized_name(name) for name in ("C", "C++", "C#", "🐝", "🐜")}) == 5
    assert normalized_name("737-300") != normalized_name("737-200")
