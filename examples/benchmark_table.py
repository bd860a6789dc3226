"""The rows of benchmark.py as ratios, a table and a picture."""

from pathlib import Path
from typing import Any

from hf_tgpt.cli.output import markdown_table
from hf_tgpt.evaluation.plots import line_style, new_figure

OURS, REFERENCE, FLOOR = "ours", "reference", "floor"
CACHED, CACHED_FLOOR = "ours, cached features", "floor, cached features"
TRUNCATED, PACKED, CHECKPOINTING, PADDED = "truncated", "packed", "checkpointing", "padded"
AXES = ("classes", "batch", "words", "prompt_depth", "image_size")  # what may grow
UNITS = {"words": "words of a class name", "prompt_depth": "layers with learned tokens", "image_size": "pixels a side"}
Row = dict[str, Any]  # a case and what was measured of it


def add_ratios(rows: list[Row]) -> None:
    """Adds to each row its time as a multiple of the reference's and of the floor's, and its memory of the former's.

    The reference is the padded path where it alone was measured.
    """
    reference = REFERENCE if any(row["path"] == REFERENCE for row in rows) else PADDED

    def beside(row: Row, path: str) -> Row:
        same = ("model", "method", "mixed_precision", *AXES)
        return next((r for r in rows if r["path"] == path and all(r[name] == row[name] for name in same)), {})

    for row in rows:
        floor = CACHED_FLOOR if row["path"] in (CACHED, CACHED_FLOOR) else FLOOR
        for name, path, unit in (
            ("ratio_to_reference", reference, "seconds_per_step"),
            ("ratio_to_floor", floor, "seconds_per_step"),
            ("memory_ratio_to_reference", reference, "peak_bytes_above_model"),
        ):
            other = beside(row, path).get(unit)
            row[name] = row[unit] / other if other and unit in row else None


def varied(rows: list[Row], names: tuple[str, ...]) -> list[str]:
    """Those of `names` of which the rows have several values."""
    return [name for name in names if len({row[name] for row in rows}) > 1]


def table(rows: list[Row]) -> str:
    """The rows in Markdown, for people."""
    more = varied(rows, ("mixed_precision", *AXES[2:]))
    header = ["method", *more, "classes", "batch", "path", "s/step", "images/s", "MB above the model", "MB a class",
              "MB in all", "time / reference", "memory / reference", "time / floor"]  # fmt: skip
    lines, models = [], list(dict.fromkeys(Path(row["model"]).name for row in rows))
    for row in rows:
        cells = [row["method"], *("own" if row[name] is None else row[name] for name in more)]
        cells += [row["classes"], row["batch"], row["path"]]
        if row["status"] == "ok":
            cells += [f"{row['seconds_per_step']:.3g}", f"{row['images_per_second']:.3g}"]
            if "peak_bytes" in row:
                above = row["peak_bytes_above_model"] / 1e6
                cells += [f"{above:.0f}", f"{above / row['classes']:.2g}", f"{row['peak_bytes'] / 1e6:.0f}"]
            else:
                cells += [""] * 3  # of the floor
            ratios = (row[name] for name in ("ratio_to_reference", "memory_ratio_to_reference", "ratio_to_floor"))
            cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        else:
            cells += [row["status"], *[""] * 7]
        lines.append([Path(row["model"]).name, *cells] if len(models) > 1 else cells)
    header = ["model", *header] if len(models) > 1 else header
    devices = sorted({row["device"] for row in rows if "device" in row})
    about = f"{rows[0]['model'] if len(models) == 1 else ', '.join(models)}, {rows[0]['mode']}, {', '.join(devices)}"
    return "\n".join([about, "", *markdown_table(header, lines), ""])


def draw(rows: list[Row], path: Path) -> None:
    """Time and memory, both axes logarithmic: a column for each thing that grows, or else for each method."""
    growing = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    from matplotlib.ticker import LogLocator, NullLocator

    column_of = "axis" if len(growing) > 1 else "method"
    columns = growing if column_of == "axis" else list(dict.fromkeys(row["method"] for row in rows))
    named = {"axis": ["method"], "method": []}[column_of] + varied(rows, ("mixed_precision", "model"))
    figure = new_figure(3 + 3.2 * len(columns), 6.5)
    panels = figure.subplots(2, len(columns), sharex="col", sharey="row", squeeze=False)
    styles: dict[str, dict[str, Any]] = {}
    for column, title in enumerate(columns):
        lines: dict[str, list[Row]] = {}
        axis = title if column_of == "axis" else growing[0]
        others = [name for name in varied(rows, AXES) if name != axis and len(growing) == 1]
        for row in rows:
            if row[column_of] == title and row["status"] == "ok":
                words = [Path(str(row[name])).name for name in named] + [f"{name} {row[name]}" for name in others]
                lines.setdefault(", ".join([*words, row["path"]]), []).append(row)
        for label, points in lines.items():
            style = styles.setdefault(label, line_style(len(styles)) | _DASHES.get(points[0]["path"], {}))
            for panel, unit, scale in zip(
                panels[:, column], ("seconds_per_step", "peak_bytes_above_model"), (1, 1e6), strict=True
            ):
                shown = [point for point in points if point.get(unit) and point[axis]]
                panel.loglog([p[axis] for p in shown], [p[unit] / scale for p in shown], label=label, **style)
        panels[0, column].set(title=title.replace("_", " "))
        values = sorted({row[axis] for row in rows if row[column_of] == title and row[axis]})
        panels[1, column].set(xlabel=UNITS.get(axis, axis), xticks=values, xticklabels=values)
        panels[1, column].xaxis.set_minor_locator(NullLocator())
    for panel in panels[:, 0]:
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
        if panel.get_yscale() == "log":  # it is linear where nothing was measured
            panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    panels[0, 0].set(ylabel="seconds per step")
    panels[1, 0].set(ylabel="peak memory above the model, MB")
    labels = {
        label: line for panel in panels[0] for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if labels:
        figure.legend(labels.values(), labels.keys(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


# The reference and the floor in every picture, whatever their colour.
_DASHES = {REFERENCE: {"linestyle": "--"}, FLOOR: {"linestyle": ":"}, CACHED_FLOOR: {"linestyle": "-."}}
