"""Plots of results: training curves, changes per class, confusions, comparisons."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's, without their yellow, which is hard to see on white.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
_MARKERS = "osD^v<>PX*h"
_FILLS = ("full", "none", "left")  # of markers without lines, which tell no dashes
PLOTS_REMEDY = 'pip install "hf-tgpt[plots]"'


def can_plot() -> bool:
    """Whether matplotlib, an extra, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raises ValueError, with the remedy, if matplotlib is not installed."""
    if not can_plot():
        raise ValueError(f"Plots need matplotlib: {PLOTS_REMEDY}.")


def new_figure(width: float, height: float) -> Figure:
    """An empty picture of a size in inches. Raises ValueError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    # White, so that the black text is readable on a dark page too.
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the picture, with fonts of this machine if matplotlib's own lacks a script; warns if all do."""
    missing = _draw(figure, path)
    if missing and (families := _families_with(missing)):
        from matplotlib.text import Text

        for text in figure.findobj(Text):
            text.set_fontfamily([*text.get_fontfamily(), *families])
        missing = _draw(figure, path)
    if missing:
        warnings.warn(
            f"{os.path.basename(path)} has boxes in place of {''.join(sorted(missing)[:20])!r}, which no font of this "
            "machine has; install one, such as Noto Sans.",
            stacklevel=3,
        )


