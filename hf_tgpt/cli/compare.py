"""Compares methods on data sets over shots and seeds, and reports the best one's lead.

Without --methods it compares zero-shot with the methods on frozen features, which take seconds each; `--methods all`
compares every method. The protocol "few-shot" trains and tests on all classes, then tests on each of --test_datasets
(cross-dataset transfer, domain generalisation); "base-to-new" trains on the first half of the classes and tests on
both halves.

Each run is one `hf-tgpt train` in its own folder; every option that is not listed here is passed to it. The same
command with the same --output_dir continues where it was interrupted, and adds what is new.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shlex
import shutil
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..data import load_splits, sample_few_shot
from ..evaluation.comparison import Case, Runs
from ..training.run_folder import lock_folder
from ..utils.files import read_json
from .arguments import DataArguments, parse_arguments, parser_of
from .compare_files import write_comparison
from .compare_plan import FAST, LABELS, Method, Trial, chosen_methods, data_folder, method_folder, short_names
from .compare_runs import Runner, runner
from .options import DTYPES, CommandParser, WrongArguments, add_json, underscored, whole_number
from .output import tidy_output
from .words import in_options, speak_of

EXAMPLES = """
hf-tgpt compare --dataset pictures
hf-tgpt compare --dataset pictures --shots 1 4 16 --output_dir results
hf-tgpt compare --methods fast maple "short MaPLe: maple --prompt_depth 1" --datasets toyworld:codes pictures
"""

# Options of train that this command sets for each run, and what to type instead.
OURS = {
    "method": "--methods", "seed": "--seeds", "resume": "--output_dir, the folder to continue in",
    "push_to_hub": "`hf-tgpt train` for the best method",
}  # fmt: skip
# Options that all runs share, so they cannot be set for a single method.
_OF_ALL = ("dataset", "shots", "classes", "output_dir", "cache_dir", "model", "json")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs the comparison; `argv` defaults to that of the process. Returns 1 if any run failed, else 0."""
    # 1. Arguments, all checked before the first run.
    options = parser(prog)
    args, for_train = options.parse_known_args(underscored(sys.argv[1:] if argv is None else argv))
    for_train += ["--allow_fewer"] * args.allow_fewer
    tidy_output()
    speak_of(options)
    try:
        methods = chosen_methods(args.methods)
    except ValueError as error:
        options.error(in_options(str(error)))
    _refuse(options, for_train, OURS)
    of_data, of_any = _data_options(for_train, options.prog)
    of_few_shot = of_data.pop("classes")
    classes = {"few-shot": of_few_shot, "base-to-new": "base"}
    if of_few_shot != "all" and "base-to-new" in args.protocols:
        options.error(f"--classes={of_few_shot} is for few-shot alone; base-to-new has both halves.")
    launcher = shlex.split(args.launcher)
    if launcher and shutil.which(launcher[0]) is None:
        options.error(f"--launcher={args.launcher!r}: there is no program {launcher[0]!r}; install it or correct this.")
    output_dir = args.output_dir or Path("runs") / f"compare-{datetime.now():%Y%m%d-%H%M%S}"
    if output_dir.exists() and not output_dir.is_dir():
        options.error(f"--output_dir={str(output_dir)!r} is a file; name a folder.")
    shots = [f"--shots={number}" for number in args.shots or [16]] + ["--allow_fewer"] * (args.shots is None)
    for method in methods:
        for source in args.datasets:
            _check(options, method, ["--dataset", source, *shots, *for_train])

    # 2. The missing runs.
    names = short_names([*args.datasets, *args.test_datasets])
    trials = [
        Trial(Case(names[source], number, method.label), source, method, seed, classes[protocol],
              output_dir / data_folder(source) / method_folder(method, for_train) / f"{number}-shots-seed-{seed}" /
              classes[protocol])
        for source in args.datasets for number in args.shots or [16] for method in methods for seed in args.seeds
        for protocol in args.protocols
    ]  # fmt: skip
    missing = [trial for trial in trials if not trial.done]
    needed: Sequence[int] = ()  # pictures of every class
    if "few-shot" in args.protocols and of_few_shot == "all" and not args.allow_fewer:
        needed = args.shots or ()
    for source in dict.fromkeys(trial.source for trial in missing):
        _check_data(source, of_data, needed)
    for source in args.test_datasets if missing else ():
        _check_data(source, {})
    output_dir.mkdir(parents=True, exist_ok=True)
    if not lock_folder(output_dir):
        raise ValueError(f"`output_dir`={str(output_dir)!r} is being written to by another comparison.")
    say(f"{len(methods)} methods, {len(trials)} runs, {len(trials) - len(missing)} of them done -> {output_dir}")
    for_train += ["--cache_dir", str(args.cache_dir or output_dir / "features")]
    for_train += ["--allow_fewer"] * (args.shots is None)
    with runner(launcher) as run:
        comparison = Comparison(run, args, for_train, of_data, of_any, names)
        runs = comparison.run(trials)

    # 3. Tables for people and for programs, and plots.
    measures: dict[str, str] = {}
    if "base-to-new" in args.protocols:
        measures |= {"base": "base", "new": "new", "harmonic_mean": "H"}
    if "few-shot" in args.protocols:
        measures |= {"accuracy": f"{of_few_shot} classes", "wise_ft_accuracy": "WiSE-FT"}
        measures |= {f"on {names[source]}": f"on {names[source]}" for source in args.test_datasets}
    datasets = [names[source] for source in args.datasets]
    table, results = write_comparison(output_dir, runs, datasets, args.seeds, measures)
    results |= {"failures": comparison.failures, "output_dir": str(output_dir)}
    print(json.dumps(results, indent=2, ensure_ascii=False) if args.json else table)
    leads = sorted(results["best"], key=lambda row: row["shots"])
    best = {
        row["dataset"]: Case(row["dataset"], row["shots"], row["best"]) for row in leads
    }  # for the largest number of shots
    for trial in trials:
        if trial.case == best.get(trial.case.dataset) and trial.done:
            say(f"The best method's adapter, {trial}: {trial.folder}")
            del best[trial.case.dataset]
    if comparison.failures:
        say("\n".join([f"{len(comparison.failures)} failed:", *(f"  - {reason}" for reason in comparison.failures)]))
    return int(bool(comparison.failures))


