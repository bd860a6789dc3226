"""The output of a comparison: tables for people and programs, and plots."""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.comparison import AVERAGE, COSTS, Case, Lead, Runs, lead, mean_and_deviation, per_class, values
from ..evaluation.comparison import with_averages as averaged
from ..evaluation.plots import PLOTS_REMEDY, can_plot, plot_bars, plot_class_accuracies, plot_costs, plot_shots
from .compare_plan import file_name
from .output import markdown_table

Row = dict[str, tuple[float, float | None]]  # mean and deviation in percent, by column


def write_comparison(
    folder: Path, runs: Runs, datasets: Sequence[str], seeds: Sequence[int], measures: Mapping[str, str]
) -> tuple[str, dict[str, Any]]:
    """Writes table.md, table.csv, runs.csv and plots; returns the first and, for --json, the content of the others.

    `measures` are {name in a run: column}. Accuracies are in percent.
    """
    runs = averaged(runs, datasets, seeds, list(measures))
    present = [name for name in measures if any(values(runs[case], name) for case in runs)]
    columns = {name: measures[name] for name in present}
    # The measure that methods are ranked by.
    main = next((name for name in ("accuracy", "harmonic_mean", "base") if name in columns), None)
    table = {case: _row(by_seed, columns) for case, by_seed in runs.items()}
    leads = {group: _lead(runs, group, main) for group in dict.fromkeys(case[:2] for case in runs)} if main else {}

    text = "\n".join(_markdown(runs, table, leads, seeds, columns, main))
    (folder / "table.md").write_text(text, encoding="utf-8")
    _write_csv(folder / "table.csv", [_flat(case, runs[case], row) for case, row in table.items()])
    rows = [_single(case, seed, run, columns) for case, by_seed in runs.items() for seed, run in by_seed.items()
            if case.dataset != AVERAGE]  # fmt: skip
    _write_csv(folder / "runs.csv", rows)
    if can_plot():
        _plot(folder, runs, table, columns, main)
    else:
        print(f"There are no plots, since they need matplotlib: {PLOTS_REMEDY}.", file=sys.stderr)
    best = [{"dataset": dataset, "shots": shots, **vars(found)} for (dataset, shots), found in leads.items() if found]
    return text, {"table": [_flat(case, runs[case], row) for case, row in table.items()], "best": best, "runs": rows}


def _row(by_seed: Mapping[int, Mapping[str, Any]], columns: Mapping[str, str]) -> Row:
    found = {column: [100 * value for value in values(by_seed, name).values()] for name, column in columns.items()}
    return {column: mean_and_deviation(numbers) for column, numbers in found.items() if numbers}


def _lead(runs: Runs, group: tuple[str, int], main: str) -> Lead | None:
    """The table of one data set and number of shots, in percent."""
    found = {case.method: values(by_seed, main) for case, by_seed in runs.items() if case[:2] == group}
    return lead({label: {seed: 100 * value for seed, value in each.items()} for label, each in found.items() if each})


def _markdown(
    runs: Runs,
    table: Mapping[Case, Row],
    leads: Mapping[tuple[str, int], Lead | None],
    seeds: Sequence[int],
    columns: Mapping[str, str],
    main: str | None,
) -> list[str]:
    lines: list[str] = []
    about = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    for dataset in dict.fromkeys(case.dataset for case in runs):
        shots = sorted({case.shots for case in runs if case.dataset == dataset})
        if main and len(shots) > 1:
            lines += [f"**{dataset}**, {columns[main]} over shots, {about}", ""]
            lines += [*_over_shots(table, dataset, shots, columns[main]), ""]
        for number in shots:
            cases = [case for case in runs if case[:2] == (dataset, number)]
            lines += [f"**{dataset}**, {number} shot{'s' * (number > 1)}, {about}", ""]
            lines += [*_of_methods({case.method: (runs[case], table[case]) for case in cases}, columns), ""]
            if found := leads.get((dataset, number)):
                lines += [_in_words(found, columns[main or ""]), ""]
    return lines


