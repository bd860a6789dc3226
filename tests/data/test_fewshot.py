"""Few-shot draws and base/new halves are exact, repeatable and made without opening an image."""

from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from hf_tgpt.data import sample_few_shot, split_base_new

NAMES = ["ant", "bee", "cat", "dog", "elk"]


def make_dataset(counts, names=NAMES):
    """Rows in mixed class order; the image files do not exist, so decoding one would fail."""
    labels = [label for turn in range(max(counts)) for label, count in enumerate(counts) if turn < count]
    columns = {"image": [f"missing/{row}.jpg" for row in range(len(labels))], "row": list(range(len(labels)))}
    features = Features({"image": Image(), "label": ClassLabel(names=names), "row": Value("int64")})
    return Dataset.from_dict({"image": columns["image"], "label": labels, "row": columns["row"]}, features=features)


def rows_by_class(dataset):
    rows = {}
    for label, row in zip(dataset["label"], dataset["row"], strict=True):
        rows.setdefault(label, []).append(row)
    return rows


@pytest.mark.parametrize("shots", [1, 2, 4, 7])
def test_every_class_gives_as_many_images_as_shots(shots):
    drawn = sample_few_shot(make_dataset([9, 8, 7, 7, 12]), shots)
    assert Counter(drawn["label"]) == dict.fromkeys(range(5), shots)
    assert len(set(drawn["row"])) == 5 * shots


def test_drawn_rows_keep_their_labels_and_columns():
    dataset = make_dataset([9, 8, 7, 7, 12])
    drawn = sample_few_shot(dataset, 3)
    assert drawn.features == dataset.features
    assert all(dataset["label"][row] == label for label, row in zip(drawn["label"], drawn["row"], strict=True))


def test_one_seed_gives_one_draw_and_another_seed_another():
    dataset = make_dataset([30] * 5)
    assert sample_few_shot(dataset, 4, seed=1)["row"][:] == sample_few_shot(dataset, 4, seed=1)["row"][:]
    assert sample_few_shot(dataset, 4, seed=1)["row"][:] != sample_few_shot(dataset, 4, seed=2)["row"][:]


def test_the_draw_is_pinned_so_that_published_seeds_stay_valid():
    assert sample_few_shot(make_dataset([8] * 5), 2, seed=3)["row"][:] == [30, 35, 6, 11, 7, 37, 8, 33, 14, 39]