def _draw(figure: Figure, path: str | os.PathLike[str]) -> set[str]:
    """Writes the picture, and returns the characters that its fonts lack."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(path, dpi=110, transparent=False)
    missing = set()
    for each in caught:
        if glyph := re.match(r"Glyph (\d+) .*missing from", str(each.message)):
            missing.add(chr(int(glyph[1])))
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return missing


def _families_with(characters: set[str]) -> list[str]:
    """Font families of this machine that have these characters, if any."""
    from matplotlib import font_manager

    families, left = [], set(characters)
    for entry in font_manager.fontManager.ttflist:
        if not left:
            break
        if entry.name.startswith("Last Resort"):  # has a box for every character
            continue
        with contextlib.suppress(OSError, RuntimeError):  # a damaged font
            font = font_manager.get_font(entry.fname)
            if has := {character for character in left if font.get_char_index(ord(character))}:
                families.append(entry.name)
                left -= has
    return families


def plot_run(
    path: str | os.PathLike[str],
    history: list[dict[str, float]],
    class_names: list[str],
    before: dict[str, Any],
    after: dict[str, Any],
    most: int = 30,
) -> None:
    """A picture of the training curve and of the classes whose accuracy changed `most`, from metrics to metrics."""
    change = _largest_changes(class_names, before, after, most)
    figure = new_figure(11, max(4, 0.22 * len(change)))
    curve, bars = figure.subplots(1, 2)
    steps = [row["step"] for row in history]
    curve.plot(steps, [row["train_accuracy"] for row in history], label="training accuracy")
    validated = [row for row in history if "validation_accuracy" in row]
    if validated:
        accuracies = [row["validation_accuracy"] for row in validated]
        curve.plot([row["step"] for row in validated], accuracies, "--", label="validation accuracy")
    curve.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02), title="training")
    loss = curve.twinx()
    loss.plot(steps, [row["loss"] for row in history], color="grey", linestyle=":", label="loss")
    loss.set(ylabel="loss")
    lines = curve.get_lines() + loss.get_lines()
    curve.legend(lines, [line.get_label() for line in lines], loc="center right")
    _plot_changes(bars, change)
    save_figure(figure, path)


def plot_classes(
    path: str | os.PathLike[str],
    class_names: list[str],
    before: dict[str, Any],
    after: dict[str, Any],
    predictions: np.ndarray,
    labels: np.ndarray,
    most: int = 30,
) -> None:
    """A picture of the classes whose accuracy changed `most`, from metrics to metrics, and the confusion matrix.

    `predictions` and `labels` (n,) are class numbers. The confusion matrix shows shares of a class's images; of more
    than `most` classes, the most confused ones.
    """
    count = len(class_names)
    confusion = np.zeros((count, count))
    np.add.at(confusion, (labels, predictions), 1)
    wrong = confusion.sum(1) + confusion.sum(0) - 2 * confusion.diagonal()
    shown = np.sort(np.argsort(-wrong, kind="stable")[:most])
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    change = _largest_changes(class_names, before, after, most)
    side = max(4.5, 0.22 * max(len(shown), len(change)))
    figure = new_figure(8 + 1.2 * side, side + 2)
    bars, matrix = figure.subplots(1, 2, width_ratios=[1, 1.2])
    _plot_changes(bars, change)
    picture = matrix.imshow(shares[np.ix_(shown, shown)], vmin=0, vmax=1, cmap="Blues")
    names = [class_names[i] for i in shown]
    matrix.set_xticks(range(len(shown)), names, rotation=90, fontsize=8)
    matrix.set_yticks(range(len(shown)), names, fontsize=8)
    rest = f", the {most} most confused classes" if count > most else ""
    matrix.set(xlabel="predicted", ylabel="label", title=f"confusion{rest}")
    figure.colorbar(picture, ax=matrix, label="share of the class's images", shrink=0.8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def _largest_changes(class_names: list[str], before: dict, after: dict, most: int) -> list[tuple[float, str]]:
    """(change, name) of the classes whose accuracy changed most, in order; those without images are left out."""
    change = [
        (b - a, name)
        for name, a, b in zip(class_names, before["per_class_accuracy"], after["per_class_accuracy"], strict=True)
        if None not in (a, b)
    ]
    return sorted(sorted(change, key=lambda entry: -abs(entry[0]))[:most])


def _plot_changes(axes: Axes, change: list[tuple[float, str]]) -> None:
    colours = [_COLOURS[0] if value >= 0 else _COLOURS[3] for value, _ in change]
    axes.barh([name for _, name in change], [value for value, _ in change], color=colours)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set(xlabel="accuracy, adapter minus zero-shot", title="change per class")


# {(shots, method): {measure: (mean, deviation)}}, in percent; of one seed there is no deviation.
Table = dict[tuple[int, str], dict[str, tuple[float, float | None]]]


def plot_bars(path: str | os.PathLike[str], title: str, measures: list[str], table: Table, shots: int) -> None:
    """A picture of every method's measures side by side, with their deviations, at one number of shots."""
    rows = {method: row for (number, method), row in table.items() if number == shots}
    height = 0.8 / len(measures)
    figure = new_figure(9, 1 + len(rows) * (0.25 + 0.13 * len(measures)))
    axes = figure.subplots()
    for i, measure in enumerate(measures):
        bars = [(place, *_known(row[measure])) for place, row in enumerate(rows.values()) if measure in row]
        if not bars:
            continue
        places, means, deviations = zip(*bars, strict=True)
        lower = [place + i * height for place in places]
        colour, hatch = _COLOURS[i % len(_COLOURS)], ("", "//", "..", "xx")[i % 4]
        axes.barh(lower, means, height, xerr=deviations, label=measure, capsize=2, color=colour, hatch=hatch)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(rows))], rows)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy in percent", xlim=(0, 100), title=f"{title}, {shots} shots")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    save_figure(figure, path)


