"""Published accuracies beside measured ones."""

import statistics

import pytest
from conftest import ROOT

from hf_tgpt.data import BENCHMARKS
from hf_tgpt.evaluation.published_results import published_beside, read_published

RECIPES = ROOT / "hf_tgpt" / "recipes"
ROWS = read_published(RECIPES / "published.csv")
ELEVEN = [name for name, benchmark in BENCHMARKS.items() if not benchmark.only_tested]


def accuracies(**wanted):
    return [row["accuracy"] for row in ROWS if all(row[name] == value for name, value in wanted.items())]


BASE_TO_NEW = {row["method"] for row in ROWS if (row["dataset"], row["classes"]) == ("dtd", "new")}


@pytest.mark.parametrize("method", sorted(BASE_TO_NEW))
@pytest.mark.parametrize("classes", ["base", "new"])
def test_the_numbers_of_the_data_sets_have_the_published_mean(method, classes):
    each = [accuracies(method=method, trained_on=name, dataset=name, classes=classes) for name in ELEVEN]
    assert [len(values) for values in each] == [1] * 11
    mean = statistics.mean(values[0] for values in each)
    wanted = {"method": method, "dataset": "average", "classes": classes, "shots": 16}
    printed = [row for row in ROWS if wanted.items() <= row.items()]
    assert any(
        abs(row["accuracy"] - mean) < 0.0051 or f"its columns give {mean:.2f}" in row["source"] for row in printed
    )


def test_the_methods_that_others_compare_with_have_published_numbers():
    assert {"CLIP", "CoOp", "CoCoOp", "KgCoOp", "MaPLe", "PromptSRC", "TCP"} <= BASE_TO_NEW
    assert {row["method"] for row in ROWS} >= {"2SFS", "CLIP-LoRA", "MMRL", "GDA", "ProKeR", "Tip-Adapter-F", "LP++"}


@pytest.mark.parametrize("method", ["CoOp", "CoCoOp", "MaPLe"])
def test_the_numbers_of_cross_dataset_transfer_have_the_published_mean(method):
    each = [accuracies(method=method, trained_on="imagenet", dataset=n, classes="all") for n in ELEVEN[1:]]
    assert [len(values) for values in each] == [1] * 10
    (mean,) = accuracies(method=method, trained_on="imagenet", dataset="average")
    assert statistics.mean(values[0] for values in each) == pytest.approx(mean, abs=0.0051)


def test_every_row_names_data_sets_of_the_catalogue_and_its_source():
    for row in ROWS:
        assert {row["trained_on"], row["dataset"]} <= {*BENCHMARKS, "average", "imagenet_variants_average"}, row
        assert row["classes"] in ("all", "base", "new", "harmonic mean"), row
        assert 0 < row["accuracy"] < 100, row
        assert row["source"], row


@pytest.mark.parametrize(
    ("trained_on", "trained_classes", "tested_on", "classes", "maple"),
    [
        ("oxford_pets:some/folder", "base", "oxford_pets", "new", 97.76),
        ("OxfordPets", "base", "oxford_pets:elsewhere", "base", 95.43),
        ("imagenet", "all", "imagenet_a", "all", 50.90),
        ("imagenet", "all", "imagenet", "all", 70.72),
    ],
)
def test_the_same_training_and_test_are_found(trained_on, trained_classes, tested_on, classes, maple):
    run = {"dataset": trained_on, "classes": trained_classes, "shots": 16}
    found = {row["method"]: row["accuracy"] for row in published_beside(ROWS, run, tested_on, classes)}
    assert found["MaPLe"] == maple
    assert {"CLIP", "CoOp", "CoCoOp"} <= set(found) or tested_on == "imagenet"


@pytest.mark.parametrize(
    ("run", "tested_on", "classes"),
    [
        ({"dataset": "dtd", "classes": "base", "shots": 4}, "dtd", "new"),
        ({"dataset": "dtd", "classes": "all", "shots": 16}, "dtd", "new"),
        ({"dataset": "dtd", "classes": "base", "shots": 16}, "dtd", "all"),
        ({"dataset": "eurosat", "classes": "all", "shots": 16}, "dtd", "all"),
        ({"dataset": "toyworld:codes", "classes": "all", "shots": 16}, "toyworld:codes", "all"),
    ],
)
def test_another_training_or_test_has_no_published_number(run, tested_on, classes):
    with pytest.raises(ValueError, match=f"no published number for {tested_on}, {classes} classes.* there are some"):
        published_beside(ROWS, run, tested_on, classes)


def test_without_results_it_is_not_known_what_to_compare_with():
    with pytest.raises(ValueError, match=r"the adapter has no results\.json"):
        published_beside(ROWS, {}, "dtd", "new")


def test_a_table_without_a_column_is_refused(tmp_path):
    (tmp_path / "some.csv").write_text("method,accuracy\nMaPLe,1.0\n")
    with pytest.raises(ValueError, match="there is no column 'trained_on'"):
        read_published(tmp_path / "some.csv")