def _over_shots(table: Mapping[Case, Row], dataset: str, shots: Sequence[int], column: str) -> list[str]:
    methods = list(dict.fromkeys(case.method for case in table if case.dataset == dataset))
    cells = [[table.get(Case(dataset, number, method), {}).get(column) for number in shots] for method in methods]
    best = [max((cell[0] for cell in each if cell), default=None) for each in zip(*cells, strict=True)]
    rows = [[_cell(cell, top) for cell, top in zip(each, best, strict=True)] for each in cells]
    header = ["method", *(f"{number} shot{'s' * (number > 1)}" for number in shots)]
    return markdown_table(header, [[method, *row] for method, row in zip(methods, rows, strict=True)])


def _of_methods(methods: Mapping[str, tuple[Mapping[int, Any], Row]], columns: Mapping[str, str]) -> list[str]:
    best = {column: max((row[column][0] for _, row in methods.values() if column in row), default=None)
            for column in columns.values()}  # fmt: skip
    rows = []
    for method, (by_seed, row) in methods.items():
        weights, seconds, memory = _costs(by_seed)
        cells = [_cell(row.get(column), best[column]) for column in columns.values()]
        rows.append([method, *cells, f"{weights:,.0f}", f"{seconds:.0f}", f"{memory:.0f}"])
    return markdown_table(["method", *columns.values(), "trained parameters", "seconds", "peak MiB"], rows)


def _cell(entry: tuple[float, float | None] | None, best: float | None) -> str:
    if entry is None:
        return ""
    mean, deviation = entry
    text = f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"
    return f"**{text}**" if mean == best else text


def _in_words(found: Lead, column: str) -> str:
    ahead = f"Best on {column}: {found.best}, {found.difference:.1f} points ahead of {found.next}"
    if found.interval is None:
        return f"{ahead} on one seed, so it may be chance."
    low, high = found.interval
    clear = "" if found.is_clear else "; it may be chance"
    return f"{ahead} (paired over {found.seeds} seeds, 95 % interval {low:.1f} to {high:.1f}{clear})."


def _costs(by_seed: Mapping[int, Mapping[str, Any]]) -> tuple[float, float, float]:
    """Mean weights, mean seconds, greatest MiB."""
    weights, seconds, memory = ([run[name] for run in by_seed.values()] for name in COSTS)
    return statistics.fmean(weights), statistics.fmean(seconds), max(memory) / 2**20


def _flat(case: Case, by_seed: Mapping[int, Mapping[str, Any]], row: Row) -> dict[str, Any]:
    weights, seconds, memory = _costs(by_seed)
    numbers: dict[str, Any] = {}
    for column, (mean, deviation) in row.items():
        numbers |= {column: _rounded(mean), f"{column}, deviation": _rounded(deviation)}
    return {**case._asdict(), "seeds": len(by_seed), **numbers, **_named(weights, seconds, memory)}


def _single(case: Case, seed: int, run: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    numbers = {column: _rounded(values({seed: run}, name).get(seed), 100) for name, column in columns.items()}
    return {**case._asdict(), "seed": seed, **numbers, **_named(*_costs({seed: run}))}


def _named(weights: float, seconds: float, memory: float) -> dict[str, float]:
    return {"trained parameters": round(weights), "seconds": round(seconds, 1), "peak MiB": round(memory)}


def _rounded(number: float | None, factor: float = 1) -> float | None:
    return None if number is None else round(factor * number, 3)


def _write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def _plot(folder: Path, runs: Runs, table: Mapping[Case, Row], columns: Mapping[str, str], main: str | None) -> None:
    for dataset in dict.fromkeys(case.dataset for case in runs):
        found = {(case.shots, case.method): row for case, row in table.items() if case.dataset == dataset}
        shots = {number for number, _ in found}
        path, most = str(folder / file_name(dataset)), max(shots)
        cases = {case.method: runs[case] for case in runs if case[:2] == (dataset, most)}
        plot_bars(f"{path}.png", dataset, list(columns.values()), found, most)
        if main is None:
            continue
        if len(shots) > 1:
            plot_shots(f"{path}-shots.png", dataset, columns[main], found)
        costs = {method: _costs(by_seed)[1:] for method, by_seed in cases.items()}
        accuracies = {method: found[most, method].get(columns[main]) for method in cases}
        points = {method: (*costs[method], mean) for method, mean in accuracies.items() if mean}
        plot_costs(f"{path}-costs.png", f"{dataset}, {most} shots", points)
        names, shares = per_class(cases)
        if len(names) > 1:
            plot_class_accuracies(f"{path}-classes.png", f"{dataset}, {most} shots", list(cases), names, shares)
