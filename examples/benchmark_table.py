"""The rows of benchmark.py as ratios, a table and a picture."""

from pathlib import Path
from typing import Any

from hf_tgpt.cli.output import markdown_table
from hf_tgpt.evaluation.plots import new_figure

REFERENCE, FLOOR, PADDED = "reference", "floor", "padded"  # paths that others are set beside
Row = dict[str, Any]  # a case and what was measured of it


def add_ratios(rows: list[Row]) -> None:
    """Adds to each row its time as a multiple of the reference's and of the floor's, and its memory of the former's.

    The reference is the padded path where it alone was measured.
    """
    reference = REFERENCE if any(row["path"] == REFERENCE for row in rows) else PADDED

    def beside(row: Row, path: str) -> Row:
        same = ("model", "method", "classes", "batch")
        return next((r for r in rows if r["path"] == path and all(r[name] == row[name] for name in same)), {})

    for row in rows:
        for name, path, unit in (
            ("ratio_to_reference", reference, "seconds_per_step"),
            ("ratio_to_floor", FLOOR, "seconds_per_step"),
            ("memory_ratio_to_reference", reference, "peak_bytes_above_model"),
        ):
            other = beside(row, path).get(unit)
            row[name] = row[unit] / other if other and unit in row else None


def table(rows: list[Row]) -> str:
    """The rows in Markdown, for people."""
    header = ["method", "classes", "batch", "path", "s/step", "images/s", "MB above the model", "MB a class",
              "MB in all", "time / reference", "memory / reference", "time / floor"]  # fmt: skip
    lines, models = [], list(dict.fromkeys(Path(row["model"]).name for row in rows))
    for row in rows:
        cells = [row["method"], row["classes"], row["batch"], row["path"]]
        if row["status"] == "ok":
            cells += [f"{row['seconds_per_step']:.3g}", f"{row['images_per_second']:.3g}"]
            above = row["peak_bytes_above_model"] / 1e6
            cells += [f"{above:.0f}", f"{above / row['classes']:.2g}", f"{row['peak_bytes'] / 1e6:.0f}"]
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
    """Time and memory over the number of classes, a column for each method, both axes logarithmic."""
    methods, batches = list(dict.fromkeys(row["method"] for row in rows)), {row["batch"] for row in rows}
    models = {row["model"] for row in rows}
    figure = new_figure(1 + 4 * len(methods), 7)
    axes = figure.subplots(2, len(methods), sharex=True, sharey="row", squeeze=False)
    for column, method in enumerate(methods):
        lines: dict[str, list[Row]] = {}
        for row in rows:
            if row["method"] == method and row["status"] == "ok":
                label = row["path"] + (f", batch {row['batch']}" if len(batches) > 1 else "")
                label += f", {Path(row['model']).name}" if len(models) > 1 else ""
                lines.setdefault(label, []).append(row)
        for label, points in lines.items():
            style = {"reference": "--", "floor": ":"}.get(points[0]["path"], "-")
            classes = [point["classes"] for point in points]
            axes[0, column].loglog(classes, [p["seconds_per_step"] for p in points], "o" + style, label=label)
            axes[1, column].loglog(classes, [p["peak_bytes_above_model"] / 1e6 for p in points], "o" + style)
        axes[0, column].set(title=method)
        axes[1, column].set(xlabel="classes")
    axes[0, 0].set(ylabel="seconds per step")
    axes[1, 0].set(ylabel="peak memory above the model, MB")
    if axes[0, 0].lines:
        axes[0, 0].legend()
    figure.savefig(path, dpi=110)
