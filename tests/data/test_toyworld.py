"""The toy world is the same for everyone, and its names say what its pictures show."""

import numpy as np
import pytest

from hf_tgpt.data import load_toyworld
from hf_tgpt.data.toyworld.scenes import COLOURS, DOMAINS, SHAPES, SURFACES, draw, is_held_out, sample_scene
from hf_tgpt.data.toyworld.world import TASKS


def small(task="shapes", domain="photo"):
    return load_toyworld(task, domain, train_per_class=2, validation_per_class=1, test_per_class=1)


def pixels(dataset):
    return [np.asarray(image).tobytes() for image in dataset["image"]]


def test_the_same_call_gives_the_same_pictures():
    once, again = small(), small()
    for split in ("train", "validation", "test"):
        assert once[split]["caption"][:] == again[split]["caption"][:]
        assert pixels(once[split]) == pixels(again[split])


def test_pictures_are_the_same_on_every_machine():
    scenes = [sample_scene(np.random.default_rng(seed)) for seed in range(3)]
    assert [scene.caption for scene in scenes] == [
        "a medium striped green ring in the lower left on a dark background.",
        "a medium ringed red drop in the upper right on a dark background.",
        "a small striped cyan square in the left on a misty background.",
    ]
    # Mean colours: another version of Pillow may move single pixels, never these.
    colours = [np.asarray(draw(scene)).mean((0, 1)) for scene in scenes]
    expected = [(34, 55, 29), (60, 39, 40), (97, 129, 157)]
    np.testing.assert_allclose(colours, expected, atol=2)


def test_splits_share_no_picture():
    splits = small()
    everything = [picture for split in splits.values() for picture in pixels(split)]
    assert len(set(everything)) == len(everything)


def test_splits_have_as_many_pictures_as_asked():
    splits = small("surfaces")
    assert {split: len(data) for split, data in splits.items()} == {"train": 12, "validation": 6, "test": 6}
    assert splits["train"].column_names == ["image", "label", "caption"]


@pytest.mark.parametrize("task", [task for task in TASKS if task != "codes"])
def test_captions_say_every_word_of_the_class_name(task):
    train = small(task)["train"]
    names = train.features["label"].names
    for label, caption in zip(train["label"], train["caption"], strict=True):
        assert set(names[label].removesuffix(" shape").split()) <= set(caption.rstrip(".").split())


def test_captions_of_coded_classes_say_nothing_of_their_names():
    train = small("codes")["train"]
    words = {word for name in train.features["label"].names for word in name.split()}
    assert not words & {word for caption in train["caption"] for word in caption.rstrip(".").split()}


@pytest.mark.parametrize("task", TASKS)
def test_class_names_are_distinct(task):
    names = [toy.name for toy in TASKS[task]]
    assert len(set(names)) == len(names)


def test_tasks_have_from_6_to_at_least_60_classes():
    sizes = [len(classes) for classes in TASKS.values()]
    assert min(sizes) == 6
    assert max(sizes) >= 60


def test_every_single_word_appears_outside_the_held_out_combinations():
    everything = np.indices((len(SHAPES), len(SURFACES), len(COLOURS))).reshape(3, -1).T.tolist()
    shown = [combination for combination in everything if not is_held_out(*combination)]
    assert len(everything) - len(shown) == len(everything) / 9
    for part, words in enumerate((SHAPES, SURFACES, COLOURS)):
        assert {combination[part] for combination in shown} == set(range(len(words)))


def test_unseen_triples_are_all_held_out():
    triples = TASKS["unseen_triples"]
    assert all(is_held_out(toy.shape, toy.surface, toy.colour) for toy in triples)
    assert [triples[0].name, triples[-1].name] == ["plain red circle", "ringed green bolt"]


def test_domains_show_the_same_scenes_differently():
    domains = {domain: small("surfaces", domain)["train"] for domain in DOMAINS}
    assert len({tuple(data["caption"]) for data in domains.values()}) == 1
    assert len({tuple(data["label"]) for data in domains.values()}) == 1
    for picture in zip(*map(pixels, domains.values()), strict=True):
        assert len(set(picture)) == len(DOMAINS)


def test_an_unknown_task_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"`task`='cats'.*coloured_shapes"):
        load_toyworld("cats")


def test_an_unknown_domain_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"`domain`='oil'.*line_drawing"):
        load_toyworld("shapes", "oil")


def test_what_one_caller_does_to_a_task_changes_nothing_for_another():
    few = dict(train_per_class=1, validation_per_class=1, test_per_class=1)
    first, second = load_toyworld("shapes", **few), load_toyworld("shapes", **few)
    first["train"].set_format("numpy")
    del first["test"]
    assert second["train"].format["type"] is None
    assert load_toyworld("shapes", **few)["test"].num_rows == second["test"].num_rows
