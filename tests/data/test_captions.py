"""Descriptions of images and classes reach the right images, and what they do not cover is counted."""

import hashlib
import io
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, ROOT, make_classifier
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoTokenizer

from hf_tgpt.data import BENCHMARKS, attach_captions, load_splits, read_class_descriptions
from hf_tgpt.encoders import encoder_of
from hf_tgpt.texts.zero_shot_head import zero_shot_head

SHARED_DATA = Path(os.environ.get("HF_TGPT_DATA", ROOT.parent / "shared" / "data"))
CUPL = SHARED_DATA / "descriptions" / "cupl"
NAMES = ["ant", "big cat"]


@pytest.fixture
def images(tmp_path):
    """Four pictures with folders, two of each class."""
    paths = []
    for shade, name in enumerate(["ant/a.png", "ant/b.png", "big_cat/a.png", "big_cat/c.png"]):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)
        paths.append(str(path))
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": paths, "label": [0, 0, 1, 1]}, features=features)


def test_one_description_serves_all_equal_pictures_of_a_data_set_without_files(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(picture, "PNG")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    rows = {"image": [{"bytes": picture.getvalue(), "path": None}] * 2, "label": [0, 0]}
    dataset = Dataset.from_dict(rows, features=features)
    key = "sha256:" + hashlib.sha256(picture.getvalue()).hexdigest()
    file = write(tmp_path / "captions.jsonl", {"file_name": key, "caption": "A grey square."})
    captioned, source = attach_captions(dataset, file)
    assert captioned["caption"][:] == ["A grey square."] * 2
    assert source == "descriptions"


def write(file, *lines):
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return file


def test_the_releases_lines_of_image_description_and_class(tmp_path, images):
    lines = ["big_cat/c.png\tA large cat.\tbig_cat", "other/a.png\tSome cat.\tbig cat", "b.png\tThe  ant.\tant"]
    file = write(tmp_path / "captions.txt", "ant/a.png\tOne ant.\tant", *lines)
    captioned, word = attach_captions(images, file)
    assert word == "descriptions"
    assert captioned["caption"][:] == ["One ant.", "The  ant.", "Some cat.", "A large cat."]
    assert captioned.column_names == ["image", "label", "caption"]


def test_lines_without_a_class_are_found_by_their_path(tmp_path, images):
    names = ["ant/a.png", "ant/b.png", "big_cat/a.png", "big_cat/c.png"]
    file = write(tmp_path / "captions.txt", *(f"{name}\tabout {name}" for name in reversed(names)))
    assert attach_captions(images, file)[0]["caption"][:] == [f"about {name}" for name in names]


def test_json_lines_and_a_column_are_descriptions(tmp_path, images):
    file = write(tmp_path / "c.jsonl", *({"file_name": path, "caption": path[-5]} for path in paths_of(images)))
    captioned, word = attach_captions(images, file)
    assert (captioned["caption"][:], word) == (["a", "b", "a", "c"], "descriptions")
    assert attach_captions(captioned) == (captioned, "descriptions")
    replaced, word = attach_captions(captioned, write_classes(tmp_path))
    assert word == "class descriptions"
    assert set(replaced["caption"]) <= {"An ant.", "It has six legs.", "A cat."}


def paths_of(images):
    return [record["path"] for record in images.cast_column("image", ImageFeature(decode=False))["image"]]


def write_classes(folder, **more):
    classes = {"Ant": ["An ant.", "It has six\nlegs."], "big_cat": ["A cat."], "zebra": ["Stripes."]} | more
    return write(folder / "classes.json", json.dumps(classes))


def test_class_descriptions_are_chosen_by_seed_and_row(tmp_path, images):
    file = write_classes(tmp_path)
    many = images.select([0] * 20 + [2])
    captioned, word = attach_captions(many, file, seed=1)
    assert word == "class descriptions"
    assert set(captioned["caption"][:20]) == {"An ant.", "It has six legs."}
    assert captioned["caption"][20] == "A cat."
    assert attach_captions(many, file, seed=1)[0]["caption"][:] == captioned["caption"][:]
    assert attach_captions(many, file, seed=2)[0]["caption"][:] != captioned["caption"][:]


def test_without_anything_the_template_says_the_class(images):
    captioned, word = attach_captions(images, template="{} texture.")
    assert word == "template"
    assert captioned["caption"][:] == ["ant texture."] * 2 + ["big cat texture."] * 2


def test_images_that_are_not_described_are_counted_and_get_the_template(tmp_path, images):
    file = write(tmp_path / "captions.txt", "ant/a.png\tOne ant.")
    with pytest.warns(UserWarning, match=r"describes 1 of 4 images; the other 3 get 'a photo of a \{\}\.'"):
        captioned, word = attach_captions(images, file)
    assert word == "descriptions"
    assert captioned["caption"][:] == ["One ant.", "a photo of a ant.", *["a photo of a big cat."] * 2]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "zebra/z.png\tStripes.", r"describes none of the 4 images: it names zebra/z\.png"),
        ("c.txt", "", "it names no image"),
        ("c.txt", "ant/a.png", r"line 1: 'ant/a\.png' is not image<TAB>description<TAB>class"),
        ("c.txt", "a\tb\nant/a.png\t ", r"line 2: ant/a\.png has an empty caption"),
        ("c.txt", "a\tb\n./a\tc", "line 2: a is there twice"),
        ("c.jsonl", '{"file_name": "a"}', "line 1: .*; correct it"),
        ("c.json", "[]", "is not a JSON object"),
        ("c.json", '{"ant": ["x"], "big cat": [" "]}', "' ' is not a sentence"),
        ("c.json", '{"ant": ["x"], "cat": ["y"]}', r"for 1 of 2 classes \(big cat\), but for others \(cat\); add"),
    ],
)
def test_descriptions_that_do_not_serve_are_refused(tmp_path, images, name, text, message):
    with pytest.raises(ValueError, match=message):
        attach_captions(images, write(tmp_path / name, text))


