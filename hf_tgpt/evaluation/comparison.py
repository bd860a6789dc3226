"""Statistics of a comparison: methods on data sets, at numbers of shots, over seeds.

A run is a dict of what it measured: accuracies as fractions, `seconds`, `peak_memory_bytes`, `trainable_parameters`.
Measures that a run lacks are left out of means.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Case(NamedTuple):
    """What runs of several seeds have in common."""

    dataset: str
    shots: int
    method: str


Runs = dict[Case, dict[int, dict[str, Any]]]  # by case and seed

AVERAGE = "average"  # in place of a data set's name
COSTS = ("trainable_parameters", "seconds", "peak_memory_bytes")

# The 0.975 quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the last, which is a little wider.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def values(runs: Mapping[int, Mapping[str, Any]], measure: str) -> dict[int, float]:
    """One measure by seed, of the runs that have it."""
    return {seed: run[measure] for seed, run in runs.items() if run.get(measure) is not None}


def mean_and_deviation(numbers: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the standard deviation of a sample; of one number there is no deviation."""
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None


def with_averages(runs: Runs, datasets: Sequence[str], seeds: Sequence[int], measures: Sequence[str]) -> Runs:
    """The runs and, as cases of the data set "average", their averages over several data sets, seed by seed.

    A method has one if all of its runs exist. A harmonic mean is the harmonic mean of the averages, as in the papers'
    tables on base-to-new generalisation.
    """
    added: Runs = {}
    for case in [case for case in runs if case.dataset == datasets[0]] if len(datasets) > 1 else []:
        each = [runs.get(case._replace(dataset=dataset), {}) for dataset in datasets]
        if not all(seed in results for results in each for seed in seeds):
            continue
        added[case._replace(dataset=AVERAGE)] = {
            seed: _average([results[seed] for results in each], measures) for seed in seeds
        }
    return runs | added


def _average(runs: list[dict[str, Any]], measures: Sequence[str]) -> dict[str, Any]:
    names = [name for name in (*measures, *COSTS) if all(run.get(name) is not None for run in runs)]
    result = {name: statistics.fmean(run[name] for run in runs) for name in names}
    if {"base", "new", "harmonic_mean"} <= result.keys():
        result["harmonic_mean"] = statistics.harmonic_mean([result["base"], result["new"]])
    return result


@dataclass(frozen=True)
class Lead:
    """The best method's lead over the next one: the mean over seeds of their difference.

    `interval` is the mean's 95 % confidence interval if the differences are normal (Student's t, paired by seed); one
    seed gives none.
    """

    best: str
    next: str
    difference: float
    interval: tuple[float, float] | None
    seeds: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and self.interval[0] > 0


def lead(methods: Mapping[str, Mapping[int, float]]) -> Lead | None:
    """The best method by its mean, {method: {seed: value}}, and its lead over the next one on the seeds of both.

    None for fewer than two methods that share a seed.

    Example:
        >>> found = lead({"GDA": {0: 0.8, 1: 0.9}, "CoOp": {0: 0.7, 1: 0.7}})
        >>> found.best, round(found.difference, 2), found.is_clear
        ('GDA', 0.15, False)
    """
    ranked = sorted(methods, key=lambda method: -statistics.fmean(methods[method].values()))
    if len(ranked) < 2:
        return None
    best, other = (methods[method] for method in ranked[:2])
    differences = [value - other[seed] for seed, value in best.items() if seed in other]
    if not differences:
        return None
    mean, deviation = mean_and_deviation(differences)
    interval = None
    if deviation is not None:
        half = _T[min(len(differences) - 1, len(_T)) - 1] * deviation / math.sqrt(len(differences))
        interval = mean - half, mean + half
    return Lead(ranked[0], ranked[1], mean, interval, len(differences))


def per_class(methods: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> tuple[list[str], list[list[float]]]:
    """Class names (c) and each class's accuracy, over seeds, for each method (m, c); NaN if unknown.

    The classes are the first run's; runs with other classes are left out.
    """
    runs = [run for by_seed in methods.values() for run in by_seed.values() if run.get("class_names")]
    names = runs[0]["class_names"] if runs else []
    rows = []
    for by_seed in methods.values():
        known = [run["per_class_accuracy"] for run in by_seed.values() if run.get("class_names") == names]
        columns = zip(*known, strict=True) if known else [()] * len(names)
        present = ([value for value in column if value is not None] for column in columns)
        rows.append([statistics.fmean(column) if column else math.nan for column in present])
    return names, rows
