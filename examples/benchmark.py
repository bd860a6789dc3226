"""Measures time and memory of a step over methods, numbers of classes and batch sizes, each case in its own process.

    python examples/benchmark.py
    python examples/benchmark.py --model path/to/vit-b-16 --methods tgpt coop --classes 10 100 1000 --batch 8 --cached
    python examples/benchmark.py --families clip metaclip_2 siglip chinese_clip --methods maple --classes 20 40 80

Paths are measured side by side, on random pictures; by default the first three:

    ours       the adapter as usually called (with --cached also `ours, cached features`: training that begins at
               what `hf_tgpt.training.features` keeps, without the vision tower)
    reference  what the released research codes do: sentences padded to the whole context, all classes at once, nothing
               kept between steps; with the same weights it gives the same logits and losses (tests/test_benchmark.py)
    floor      what cannot be done without: the plain image forward, and forward and backward of the method's
               sentences at the length where the longest ends
    truncated  ours without packing and chunks: all sentences at once, each by itself, up to the longest end
    packed     ours without chunks: all sentences at once, what they have in common computed once
    checkpointing  the same with transformers' gradient checkpointing, layer by layer in both towers
    padded     the plain way on a model of any family, where reference and floor are CLIP's: ours with sentences padded
               to the whole context, all at once and each by itself; by default with --families, beside ours

A step is forward, backward and optimizer step (--mode train), or a forward that may reuse class features (--mode
infer); benchmark_loading.py measures how fast pictures come to it. Peak memory is what steps need above the loaded
model and adapter: on a GPU what torch allocates, on a CPU the resident size; the JSON file also has the peak of all
(`peak_bytes`: on a CPU the whole process with its libraries). Threads are torch's, so OMP_NUM_THREADS
sets them. A case that runs out of memory or time is a row that says so.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import itertools
import json
import os
import resource  # not on Windows
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_table import FLOOR, PADDED, REFERENCE, Row, add_ratios, draw, table
from plain_methods import PLAIN, floor
from transformers import AutoTokenizer, CLIPModel

import hf_tgpt
from hf_tgpt.adapters.config import PromptConfig
from hf_tgpt.cli.output import tidy_output
from hf_tgpt.data.toyworld.scenes import BACKGROUNDS, COLOURS, SHAPES, SURFACES
from hf_tgpt.encoders import FAMILIES, encoder_of
from hf_tgpt.evaluation.plots import PLOTS_REMEDY, can_plot
from hf_tgpt.training.results import peak_memory_bytes
from hf_tgpt.utils.files import write_json

OURS, CACHED = "ours", "ours, cached features"
TRUNCATED, PACKED, CHECKPOINTING = "truncated", "packed", "checkpointing"
TOO_MUCH = ("out of memory", "out of time")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(hf_tgpt.TOY_CLIP), help="a CLIP: a Hub id or folder; a folder with only "
                        "config and tokenizer starts at random (default: the package's toy CLIP)")  # fmt: skip
    parser.add_argument("--families", nargs="+", choices=FAMILIES, help="random models of these in place of --model: "
                        "a text tower of 4 layers, 256 wide, and a small image tower")  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=["tgpt", "maple"], choices=list(PLAIN))
    parser.add_argument("--classes", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--batch", nargs="+", type=int, default=[8], help="images of a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that is not; the median counts")
    parser.add_argument("--mode", default="train", choices=["train", "infer"])
    parser.add_argument("--paths", nargs="+", help=f"(default: {OURS} {REFERENCE} {FLOOR})",
                        choices=[OURS, REFERENCE, FLOOR, TRUNCATED, PACKED, CHECKPOINTING, PADDED])  # fmt: skip
    parser.add_argument("--cached", action="store_true", help="also measure ours with cached features, where it can be")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"], help="torch's autocast")
    parser.add_argument("--time_limit", type=float, default=600, help="seconds for a case, loading included")
    parser.add_argument(
        "--memory_limit",
        type=float,
        help="GiB for a case on a CPU, beside the program's own (default: 80%% of the machine's)",
    )
    parser.add_argument("--json", type=Path, default="benchmark.json", help="the rows; table and picture go beside it")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # a process of its own is asked for this case
    args = parser.parse_args(arguments)
    tidy_output()
    if args.case:
        case = json.loads(args.case)
        limit_memory(case.pop("memory_limit"))
        print(json.dumps(measure(**case)))
        return

    args.json.parent.mkdir(parents=True, exist_ok=True)

    rows: list[Row] = []
    paths = args.paths or ([OURS, PADDED] if args.families else [OURS, REFERENCE, FLOOR])
    paths = [*paths, *([CACHED] if args.cached else [])]
    common = {"mode": args.mode, "steps": args.steps, "mixed_precision": args.mixed_precision}
    common["memory_limit"] = args.memory_limit
    with random_models(args.families) if args.families else contextlib.nullcontext([args.model]) as models:
        for model, method, batch, path in itertools.product(models, args.methods, args.batch, paths):
            given_up = None
            for classes in sorted(args.classes):
                case = dict(method=method, classes=classes, batch=batch, path=path)
                result = given_up or run(case | common | {"model": model}, args.time_limit)
                if result["status"] in TOO_MUCH:
                    given_up = {"status": f"not tried: {result['status']} with {classes} classes"}
                if result["status"] != "no cache":
                    rows.append(case | {"model": model, "mode": args.mode} | result)
                    write_json(args.json, rows)  # so that an interrupted run leaves what it has
                    print(*case.values(), result["status"], sep=", ", file=sys.stderr)
    add_ratios(rows)
    write_json(args.json, rows)
    text = table(rows)
    args.json.with_suffix(".md").write_text(text)
    if can_plot():
        draw(rows, args.json.with_suffix(".png"))
    else:
        print(f"There is no plot, since it needs matplotlib: {PLOTS_REMEDY}.", file=sys.stderr)
    print(text)


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


def run(case: Row, time_limit: float) -> Row:
    """`measure` in a separate process; whatever happens to it is the row's status."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=time_limit)
    except subprocess.TimeoutExpired:
        return {"status": "out of time"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    # Killed by the system, or refused in the words of Python, torch on a GPU, torch on a CPU or C++.
    refusals = ("MemoryError", "OutOfMemoryError", "allocate memory", "bad_alloc")
    if done.returncode == -9 or any(words in last for words in refusals):
        return {"status": "out of memory"}
    return {"status": f"failed: {last}"}


# One case ------------------------------------------------------------------------------------------------------------


def limit_memory(gibibytes: float | None) -> None:
    """Makes this process fail, instead of the machine, if a step on a CPU needs too much memory."""
    if not torch.cuda.is_available():
        machine = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
        room = int(gibibytes * 2**30 if gibibytes else 0.8 * machine)
        limit = host_memory("VmData") + room  # the limit counts what libraries have reserved and never touch
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def measure(
    model: Any, method: str, classes: int, batch: int, path: str, mode: str, steps: int, mixed_precision: str
) -> Row:
    """Seconds and bytes of a step, as a row; meant for a separate process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = class_names(classes)
    training = mode == "train"
    torch.manual_seed(0)
    clip = hf_tgpt.load_clip(model)
    model = default_config(method, names, clip).build(clip).to(device).train(training)
    inputs = make_batch(model, names, batch, training)
    learner = model.learner
    if path == CACHED:
        if not learner.vision_is_frozen:
            return {"status": "no cache"}
        with torch.no_grad():
            inputs["image_states"] = learner.image_states(encoder_of(clip), inputs.pop("pixel_values"))
    if path in (TRUNCATED, PACKED, CHECKPOINTING, PADDED):
        learner.config.text_chunk_size = classes * batch  # one chunk, also where each image has class texts of its own
    if path in (TRUNCATED, PADDED):
        learner.shared_length = lambda *args: 0
    if path == PADDED:
        texts, padding = learner.class_texts, AutoTokenizer.from_pretrained(clip.name_or_path).pad_token_id
        missing = clip.config.text_config.max_position_embeddings - texts.ids.shape[1]
        texts.ids = F.pad(texts.ids, (0, missing), value=padding)
    if path == CHECKPOINTING:
        clip.activation_checkpointing_enable()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-5)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision == "bf16")

    def step() -> None:
        with autocast, torch.set_grad_enabled(training):
            if path == FLOOR:
                floor(clip, learner, method, training, inputs["pixel_values"])
                return
            output: Any = PLAIN[method](clip, learner, **inputs) if path == REFERENCE else model(**inputs)
        if training:
            output["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

    before = start_of_memory(device)
    taken = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    seconds, peak = statistics.median(taken[1:]), peak_of_memory(device)
    return {
        "status": "ok",
        "seconds_per_step": seconds,
        "images_per_second": batch / seconds,
        "peak_bytes_above_model": max(0, peak - before),
        "peak_bytes": peak,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
    }


def default_config(method: str, names: list[str], clip: CLIPModel) -> PromptConfig:
    """The method's defaults, with prompts in no more layers than there are."""
    layers = min(clip.config.text_config.num_hidden_layers, clip.config.vision_config.num_hidden_layers)
    config = hf_tgpt.config_class(method)
    depths = [field for field in dataclasses.fields(config) if field.name.endswith("prompt_depth")]
    return config(class_names=names, **{field.name: min(field.default, layers) for field in depths})


def class_names(count: int) -> list[str]:
    """Names of two words, or three where there are more than a thousand; they need not mean anything.

    With full stop and EOS they have 4.3 tokens on average. ImageNet's have 4.2.
    """
    words = [*COLOURS, *SHAPES, *BACKGROUNDS, *SURFACES]
    names = []
    for i in range(count):
        turn, first = divmod(i, len(words))
        third, step = divmod(turn, len(words) - 1)
        names.append(" ".join([words[first], words[(first + 1 + step) % len(words)], *words[:third][-1:]]))
    return names


def make_batch(model: Any, names: list[str], count: int, training: bool) -> dict[str, torch.Tensor]:
    clip = model.get_base_model()
    size = clip.config.vision_config.image_size
    inputs = {"pixel_values": torch.randn(count, 3, size, size, device=clip.device)}
    if training:
        labels = torch.randint(len(names), (count,))
        inputs["labels"] = labels.to(clip.device)
        if model.uses_captions:
            tokenizer = AutoTokenizer.from_pretrained(clip.name_or_path)
            captions = [f"a photo of a large {names[label]} at the left, on a bright wall." for label in labels]
            padding = "max_length" if encoder_of(clip).fills_context else True
            options = dict(padding=padding, truncation=True, return_tensors="pt")
            options["max_length"] = clip.config.text_config.max_position_embeddings
            inputs["caption_ids"] = tokenizer(captions, **options).input_ids.to(clip.device)
    return inputs


def start_of_memory(device: torch.device) -> int:
    """Bytes in use now, above which the peak is counted."""
    warm = torch.randn(8, 8, device=device, requires_grad=True)  # loads what the first backward of a process loads
    (warm @ warm).sum().backward()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):  # glibc: memory that loading has freed goes back to the system
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):  # Linux: the peak of loading is forgotten
        Path("/proc/self/clear_refs").write_text("5")
    return host_memory("VmRSS")


def peak_of_memory(device: torch.device) -> int:
    return peak_memory_bytes() if device.type == "cuda" else host_memory("VmHWM")


def host_memory(field: str) -> int:
    """This process's bytes: resident now (VmRSS) or at most (VmHWM), reserved (VmData). Only Linux tells; elsewhere the
    most resident so far stands for all.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), peak_memory_bytes())


if __name__ == "__main__":
    main()