def test_missing_descriptions_are_named(images):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt' do not exist"):
        attach_captions(images, "nowhere.txt")


def test_captions_of_a_folder_need_only_cover_what_is_trained_on(tmp_path):
    for shade, split in enumerate(["train", "test"]):
        (tmp_path / split / "ant").mkdir(parents=True)
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / split / "ant" / "0.png")
    write(tmp_path / "captions.jsonl", {"file_name": "train/ant/0.png", "caption": "An ant."})
    splits = load_splits(tmp_path)
    assert splits["train"]["caption"][:] == ["An ant."]
    assert splits["test"].column_names == ["image", "label"]


# Class descriptions in the zero-shot head ----------------------------------------------------------------------------


def test_a_head_of_class_sentences_is_that_of_the_same_templates(load_clip):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "clip")
    templates, names = ["a photo of a {}.", "a drawing of a {}."], ["cat", "red circle"]
    sentences = {name: [template.replace("{}", name) for template in templates] for name in reversed(names)}
    clip = load_clip()
    heads = [zero_shot_head(encoder_of(clip), names, texts, tokenizer) for texts in (sentences, templates)]
    torch.testing.assert_close(*heads)
    long = sentences | {"cat": ["cat " * 100]}  # cut to the context
    model = make_classifier("zero_shot", clip, names, templates=long).eval()
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="no sentences for 'forest'; add at least one"):
        zero_shot_head(encoder_of(clip), [*names, "forest"], sentences, tokenizer)


@pytest.mark.skipif(not CUPL.is_dir(), reason="needs the shared class descriptions")
@pytest.mark.parametrize(("name", "file", "count"), [("oxford_pets", "pets", 740), ("dtd", "texture", 2820)])
def test_published_class_descriptions_fit_the_catalogue(name, file, count):
    names = BENCHMARKS[name].class_names()
    sentences = read_class_descriptions(CUPL / f"{file}_prompts_full.json", names)
    assert list(sentences) == names
    assert sum(map(len, sentences.values())) == count


@pytest.mark.skipif(not CUPL.is_dir(), reason="needs the shared class descriptions")
def test_published_class_descriptions_under_other_names_are_named():
    with pytest.raises(ValueError, match=r"for 8 of 100 classes \(face, car side, .*but for others \(.*side of a car"):
        read_class_descriptions(CUPL / "cal_prompts_full.json", BENCHMARKS["caltech101"].class_names())
