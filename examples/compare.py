"""Trains several methods on several data sets over several seeds and writes one table.

    python examples/compare.py --output_dir results --datasets toyworld:codes toyworld:shapes/fog

Each run is one call of examples/train.py into a folder of its own; every argument that is not listed here goes to it.
Calling this again goes on where it was interrupted and adds what is new.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("--output_dir", type=Path, required=True)
parser.add_argument("--methods", nargs="+", default=["maple", "tgpt"])
parser.add_argument("--datasets", nargs="+", default=["toyworld:codes"])
parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
args, for_train = parser.parse_known_args()

# 1. The runs that are missing.
for dataset in args.datasets:
    for method in args.methods:
        for seed in args.seeds:
            # Other arguments for train.py make another run.
            name = "-".join([dataset.strip("./"), method, *for_train]).replace(":", "-").replace("/", "-")
            folder = args.output_dir / name / f"seed-{seed}"
            if (folder / "results.json").exists():
                continue
            command = ["accelerate", "launch", str(Path(__file__).with_name("train.py")), "--method", method]
            command += ["--dataset", dataset, "--seed", str(seed), "--output_dir", str(folder), *for_train]
            if (folder / "checkpoint").exists():
                command.append("--resume")
            elif folder.exists():  # interrupted before its first checkpoint
                (folder / "run.json").unlink(missing_ok=True)
                (folder / "best_adapter.safetensors").unlink(missing_ok=True)
            print(f"{dataset}, {method}, seed {seed}", file=sys.stderr)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

# 2. All results in the folder, by data set, method and number of shots.
groups: dict[tuple, list[dict]] = {}
for path in sorted(args.output_dir.rglob("results.json")):
    result = json.loads(path.read_text())
    groups.setdefault((result["dataset"], result["method"], result["shots"]), []).append(result)


def mean_and_spread(runs: list[dict], name: str) -> str:
    """In percent: mean and, over several seeds, standard deviation."""
    values = [100 * run[name] for run in runs if name in run]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


header = ["dataset", "method", "shots", "seeds", "zero-shot", "accuracy", "WiSE-FT", "trained parameters", "seconds"]
rows = [
    [
        dataset,
        method,
        shots,
        len(runs),
        f"{100 * runs[0]['zero_shot_accuracy']:.1f}",
        mean_and_spread(runs, "accuracy"),
        mean_and_spread(runs, "wise_ft_accuracy"),
        f"{runs[0]['trainable_parameters']:,}",
        round(statistics.mean(run["seconds"] for run in runs)),
    ]
    for (dataset, method, shots), runs in groups.items()
]

# 3. The table, for people and for programs.
lines = [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]
(args.output_dir / "table.md").write_text("\n".join(lines) + "\n")
with (args.output_dir / "table.csv").open("w", newline="") as file:
    csv.writer(file).writerows([header, *rows])
print("\n".join(lines))
