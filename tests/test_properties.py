"""Promises that hold for any class list, any data set, any shape and any dtype, tried on generated ones."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import HEADS, METHODS, SHAPES, pixels
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from PIL import Image

from hf_tgpt.data import ImageTransform, sample_few_shot
from hf_tgpt.data.class_lists import clean_class_name, normalized_name, read_class_names

EACH = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))

NAMES = [
    "猫",
    "🐈‍⬛",
    "قطة",
    "חתול",
    "\u202eright to left",
    "naïve café",
    "Ω",
    "a" * 60,
    "<|endoftext|>",
    "{}",
    "%s",
    "\\n",
    "'",
]
NAME = st.sampled_from(NAMES) | st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


def same_to_clip(name):
    return " ".join(name.lower().split())


CLASSES = st.lists(NAME.filter(str.strip), min_size=1, max_size=6, unique_by=same_to_clip)


@settings(max_examples=30, **EACH)
@given(names=CLASSES)
def test_any_distinct_names_come_back_from_a_saved_config(names, tmp_path):
    for method in METHODS.values():
        method.config(class_names=names).save_pretrained(tmp_path)
        # The config alone, without weights, is read as JSON.
        content = json.loads((tmp_path / "adapter_config.json").read_text())
        assert type(method.config())(**{"class_names": content["class_names"]}).class_names == names


@settings(max_examples=100, **EACH)
@given(names=CLASSES)
def test_names_come_back_from_a_file_without_the_blanks_around_them(names, tmp_path):
    names = [name.strip() for name in names]
    assume(not any(name.startswith("# ") or name[:1] == "\ufeff" for name in names))
    (tmp_path / "names.txt").write_text("\n".join(names), encoding="utf-8")
    (tmp_path / "names.json").write_text(json.dumps(names))
    assert read_class_names(tmp_path / "names.txt") == read_class_names(tmp_path / "names.json") == names


@given(name=NAME)
@settings(max_examples=200, **EACH)
def test_cleaning_a_name_twice_is_cleaning_it_once_and_keeps_its_spelling(name):
    assert clean_class_name(clean_class_name(name)) == clean_class_name(name)
    assert normalized_name(clean_class_name(name)) == normalized_name(name)


@settings(max_examples=4, **EACH)
@given(
    names=CLASSES,
    shape=st.sampled_from(list(SHAPES)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    count=st.integers(1, 3),
)
# Of heads on frozen features one of each kind.
@pytest.mark.parametrize("name", [name for name in METHODS if name not in HEADS or name in ("gda", "clip_adapter")])
def test_an_adapter_scores_any_classes_or_names_what_does_not_fit(name, names, shape, dtype, count, load_clip):
    clip = load_clip(shape).to(dtype)
    try:
        model = get_peft_model(clip, METHODS[name].config(class_names=names)).eval()
    except ValueError as error:
        if not re.search(
            "the class name .*(context holds|which ends a sentence)|which are the same tokens", str(error)
        ):
            raise
        return
    logits = model(pixels(model, count).to(dtype)).logits
    assert logits.shape == (count, len(names))
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ["maple", "tgpt", "coop"])
def test_ten_thousand_classes_are_encoded_in_chunks_and_score_as_few_do(name, load_clip):
    words = ["cat", "dog", "circle", "forest", "red", "blue", "square", "photo", "green", "stripe"]
    names = [" ".join(words[int(digit)] for digit in f"{i:04}") for i in range(10_000)]
    clip = load_clip()
    config = METHODS[name].config(class_names=names)
    torch.manual_seed(0)
    many = get_peft_model(clip, config).eval()
    batch = pixels(many)
    with torch.no_grad():
        logits = many(batch).logits
        assert logits.shape == (3, 10_000)
        if METHODS[name].open:
            some = [7, 4_321, 9_999]
            many.set_class_names([names[i] for i in some])
            torch.testing.assert_close(many(batch).logits, logits[:, some], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["maple", "tgpt", "coop"])
def test_a_name_of_two_hundred_tokens_is_named_among_ten_thousand(name, load_clip):
    names = [f"cat {i}" for i in range(9_999)] + ["dog " * 200]
    with pytest.raises(ValueError, match=r"the class name 'dog dog .* context holds 30; shorten it"):
        get_peft_model(load_clip(), METHODS[name].config(class_names=names))


@settings(max_examples=100, **EACH)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=40), shots=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_a_draw_has_so_many_pictures_of_each_class_and_none_twice(labels, shots, seed):
    features = Features({"row": Value("int64"), "label": ClassLabel(names=list("abcde"))})
    data = Dataset.from_dict({"row": range(len(labels)), "label": labels}, features=features)
    few = sample_few_shot(data, shots, seed, allow_fewer=True)
    assert len(set(few["row"])) == len(few)
    assert [labels[row] for row in few["row"]] == few["label"][:] == sorted(few["label"])
    for label in range(5):
        assert few["label"][:].count(label) == min(shots, labels.count(label))


@settings(max_examples=100, **EACH)
@given(width=st.integers(1, 400), height=st.integers(1, 400), size=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_picture_of_any_size_becomes_a_square(width, height, size, seed):
    image = Image.new("RGB", (width, height), (9, 99, 199))
    for train in (False, True):
        transform = ImageTransform(size, (0.0,) * 3, (1.0,) * 3, train=train)
        values = transform(image, np.random.default_rng(seed))
        assert values.shape == (3, size, size)
        torch.testing.assert_close(values[:, 0, 0] * 255, torch.tensor([9.0, 99.0, 199.0]))
