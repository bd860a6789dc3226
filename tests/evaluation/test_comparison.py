"""What a comparison says of its runs."""

import math

import numpy as np
import pytest
from PIL import Image

from hf_tgpt.evaluation.comparison import Case, lead, mean_and_deviation, per_class, values, with_averages
from hf_tgpt.evaluation.plots import plot_class_accuracies, plot_costs

pytestmark = pytest.mark.draws

COSTS = {"seconds": 2.0, "trainable_parameters": 10, "peak_memory_bytes": 2**20}


def test_one_run_has_a_mean_and_no_deviation():
    assert mean_and_deviation([0.5]) == (0.5, None)
    mean, deviation = mean_and_deviation([0.4, 0.6])
    assert (mean, deviation) == (0.5, pytest.approx(np.std([0.4, 0.6], ddof=1)))


def test_a_measure_is_of_the_runs_that_have_it():
    runs = {0: {"new": 0.5}, 1: {"new": None}, 2: {}}
    assert values(runs, "new") == {0: 0.5}


def test_the_difference_is_paired_over_seeds():
    """The seeds differ by far more than the methods, which differ by the same on each: the lead is sure of itself."""
    worse = {0: 50.0, 1: 70.0, 2: 90.0}
    found = lead({"next": worse, "far": dict.fromkeys(worse, 10.0), "best": {s: v + 2 for s, v in worse.items()}})
    assert (found.best, found.next, found.seeds) == ("best", "next", 3)
    assert found.difference == 2
    assert found.interval == (2, 2)
    assert found.is_clear


def test_the_interval_is_students():
    differences = [1.0, 2.0, 6.0]
    found = lead({"a": dict(enumerate(differences)), "b": {0: 0.0, 1: 0.0, 2: 0.0}})
    half = 4.303 * np.std(differences, ddof=1) / math.sqrt(3)  # of two degrees of freedom
    assert found.interval == pytest.approx((3 - half, 3 + half))
    assert not found.is_clear
    wide = lead({"a": {seed: seed % 2 for seed in range(1000)}, "b": dict.fromkeys(range(1000), 0)})
    assert wide.interval[1] - wide.interval[0] == pytest.approx(2 * 2.042 * 0.5 / math.sqrt(1000), rel=1e-2)


def test_a_lead_is_told_of_seeds_that_both_have_and_without_an_interval_for_one():
    found = lead({"a": {0: 9.0, 1: 9.0}, "b": {1: 8.0, 2: 1.0}})
    assert (found.difference, found.interval, found.seeds) == (1.0, None, 1)
    assert not found.is_clear
    assert lead({"a": {0: 9.0}}) is None
    assert lead({"a": {0: 9.0}, "b": {1: 8.0}}) is None


def test_averages_are_seed_by_seed_and_their_harmonic_mean_is_of_the_averages():
    def run(base, new):
        return COSTS | {"base": base, "new": new, "harmonic_mean": 2 * base * new / (base + new)}

    runs = {
        Case("a", 16, "maple"): {0: run(0.9, 0.5), 1: run(0.8, 0.4)},
        Case("b", 16, "maple"): {0: run(0.5, 0.3), 1: run(0.6, 0.2)},
        Case("a", 16, "coop"): {0: run(0.9, 0.5), 1: run(0.8, 0.4)},
        Case("b", 16, "coop"): {0: run(0.9, 0.5)},  # one run failed, so no average would be fair
    }
    found = with_averages(runs, ["a", "b"], [0, 1], ["base", "new", "harmonic_mean"])
    assert set(found) - set(runs) == {Case("average", 16, "maple")}
    first = found["average", 16, "maple"][0]
    assert first["base"] == pytest.approx(0.7)
    assert first["harmonic_mean"] == pytest.approx(2 * 0.7 * 0.4 / 1.1)
    assert first["seconds"] == 2.0
    assert with_averages(runs, ["a"], [0, 1], ["base"]) == runs


def test_class_accuracies_are_means_over_seeds_and_unknown_where_nothing_was_tested():
    def run(*shares, names=("cat", "dog")):
        return {"class_names": list(names), "per_class_accuracy": list(shares)}

    methods = {"a": {0: run(1.0, None), 1: run(0.5, None)}, "b": {0: run(0.2, 0.4)}, "c": {0: run(1.0, names=("owl",))}}
    names, rows = per_class(methods)
    assert names == ["cat", "dog"]
    np.testing.assert_array_equal(rows, [[0.75, np.nan], [0.2, 0.4], [np.nan, np.nan]])
    assert per_class({"a": {0: {}}}) == ([], [[]])


def test_the_pictures_hold_many_methods_and_many_classes(tmp_path):
    points = {f"method {i}": (10.0 * (i + 1), 500.0 + i, (50.0 + i, None if i % 2 else 1.0)) for i in range(23)}
    plot_costs(tmp_path / "costs.png", "data", points)
    shares = np.linspace(0, 1, 3 * 100).reshape(3, 100)
    shares[:, 7] = np.nan
    plot_class_accuracies(tmp_path / "classes.png", "data", ["a", "b", "c"], [f"class {i}" for i in range(100)],
                          shares.tolist())  # fmt: skip
    for file in tmp_path.iterdir():
        with Image.open(file) as picture:
            assert picture.width > 400
