"""Plots can be read on a dark page and without seeing colours."""

import numpy as np
import pytest
from PIL import Image

from hf_tgpt.cli.compare_plan import LABELS
from hf_tgpt.evaluation import plots

pytestmark = pytest.mark.draws

pytest.importorskip("matplotlib")

METRICS = {"per_class_accuracy": [0.2, 0.9]}, {"per_class_accuracy": [0.8, 0.5]}
TABLE = {(1, "GDA"): {"base": (50.0, 2.0), "new": (40.0, None)}, (4, "GDA"): {"base": (60.0, 1.0), "new": (45.0, 3.0)}}
HISTORY = [{"step": step, "train_accuracy": 0.5, "validation_accuracy": 0.4, "loss": 2.0} for step in (1, 2)]
DRAW = {
    "run": lambda path: plots.plot_run(path, HISTORY, ["cat", "dog"], *METRICS),
    "classes": lambda path: plots.plot_classes(path, ["cat", "dog"], *METRICS, np.array([0, 1]), np.array([1, 1])),
    "bars": lambda path: plots.plot_bars(path, "pictures", ["base", "new"], TABLE, 4),
    "shots": lambda path: plots.plot_shots(path, "pictures", "base", TABLE),
    "costs": lambda path: plots.plot_costs(path, "pictures", {"GDA": (3.0, 100.0, (50.0, 2.0))}),
    "class accuracies": lambda path: plots.plot_class_accuracies(path, "pictures", ["GDA"], ["cat"], [[0.5]]),
}


@pytest.mark.parametrize("name", DRAW)
def test_a_plot_has_an_opaque_white_background_whatever_the_users_style(name, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"savefig.transparent": True, "figure.facecolor": "black"}):
        DRAW[name](tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        pixels = np.asarray(image.convert("RGBA"))
    assert (pixels[..., 3] == 255).all()
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()


def test_all_methods_of_a_comparison_differ_without_their_colours():
    styles = [plots.line_style(number) for number in range(len(LABELS))]
    assert len({(style["marker"], style["linestyle"]) for style in styles}) == len(LABELS)


def test_costs_of_all_methods_differ_without_their_colours(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    points = {label: (float(i + 1), 500.0, (float(i), 1.0)) for i, label in enumerate(LABELS)}
    plots.plot_costs(tmp_path / "costs.png", "pictures", points)
    drawn = [container.lines[0] for container in figures[0].axes[0].containers]
    assert len({(line.get_marker(), line.get_fillstyle()) for line in drawn}) == len(LABELS)


def test_bars_of_measures_and_curves_differ_without_their_colours(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    DRAW["bars"](tmp_path)
    DRAW["run"](tmp_path)
    hatches = [container[0].get_hatch() for container in figures[0].axes[0].containers if hasattr(container, "patches")]
    assert len(set(hatches)) == 2
    lines = [
        line.get_linestyle() for axes in figures[1].axes for line in axes.get_lines() if len(line.get_xdata()) == 2
    ]
    assert {"-", "--", ":"} <= set(lines)
