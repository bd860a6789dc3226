"""Trains methods on data sets over several seeds, by one protocol, and writes one table, a CSV file and pictures.

    python examples/compare.py --output_dir results --datasets toyworld:surfaces/negative
    python examples/compare.py --output_dir results --methods maple "short MaPLe: maple --prompt_depth 1" --shots 1 4 16
    python examples/compare.py --output_dir results --methods maple tgpt --datasets photos --test_datasets sketches

Protocols: "few-shot" trains and tests on all classes, and then tests on each of --test_datasets (cross-dataset, domain
generalisation); "base-to-new" trains on the first half of the classes and tests on both halves.

Each run is one call of examples/train.py into a folder of its own; every argument that is not listed here goes to it.
Calling this again goes on where it was interrupted and adds what is new.
"""

import argparse
import csv
import hashlib
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:] = [path for path in sys.path if Path(path) != HERE]  # evaluate.py there hides the library

from hf_tgpt.cli.arguments import DataArguments, parser_of
from hf_tgpt.cli.output import markdown_table
from hf_tgpt.evaluation.plots import PLOTS_REMEDY, can_plot, plot_bars, plot_shots
from hf_tgpt.training.run_folder import lock_folder

# What --methods knows by name: a method of train.py and its options.
METHODS = {
    "zero-shot": "zero_shot",
    "linear probe": "linear_probe",
    "CoOp": "coop",
    "CoCoOp": "cocoop",
    "VPT": "ivlp --text_prompt_length 0",
    "deep text": "ivlp --vision_prompt_length 0",
    "IVLP": "ivlp",
    "MaPLe": "maple",
    "TGP-T": "tgpt",
    "mutual": "mutual_prompt",
    "LoRA": "lora",
}
MEASURES = {  # column: name in results.json
    "base": "base",
    "new": "new",
    "H": "harmonic_mean",
    "{} classes": "accuracy",
    "{}, WiSE-FT": "wise_ft_accuracy",
}

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("--output_dir", type=Path, required=True)
parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help="by the names "
                    f'{", ".join(METHODS)}, or as "LABEL: METHOD OPTIONS" of train.py (default: all)')  # fmt: skip
parser.add_argument("--datasets", nargs="+", default=["toyworld:codes"], metavar="DATASET")
parser.add_argument("--protocols", nargs="+", default=["few-shot"], choices=["few-shot", "base-to-new"])
parser.add_argument("--test_datasets", nargs="+", default=[], metavar="DATASET", help="few-shot: tested on these too")
parser.add_argument("--class_pictures", action="store_true", help="for each run and test also a picture of the change "
                    "of each class and of the confusions, beside its results")  # fmt: skip
parser.add_argument("--shots", nargs="+", type=int, default=[16])
parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
args, for_train = parser.parse_known_args()

# What evaluate.py has to know too, of the data set that was trained on and of any.
of_data = parser_of(DataArguments, add_help=False)
of_data.add_argument("--mixed_precision")
known = vars(of_data.parse_known_args(for_train)[0])
for_any = {name: known.pop(name) for name in ("model", "mixed_precision")}
for_same = {name: value for name, value in known.items() if name not in ("dataset", "classes")}
classes = known["classes"]  # of few-shot
if classes != "all" and "base-to-new" in args.protocols:
    parser.error(f"`classes`={classes!r} is for few-shot alone; base-to-new has both halves.")
args.output_dir.mkdir(parents=True, exist_ok=True)
if not lock_folder(args.output_dir):
    parser.error(f"`output_dir`={str(args.output_dir)!r} is being written to by another comparison.")
failures: list[str] = []


def slug(text: str) -> str:
    """A name for a file; of a long text, its beginning and a hash."""
    name = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in text).strip("._")
    return name if len(name) <= 150 else f"{name[:130]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def run(program: str, *arguments) -> str:
    """Calls another example; returns what it has to say where it failed."""
    errors = None if sys.stderr.isatty() else subprocess.PIPE  # Accelerate tells its defaults each time
    command = ["accelerate", "launch", HERE / program, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=errors, text=True)
    return (done.stderr or "see above") if done.returncode else ""


def results_of(file: Path, dataset: str) -> dict | None:
    """What a program has written, if it has. Two data sets whose names make one folder's name are not mixed up."""
    if not file.exists():
        return None
    results = json.loads(file.read_text())
    if results["dataset"] != dataset:
        raise SystemExit(f"{file} is of {results['dataset']}, not of {dataset}; use another --output_dir.")
    return results


def trained(folder: Path, dataset: str, method: list[str], classes: str, shots: int, seed: int) -> dict:
    """The results of one run of train.py, which is called if there are none; nothing if it fails."""
    file = folder / "results.json"
    if (results := results_of(file, dataset)) is None:
        print(f"{dataset}, {' '.join(method)}, {classes} classes, {shots} shots, seed {seed}", file=sys.stderr)
        again = ["--resume"] if (folder / "run.json").exists() else []
        about = ["--dataset", dataset, "--classes", classes, "--shots", shots, "--seed", seed]
        failure = run("train.py", "--method", *method, *about, *for_train, "--output_dir", folder, *again)
        if failure:
            failures.append(f"The run in {folder} failed:\n{failure}")
        results = results_of(file, dataset)
    return results or {}


def evaluated(folder: Path, dataset: str, classes: str, options: dict) -> float | None:
    """The accuracy of what was trained in the folder, by evaluate.py; None if it cannot be had for these classes."""
    file = folder / f"{slug(dataset)}-{classes}.json"
    picture = file.with_suffix(".png")
    done = (results := results_of(file, dataset)) is not None and (picture.exists() or not args.class_pictures)
    if not done and (folder / "results.json").exists():
        about = ["--dataset", dataset, "--classes", classes]
        about += ["--picture", picture] if args.class_pictures else []
        for name, value in options.items():
            about += [f"--{name}", value] if value is not None else []
        failure = run("evaluate.py", "--adapter", folder, *about, "--output", file)
        if (results := results_of(file, dataset)) is None:
            failures.append(f"The evaluation of {folder} on {dataset} failed:\n{failure}")
    return (results or {}).get("accuracy")


