"""Measures time and memory of a step over methods, numbers of classes and more, each case in its own process.

    python examples/benchmark.py
    python examples/benchmark.py --model path/to/vit-b-16 --methods tgpt coop --classes 10 100 1000 --batch 8 --cached
    python examples/benchmark.py --methods coop maple --over classes 10 100 1000 --over batch 1 8 64 --over words 2 8 32
    python examples/benchmark.py --families clip metaclip_2 siglip chinese_clip --methods maple --classes 20 40 80

Paths are measured side by side, on random pictures; by default the first three:

    ours       the adapter as usually called (with --cached also `ours, cached features`: training that begins at
               what `hf_tgpt.training.features` keeps, without the vision tower)
    reference  what the released research codes do: sentences padded to the whole context, all classes at once, nothing
               kept between steps; with the same weights it gives the same logits and losses (tests/test_benchmark.py)
    floor      what cannot be left out: the matrix products of ours, each at the rate that the machine reaches for its
               size (benchmark_floor.py); with --cached also `floor, cached features`
    truncated  ours without packing and chunks: all sentences at once, each by itself, up to the longest end
    packed     ours without chunks: all sentences at once, what they have in common computed once
    checkpointing  the same with transformers' gradient checkpointing, layer by layer in both towers
    padded     the plain way on a model of any family, where reference is CLIP's: ours with sentences padded
               to the whole context, all at once and each by itself; by default with --families, beside ours

Each --over is a series, in which one thing grows and the others keep their first value: classes, batch, words (of a
class name, 1.1 tokens each), prompt_depth (of the methods that have one) or image_size (with which the position
embeddings change, so the model is a random one of the same config). Without --over, classes grow.

A step is forward, backward and optimizer step (--mode train), or a forward that may reuse class features (--mode
infer); benchmark_loading.py measures how fast pictures come to it. Peak memory is what steps need above the loaded
model and adapter: on a GPU what torch allocates, on a CPU the resident size; the JSON file also has the peak of all
(`peak_bytes`: on a CPU the whole process with its libraries). Threads are torch's, so OMP_NUM_THREADS
sets them. A case that runs out of memory or time is a row that says so.
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from benchmark_case import ABSENT, CLOCKS, class_names, limit_memory, measure, plain_methods
from benchmark_table import (
    AXES,
    CACHED,
    CACHED_FLOOR,
    CHECKPOINTING,
    FLOOR,
    OURS,
    PACKED,
    PADDED,
    REFERENCE,
    TRUNCATED,
    Row,
    add_ratios,
    draw,
    table,
)

import hf_tgpt
from hf_tgpt.cli.output import tidy_output
from hf_tgpt.encoders import FAMILIES
from hf_tgpt.evaluation.plots import PLOTS_REMEDY, can_plot
from hf_tgpt.methods import available_methods, config_class
from hf_tgpt.utils.files import write_json

TOO_MUCH = ("out of memory", "out of time")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(arguments)
    tidy_output()
    if args.case:
        case = json.loads(args.case)
        limit_memory(case.pop("memory_limit"))
        print(json.dumps(measure(**case)))
        return
    paths = args.paths or ([OURS, PADDED] if args.families else [OURS, REFERENCE, FLOOR])
    if args.cached:
        paths = [*paths, CACHED, *([CACHED_FLOOR] if FLOOR in paths else [])]
    try:
        grown = series(args)
        if REFERENCE in paths:
            plain_methods()
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))

    args.json.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    done: dict[str, Row] = {}  # series may share a case
    with random_models(args.families) if args.families else contextlib.nullcontext([args.model]) as models:
        for model, method, precision, (axis, settings), path in itertools.product(
            models, args.methods, args.mixed_precision, grown, paths
        ):
            common = {"model": model, "mode": args.mode, "mixed_precision": precision}
            given_up: Row = {}
            for setting in settings:
                case = {"method": method, "path": path} | setting
                asked = case | common | {"steps": args.steps, "clock": args.clock, "memory_limit": args.memory_limit}
                key = json.dumps(asked)
                if key not in done and not given_up:
                    done[key] = run(asked, args.time_limit, args.same_process)
                result = done.get(key) or given_up
                if result["status"] in TOO_MUCH:
                    given_up = {"status": f"not tried: {result['status']} with {axis}={setting[axis]}"}
                if not result["status"].startswith(ABSENT):
                    rows.append(case | common | {"axis": axis} | result)
                    write(rows, args.json)  # so that an interrupted run leaves what it has
                    print(*(value for value in case.values() if value), result["status"], sep=", ", file=sys.stderr)
    if not rows:
        parser.error("nothing was left to measure: no method here has what was asked for.")
    if can_plot():
        draw(rows, args.json.with_suffix(".png"))
    else:
        print(f"There is no plot, since it needs matplotlib: {PLOTS_REMEDY}.", file=sys.stderr)
    print(table(rows))


def write(rows: list[Row], file: Path) -> None:
    """Writes the rows with their ratios, and the table beside them."""
    add_ratios(rows)
    write_json(file, rows)
    file.with_suffix(".md").write_text(table(rows))


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(hf_tgpt.TOY_CLIP), help="a CLIP: a Hub id or folder; a folder with only "
                        "config and tokenizer starts at random (default: the package's toy CLIP)")  # fmt: skip
    parser.add_argument("--families", nargs="+", choices=FAMILIES, help="random models of these in place of --model: "
                        "a text tower of 4 layers, 256 wide, and a small image tower")  # fmt: skip
    trained = [name for name in available_methods() if config_class(name).trains]
    parser.add_argument("--methods", nargs="+", default=["tgpt", "maple"], choices=trained)
    parser.add_argument("--classes", nargs="+", type=int, help="(default: 10 100 1000; with --over 100)")
    parser.add_argument("--batch", nargs="+", type=int, default=[8], help="images of a step")
    parser.add_argument("--words", nargs="+", type=int, default=[None], help="of a class name, from 2 on")
    parser.add_argument("--prompt_depth", nargs="+", type=int, default=[None], help="layers with learned tokens "
                        "(default: the method's)")  # fmt: skip
    parser.add_argument("--image_size", nargs="+", type=int, default=[None], help="pixels (default: the model's)")
    parser.add_argument("--over", nargs="+", action="append", metavar=("WHAT", "VALUE"),
                        help=f"a series over one of {', '.join(AXES)}, such as: --over batch 1 8 64")  # fmt: skip
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that is not; the median counts; "
                        "0: the first one alone")  # fmt: skip
    parser.add_argument("--mode", default="train", choices=["train", "infer"])
    parser.add_argument("--paths", nargs="+", help=f"(default: {OURS} {REFERENCE} {FLOOR})",
                        choices=[OURS, REFERENCE, FLOOR, TRUNCATED, PACKED, CHECKPOINTING, PADDED])  # fmt: skip
    parser.add_argument("--cached", action="store_true", help="also measure ours with cached features, where it can be")
    parser.add_argument("--mixed_precision", nargs="+", default=["no"], choices=["no", "bf16"], help="torch's autocast")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: the processor's time of one thread, "
                        "for ratios on a busy machine")  # fmt: skip
    parser.add_argument("--time_limit", type=float, default=600, help="seconds for a case, loading included")
    parser.add_argument("--memory_limit", type=float, help="GiB for a case on a CPU, beside the program's own "
                        "(default: 80%% of the machine's)")  # fmt: skip
    parser.add_argument("--same_process", action="store_true", help="all in this process, without limits: faster, "
                        "and as exact on a GPU, where torch counts a case's memory")  # fmt: skip
    parser.add_argument("--json", type=Path, default="benchmark.json", help="the rows; table and picture go beside it")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # a process of its own is asked for this case
    return parser


def series(args: argparse.Namespace) -> list[tuple[str, list[Row]]]:
    """What grows, and the settings that it grows through, smallest first. Raises ValueError for an unknown --over."""
    values = {axis: getattr(args, axis) for axis in AXES} | {"classes": args.classes or [10, 100, 1000]}
    if not args.over:
        others = [
            dict(zip(AXES[1:], chosen, strict=True)) for chosen in itertools.product(*[values[a] for a in AXES[1:]])
        ]
        return [("classes", [{"classes": count} | other for count in sorted(values["classes"])]) for other in others]
    start = {axis: chosen[0] for axis, chosen in values.items()} | {"classes": (args.classes or [100])[0]}
    grown = []
    for axis, *numbers in args.over:
        if axis not in AXES or not numbers or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"--over {' '.join([axis, *numbers])}: give one of {', '.join(AXES)}, then whole numbers.")
        grown.append((axis, [start | {axis: number} for number in sorted(map(int, numbers))]))
    return grown


@contextlib.contextmanager
def random_models(families: Sequence[str]) -> Iterator[list[str]]:
    """Folders with a model of each family, all of the same sizes."""
    from pretrain_tiny_clip import FAMILIES, random_model, train_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name in families:
            torch.manual_seed(0)
            family = dataclasses.replace(FAMILIES[name], context=64 if name == "siglip" else 77)  # as they are released
            tokenizer = train_tokenizer(family, class_names(2000))
            random_model(family, tokenizer, width=256, layers=(4, 2)).save_pretrained(Path(folder, name))
            tokenizer.save_pretrained(Path(folder, name))
        yield [str(Path(folder, name)) for name in families]


def run(case: Row, time_limit: float, same_process: bool = False) -> Row:
    """`measure` in a separate process, or in this one; whatever happens to it is the row's status."""
    if same_process:
        try:
            return measure(**{name: value for name, value in case.items() if name != "memory_limit"})
        except Exception as error:
            return {"status": failure(f"{type(error).__name__}: {error}")}
        finally:
            gc.collect()
            torch.cuda.empty_cache()
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=time_limit)
    except subprocess.TimeoutExpired:
        return {"status": "out of time"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"status": "out of memory" if done.returncode == -9 else failure(last)}  # -9: killed by the system


def failure(words: str) -> str:
    """The status of a case that ends with these words."""
    # Memory refused in the words of Python, torch on a GPU, torch on a CPU or C++.
    refusals = ("MemoryError", "OutOfMemoryError", "allocate memory", "bad_alloc")
    return "out of memory" if any(each in words for each in refusals) else f"failed: {words}"


if __name__ == "__main__":
    main()