def test_draws_differ_between_classes():
    drawn = rows_by_class(sample_few_shot(make_dataset([30] * 5), 4))
    assert len({tuple(row // 5 for row in rows) for rows in drawn.values()}) > 1


def test_the_draw_of_a_class_does_not_depend_on_the_size_of_others():
    few, many = make_dataset([9, 9, 9, 9, 9]), make_dataset([9, 30, 9, 9, 9])
    images = [Counter(d["label"]) for d in (few, many)]
    assert images[0] != images[1]
    place = []
    for dataset in (few, many):
        whole, drawn = rows_by_class(dataset), rows_by_class(sample_few_shot(dataset, 4))
        place.append({label: [whole[label].index(row) for row in rows] for label, rows in drawn.items() if label != 1})
    assert place[0] == place[1]


def test_a_selected_dataset_can_be_sampled():
    dataset = make_dataset([9, 9, 9, 9, 9]).select(range(10, 45))
    drawn = sample_few_shot(dataset, 3)
    assert Counter(drawn["label"]) == dict.fromkeys(range(5), 3)
    assert min(drawn["row"]) >= 10


def test_another_label_column_can_be_named():
    dataset = make_dataset([3] * 5).rename_column("label", "species")
    assert len(sample_few_shot(dataset, 2, label_column="species")) == 10
    with pytest.raises(ValueError, match=r"`label_column`='label'.*image, species, row"):
        sample_few_shot(dataset, 2)


@pytest.mark.parametrize("shots", [0, -1])
def test_shots_below_one_are_refused(shots):
    with pytest.raises(ValueError, match=f"`shots`={shots} "):
        sample_few_shot(make_dataset([3] * 5), shots)


def test_a_class_with_too_few_images_is_named_with_its_count():
    with pytest.raises(ValueError, match=r"`shots`=16 but class 'cat' has 9 images; .*allow_fewer=True"):
        sample_few_shot(make_dataset([16, 16, 9, 16, 20]), 16)
    with pytest.raises(ValueError, match=r"class 'ant' has 1 image, class 'elk' has 0 images; "):
        sample_few_shot(make_dataset([1, 2, 2, 2, 0]), 2)


def test_many_classes_with_too_few_images_are_counted_not_listed():
    names = [f"class {i}" for i in range(40)]
    with pytest.raises(ValueError, match="and 35 more classes"):
        sample_few_shot(make_dataset([2] * 40, names), 3)


def test_allow_fewer_takes_all_of_a_small_class():
    drawn = sample_few_shot(make_dataset([16, 16, 9, 16, 0]), 16, allow_fewer=True)
    assert Counter(drawn["label"]) == {0: 16, 1: 16, 2: 9, 3: 16}


@pytest.mark.parametrize("label", [-1, None])
def test_a_label_without_a_class_name_is_named_with_its_row(label):
    features = Features({"label": ClassLabel(names=["ant", "bee"])})
    dataset = Dataset.from_dict({"label": [0, 1, label, 0]}, features=features)
    with pytest.raises(ValueError, match=f"`label`={label} in row 2 .*0 to 1"):
        sample_few_shot(dataset, 1)


def test_a_label_beyond_the_class_names_is_named_with_its_row():
    dataset = Dataset.from_dict({"label": [0, 1, 7]})
    # `datasets` refuses such labels when it builds a dataset, but not when it reads one.
    dataset.info.features["label"] = ClassLabel(names=["ant", "bee"])
    with pytest.raises(ValueError, match="`label`=7 in row 2 "):
        sample_few_shot(dataset, 1)


def test_labels_without_class_names_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="class_encode_column"):
        sample_few_shot(Dataset.from_dict({"label": ["ant", "bee"]}), 1)


def test_the_first_half_of_the_classes_is_base_and_an_odd_one_too():
    dataset = make_dataset([3, 4, 5, 6, 7])
    base, new = split_base_new(dataset)
    assert base.features["label"].names == ["ant", "bee", "cat"]
    assert new.features["label"].names == ["dog", "elk"]
    assert Counter(base["label"]) == {0: 3, 1: 4, 2: 5}
    assert Counter(new["label"]) == {0: 6, 1: 7}


def test_both_halves_keep_rows_names_and_columns():
    dataset = make_dataset([3, 4, 5, 6, 7])
    base, new = split_base_new(dataset)
    for half in (base, new):
        assert half.column_names == dataset.column_names
        assert isinstance(half.features["image"], Image)
        for label, row in zip(half["label"], half["row"], strict=True):
            assert half.features["label"].names[label] == NAMES[dataset["label"][row]]
    assert sorted([*base["row"], *new["row"]]) == list(range(25))


def test_halves_of_a_few_shot_draw_are_the_draw():
    drawn = sample_few_shot(make_dataset([9] * 4, NAMES[:4]), 2)
    base, new = split_base_new(drawn)
    assert [*base["row"], *new["row"]] == drawn["row"][:]
    assert len(base) == len(new) == 4


def test_splits_are_cut_alike_even_if_one_lacks_a_class():
    _, new_train = split_base_new(make_dataset([3, 3, 3, 3, 3]))
    with pytest.warns(UserWarning, match="without an image") as caught:
        _, new_test = split_base_new(make_dataset([0, 3, 3, 0, 3]))
    assert [str(warning.message) for warning in caught] == [
        "1 base class is without an image: ant.",
        "1 new class is without an image: dog.",
    ]
    assert new_train.features["label"] == new_test.features["label"]


def test_a_single_class_has_no_halves():
    with pytest.raises(ValueError, match=r"1 class"):
        split_base_new(make_dataset([3], ["ant"]))


def test_a_half_without_images_is_named():
    with pytest.raises(ValueError, match=r"new classes \('dog' to 'elk'\) have no images"):
        split_base_new(make_dataset([3, 3, 3, 0, 0]))
    with pytest.raises(ValueError, match="base classes"):
        split_base_new(make_dataset([0, 0, 0, 3, 0]))