def plot_shots(path: str | os.PathLike[str], title: str, measure: str, table: Table) -> None:
    """A picture of one measure against the number of shots, one line per method."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for i, name in enumerate(dict.fromkeys(method for _, method in table)):
        rows = [(shots, row) for (shots, method), row in table.items() if method == name and measure in row]
        if not rows:
            continue
        points = sorted((shots, *_known(row[measure])) for shots, row in rows)
        places, means, deviations = zip(*points, strict=True)
        axes.errorbar(places, means, deviations, label=name, capsize=2, **line_style(i))
    axes.set(xscale="log", xlabel="shots", ylabel="accuracy in percent", title=title)
    ticks = sorted({shots for shots, _ in table})
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    save_figure(figure, path)


def plot_curves(
    path: str | os.PathLike[str], panels: dict[str, dict[str, list[tuple[float, float, float]]]], along: str, up: str
) -> None:
    """A picture with a panel for each title, and in it a line for each name: [(place, mean, deviation), ...]."""
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = new_figure(4.5 * columns + 1, 3.5 * lines)
    for axes, (title, curves) in zip(figure.subplots(lines, columns, squeeze=False).flat, panels.items(), strict=False):
        for i, (name, points) in enumerate(curves.items()):
            places, means, deviations = (np.array(values) for values in zip(*points, strict=True))
            style = line_style(i) | {"linestyle": ("--", "-", ":")[i % 3], "markersize": 4}
            axes.plot(places, means, label=name, **style)
            axes.fill_between(places, means - deviations, means + deviations, color=style["color"], alpha=0.15)
        axes.set(xlabel=along, ylabel=up, title=title)
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    save_figure(figure, path)


def _known(entry: tuple[float, float | None]) -> tuple[float, float]:
    return entry[0], entry[1] or 0.0


def line_style(number: int) -> dict[str, Any]:
    """What distinguishes methods, also without colour: 7 colours for colour-blind readers, 11 markers, 3 lines."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": ("-", "--", ":")[number // len(_MARKERS) % 3],
    }


def plot_costs(
    path: str | os.PathLike[str], title: str, points: dict[str, tuple[float, float, tuple[float, float | None]]]
) -> None:
    """A picture of accuracy against time and memory: {method: (seconds, MiB, (mean, deviation))}, in percent."""
    figure = new_figure(11, max(4.5, 1.5 + 0.25 * len(points)))
    panels = figure.subplots(1, 2, sharey=True)
    for i, (method, (seconds, memory, accuracy)) in enumerate(points.items()):
        mean, deviation = _known(accuracy)
        for axes, cost in zip(panels, (seconds, memory), strict=True):
            style = line_style(i) | {"linestyle": "none", "fillstyle": _FILLS[i // len(_MARKERS) % len(_FILLS)]}
            axes.errorbar(cost, mean, deviation, label=method, capsize=2, **style)
    seconds_of = [seconds for seconds, _, _ in points.values()]
    if max(seconds_of) > 10 * min(seconds_of):
        from matplotlib.ticker import LogLocator

        panels[0].set_xscale("log")
        panels[0].xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for format_ticks in (panels[0].xaxis.set_major_formatter, panels[0].xaxis.set_minor_formatter):
            format_ticks("{x:.0f}")
    else:
        panels[0].set_xlim(0)
    panels[0].set(xlabel="seconds", ylabel="accuracy in percent", title=title)
    panels[1].set(xlabel="peak MiB", xlim=(0, None))
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    save_figure(figure, path)


def plot_class_accuracies(
    path: str | os.PathLike[str],
    title: str,
    methods: list[str],
    class_names: list[str],
    accuracies: list[list[float]],
    most: int = 40,
) -> None:
    """A heat map of the accuracy of each class by each method, (m, c): of the `most` classes where they differ most."""
    shares = np.array(accuracies).T  # (c, m)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)  # of a class without a picture
        spread = np.nan_to_num(np.nanmax(shares, axis=1) - np.nanmin(shares, axis=1), nan=-1.0)
    shown = np.sort(np.argsort(-spread, kind="stable")[:most])
    figure = new_figure(4 + 0.5 * len(methods), 2.5 + 0.25 * len(shown))
    axes = figure.subplots()
    picture = axes.imshow(100 * shares[shown], vmin=0, vmax=100, cmap="cividis", aspect="auto")
    for row, values in enumerate(shares[shown]):
        for column, value in enumerate(values):
            if not np.isnan(value):
                colour = "white" if value < 0.5 else "black"
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(methods)), methods, rotation=90)
    axes.set_yticks(range(len(shown)), [class_names[i] for i in shown], fontsize=8)
    rest = f", the {most} classes that differ most" if len(class_names) > most else ""
    axes.set(title=title + rest)
    figure.colorbar(picture, ax=axes, label="accuracy of the class in percent", shrink=0.8)
    save_figure(figure, path)