@dataclass
class Comparison:
    """The runs of a comparison, one after the other, and their results."""

    runner: Runner
    args: argparse.Namespace
    for_train: list[str]
    of_data: dict[str, Any]  # evaluate's options for the training data
    of_any: dict[str, Any]  # and for any data
    names: dict[str, str]
    failures: list[str] = field(default_factory=list)
    place: str = ""  # position of the current run among all

    def run(self, trials: list[Trial]) -> Runs:
        """Runs what is missing and returns all results by case and seed, without those that failed."""
        runs: Runs = {}
        taken: dict[str, list[float]] = {}  # seconds, by method
        for number, trial in enumerate(trials, 1):
            new, self.place = not trial.done, f"[{number}/{len(trials)}]"
            results = self._trained(trial)
            if results is None:
                continue
            known = runs.setdefault(trial.case, {}).setdefault(trial.seed, {})
            known |= self._measured(trial, results, known)
            taken.setdefault(trial.method.label, []).append(results["seconds"])
            if new:
                left = _time_left([trial for trial in trials[number:] if not trial.done], taken)
                done = f"{100 * results['accuracy']:.1f} % in {results['seconds']:.0f} s"
                say(f"{self.place} {trial}: {done}{left}")
        return runs

    def _trained(self, trial: Trial) -> dict[str, Any] | None:
        """The results of a training run, which is started if there are none; None if it fails."""
        if not trial.done:
            about = ["--dataset", trial.source, "--classes", trial.classes, "--shots", str(trial.case.shots)]
            about += ["--no_report", "--seed", str(trial.seed), *self.for_train, "--output_dir", str(trial.folder)]
            about += ["--resume"] * (trial.folder / "run.json").exists()
            if why := self.runner.run(["train", "--method", *trial.method.words, *about], trial.log):
                self._failed(trial, why)
                return None
        return read_json(trial.folder / "results.json")

    def _measured(self, trial: Trial, results: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
        """The results of a training run and its tests, in addition to those already `known` from the other protocol."""
        # The cost of a run by itself: features that another run has stored are included.
        costs = {"seconds": results["seconds"] + results.get("feature_seconds", 0)}
        costs |= {name: results[name] for name in ("trainable_parameters", "peak_memory_bytes")}
        if "base-to-new" in self.args.protocols and trial.classes == "base":
            base, new = results["accuracy"], self._accuracy(trial, trial.source, "new", self.of_data)
            both = {} if new is None else {"harmonic_mean": statistics.harmonic_mean([base, new])}
            return costs | known | {"base": base, "new": new} | both
        if self.args.class_pictures:
            self._accuracy(trial, trial.source, trial.classes, self.of_data)
        others = {self.names[other]: other for other in self.args.test_datasets}
        tested = {f"on {name}": self._accuracy(trial, other, trial.classes, {}) for name, other in others.items()}
        return results | costs | tested

    def _accuracy(self, trial: Trial, source: str, classes: str, of_data: dict[str, Any]) -> float | None:
        """The results of `hf-tgpt evaluate`; None if the method lacks these classes or the evaluation fails."""
        file = trial.folder / f"{data_folder(source)}-{classes}.json"
        picture = file.with_suffix(".png")
        if not file.exists() or (self.args.class_pictures and not picture.exists()):
            words = ["--adapter", str(trial.folder), "--dataset", source, "--classes", classes, "--output", str(file)]
            words += ["--picture", str(picture)] if self.args.class_pictures else []
            options = {name: value for name, value in (self.of_any | of_data).items() if value is not None}
            words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
            why = self.runner.run(["evaluate", *words], trial.log)
            if why and not file.exists():
                self._failed(trial, f"{why} (tested on {self.names[source]})")
        return read_json(file)["accuracy"] if file.exists() else None

    def _failed(self, trial: Trial, why: str) -> None:
        self.failures.append(f"{trial}: {why} (log: {trial.log})")
        say(f"{self.place} {trial}: failed: {why}")


def say(text: str) -> None:
    """Prints progress and remarks."""
    print(text, file=sys.stderr, flush=True)


def _time_left(todo: list[Trial], taken: dict[str, list[float]]) -> str:
    """The remaining time in words, from the mean of each method's runs so far, or of all runs."""
    usual = statistics.fmean(seconds for each in taken.values() for seconds in each)
    left = sum(statistics.fmean(taken.get(trial.method.label, [usual])) for trial in todo)
    if not todo:
        return ""
    for unit, seconds in (("h", 3600), ("min", 60)):
        if left >= 1.5 * seconds:
            return f"; about {left / seconds:.0f} {unit} left"
    return f"; about {left:.0f} s left"


# Arguments -----------------------------------------------------------------------------------------------------------


def parser(prog: str | None = None) -> CommandParser:
    """The command's parser."""
    parser = CommandParser(prog, description=__doc__, usage="%(prog)s [options]", examples=EXAMPLES)
    add = parser.add_argument
    add("--datasets", "--dataset", nargs="+", default=["toyworld:codes"], metavar="DATASET",
        help="folders of pictures, or other data sets as for train (default: toyworld:codes)")  # fmt: skip
    add("--methods", nargs="+", default=["fast"], metavar="METHOD", help=f"names of methods: {', '.join(LABELS)}; "
        f'fast, the first {len(FAST)}; all; or "LABEL: METHOD OPTIONS" as for train (default: fast)')  # fmt: skip
    add("--shots", nargs="+", type=lambda text: whole_number(text, 1, None), metavar="N",
        help="training images per class (default: 16, or all images of a class that has fewer)")  # fmt: skip
    add("--allow_fewer", action="store_true", help="accept classes with fewer images than --shots")
    add("--seeds", nargs="+", type=whole_number, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    add("--output_dir", type=Path, help="the folder of all results (default: a new one in runs/)")
    add("--protocols", nargs="+", default=["few-shot"], choices=["few-shot", "base-to-new"],
        help="(default: few-shot)")  # fmt: skip
    add("--test_datasets", nargs="+", default=[], metavar="DATASET", help="additional test sets, for few-shot")
    add("--class_pictures", action="store_true", help="also plot the change of each class and the confusion matrix for "
        "each run and test")  # fmt: skip
    add(
        "--cache_dir",
        type=Path,
        help="the folder of stored features, which runs share (default: features in --output_dir)",
    )
    add("--launcher", default="", metavar="COMMAND", help='the command that starts each run, such as "accelerate '
        'launch" for several processes (default: a single process)')  # fmt: skip
    add_json(parser)
    parser.lead_with("datasets", "methods", "shots", "seeds", "output_dir", "json")
    return parser


def _refuse(parser: argparse.ArgumentParser, words: Sequence[str], names: dict[str, str]) -> None:
    for word in words:
        name = word.partition("=")[0].removeprefix("--") if word.startswith("--") else ""
        if name in names:
            parser.error(f"--{name} is set for each run by this command; use {names[name]}.")


def _check(parser: CommandParser, method: Method, words: list[str]) -> None:
    """Ends the program, with train's own error, for options that train would refuse."""
    options = underscored(method.words[1:])
    _refuse(parser, options, OURS | {name: f"--{name} beside --methods" for name in _OF_ALL})
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the error names train and its help
            parse_arguments(["--method", method.words[0], *options, *words])
    except WrongArguments as error:
        reason, own = error.message, re.match("unrecognized arguments: (--[^ =]+)", error.message)
        if own and (hint := parser.nearest(own[1])):
            parser.error(f"unrecognized arguments: {own[1]}{hint}")
        parser.error(f"{method.label}: {reason}")
    finally:
        speak_of(parser)


def _data_options(for_train: list[str], prog: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train's options about its own data, and those that any evaluation takes."""
    parser = parser_of(DataArguments, "", prog=prog, add_help=False)
    parser.add_argument("--mixed_precision")
    parser.add_argument("--dtype", default=DTYPES[0])
    known = vars(parser.parse_known_args(for_train)[0])
    del known["dataset"]
    return known, {name: known.pop(name) for name in ("model", "mixed_precision", "dtype")}


def _check_data(source: str, of_data: dict[str, Any], shots: Sequence[int] = ()) -> None:
    """Raises ValueError or OSError for data that cannot be read, or whose classes have fewer pictures than `shots`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each run lists the remarks on its data
        splits = load_splits(**DataArguments(**of_data | {"dataset": source}).source, seed=0 if shots else None)
    for number in shots:
        sample_few_shot(splits["train"], number)