# 1. The runs, each only if it is missing.
cases: dict[tuple, list[dict]] = {}  # (data set, shots, method): one dict for each seed
for dataset in args.datasets:
    for shots in args.shots:
        for label in args.methods:
            label, _, method = label.partition(": ")
            method = shlex.split(method or METHODS.get(label, label))
            for seed in args.seeds:
                folder = args.output_dir / slug(dataset) / slug(" ".join([*method, *for_train]))
                folder = folder / f"{shots}-shots-seed-{seed}"
                result: dict = {}
                if "few-shot" in args.protocols:
                    result = trained(folder / classes, dataset, method, classes, shots, seed)
                    if args.class_pictures:
                        evaluated(folder / classes, dataset, classes, for_any | for_same)
                    for other in args.test_datasets:
                        result[other] = evaluated(folder / classes, other, classes, for_any)
                if "base-to-new" in args.protocols:
                    base = trained(folder / "base", dataset, method, "base", shots, seed)
                    result = base | {"accuracy": None, "wise_ft_accuracy": None} | result
                    result["base"] = base.get("accuracy")
                    result["new"] = evaluated(folder / "base", dataset, "new", for_any | for_same)
                    if result["base"] is not None and result["new"] is not None:
                        result["harmonic_mean"] = statistics.harmonic_mean([result["base"], result["new"]])
                if "seconds" in result:  # else it failed
                    cases.setdefault((dataset, shots, label), []).append(result)

# 2. Mean and, over several seeds, standard deviation, in percent; over several data sets also their average.
measures = {column.format(classes): name for column, name in MEASURES.items()}
measures |= {f"on {name}": name for name in args.test_datasets}
if "base-to-new" not in args.protocols:
    measures = {column: name for column, name in measures.items() if column not in ("base", "new", "H")}
if len(args.datasets) > 1:
    for dataset, shots, label in [case for case in cases if case[0] == args.datasets[0]]:
        each = [cases.get((dataset, shots, label), []) for dataset in args.datasets]
        average = []
        if any(len(results) < len(args.seeds) for results in each):
            continue
        for seed in range(len(args.seeds)):
            runs = [results[seed] for results in each]
            names = [name for name in measures.values() if all(run.get(name) is not None for run in runs)]
            sums = {name: statistics.mean(run[name] for run in runs) for name in names}
            if "harmonic_mean" in sums:  # of the averages, as the papers' tables have it
                sums["harmonic_mean"] = statistics.harmonic_mean([sums["base"], sums["new"]])
            costs = ("trainable_parameters", "seconds", "peak_memory_bytes")
            average.append(sums | {name: statistics.mean(run[name] for run in runs) for name in costs})
        cases["average", shots, label] = average


def summarised(runs: list[dict]) -> dict[str, tuple[float, float]]:
    percentages = {
        column: [100 * run[name] for run in runs if run.get(name) is not None] for column, name in measures.items()
    }
    return {
        column: (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        for column, values in percentages.items()
        if values
    }


table = {case: summarised(runs) for case, runs in cases.items()}
columns = [column for column in measures if any(column in row for row in table.values())]

# 3. The table for people, the same for programs, and pictures.
lines, rows = [], []
for dataset, shots in dict.fromkeys(case[:2] for case in cases):
    body = []
    for label in [case[2] for case in cases if case[:2] == (dataset, shots)]:
        runs, row = cases[dataset, shots, label], table[dataset, shots, label]
        cost = [statistics.mean(run[name] for run in runs) for name in ("trainable_parameters", "seconds")]
        memory = max(run["peak_memory_bytes"] for run in runs) / 2**20
        spread = len(runs) > 1
        cells = [f"{row[c][0]:.1f}" + spread * f" ± {row[c][1]:.1f}" if c in row else "" for c in columns]
        body.append([label, *cells, f"{cost[0]:,.0f}", f"{cost[1]:.0f}", f"{memory:.0f}"])
        numbers = [value for column in columns for value in row.get(column, ("", ""))]
        rows.append([dataset, shots, label, len(runs), *numbers, round(cost[0]), round(cost[1], 1), round(memory)])
    header = ["method", *columns, "trained parameters", "seconds", "peak MiB"]
    lines += [f"**{dataset}**, {shots} shots, seeds {', '.join(map(str, args.seeds))}", ""]
    lines += [*markdown_table(header, body), ""]
(args.output_dir / "table.md").write_text("\n".join(lines))
with (args.output_dir / "table.csv").open("w", newline="") as file:
    both = [name for column in columns for name in (column, f"{column}, deviation")]
    header = ["dataset", "shots", "method", "seeds", *both, "trained parameters", "seconds", "peak MiB"]
    csv.writer(file).writerows([header, *rows])
for dataset in dict.fromkeys(case[0] for case in cases) if can_plot() else ():
    found = {case[1:]: row for case, row in table.items() if case[0] == dataset}
    plot_bars(args.output_dir / f"{slug(dataset)}.png", dataset, columns, found, max(args.shots))
    if len(args.shots) > 1 and f"{classes} classes" in columns:
        plot_shots(args.output_dir / f"{slug(dataset)}-shots.png", dataset, f"{classes} classes", found)
if not can_plot():
    print(f"There are no pictures, which need matplotlib: {PLOTS_REMEDY}.", file=sys.stderr)
print("\n".join(lines))
if failures:
    raise SystemExit("\n\n".join(failures))
