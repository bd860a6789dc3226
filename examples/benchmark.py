"""Measures time and memory of a step over methods, numbers of classes and batch sizes, each case in its own process.

    python examples/benchmark.py
    python examples/benchmark.py --model path/to/vit-b-16 --methods tgpt coop --classes 10 100 1000 --batch 8 --cached
    python examples/benchmark.py --families clip metaclip_2 siglip chinese_clip --methods maple --classes 20 40 80

Paths are measured side by side, on random pictures; by default the first three:

    ours       the adapter as everybody calls it (with --cached also `ours, cached features`: training that begins at
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
sets them. A case without memory or time is a row that says so.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

import hf_tgpt
from hf_tgpt.adapters.config import PromptConfig
from hf_tgpt.cli.output import markdown_table, tidy_output
from hf_tgpt.data.toyworld.scenes import BACKGROUNDS, COLOURS, SHAPES, SURFACES
from hf_tgpt.encoders import FAMILIES, encoder_of
from hf_tgpt.evaluation.plots import PLOTS_REMEDY, can_plot, new_figure
from hf_tgpt.training.results import peak_memory_bytes
from hf_tgpt.utils.files import write_json

OURS, CACHED, REFERENCE, FLOOR = "ours", "ours, cached features", "reference", "floor"
TRUNCATED, PACKED, CHECKPOINTING, PADDED = "truncated", "packed", "checkpointing", "padded"
TOO_MUCH = ("out of memory", "out of time")
Row = dict[str, Any]  # a case and what was measured of it
Answer = dict[str, Tensor | None]  # logits and loss


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
    compare(rows)
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
    """`measure` in a process of its own; whatever happens to that is the row's status."""
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
    """Lets this process fail, instead of the machine, when a step on a CPU needs too much."""
    if not torch.cuda.is_available():
        machine = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
        room = int(gibibytes * 2**30 if gibibytes else 0.8 * machine)
        limit = host_memory("VmData") + room  # the limit counts what libraries have reserved and never touch
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def measure(
    model: Any, method: str, classes: int, batch: int, path: str, mode: str, steps: int, mixed_precision: str
) -> Row:
    """Seconds and bytes of a step, as a row; meant for a process of its own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = class_names(classes)
    training = mode == "train"
    torch.manual_seed(0)
    clip = hf_tgpt.load_clip(model)
    model = get_peft_model(clip, default_config(method, names, clip)).to(device).train(training)
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
    size = model.config.vision_config.image_size
    inputs = {"pixel_values": torch.randn(count, 3, size, size, device=model.device)}
    if training:
        labels = torch.randint(len(names), (count,))
        inputs["labels"] = labels.to(model.device)
        if model.uses_captions:
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
            captions = [f"a photo of a large {names[label]} at the left, on a bright wall." for label in labels]
            padding = "max_length" if encoder_of(model.get_base_model()).fills_context else True
            options = dict(padding=padding, truncation=True, return_tensors="pt")
            options["max_length"] = model.config.text_config.max_position_embeddings
            inputs["caption_ids"] = tokenizer(captions, **options).input_ids.to(model.device)
    return inputs


def start_of_memory(device: torch.device) -> int:
    """Bytes that are in use now, from where the peak is counted."""
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


# Ratios, table and picture -------------------------------------------------------------------------------------------


def compare(rows: list[Row]) -> None:
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


# The plain reference path, and the floor ------------------------------------------------------------------------------
#
# The methods as the released research codes compute them, plainly on a CLIPModel's own modules, and the shortest way
# to read what a method is: sentences padded to the whole context, all classes at once, nothing shared, cut, chunked or
# kept. Mutual prompt learning has no released code; here it is what its file in hf_tgpt/methods says, in this manner.
#
# A reference takes a CLIP, an adapter's learner (for its weights), pixel_values (b, 3, h, w) and labels (b,). It gives
# a dict with logits (b, c) and loss. Letters as in hf_tgpt/encoders/base.py, and c classes, n prompt tokens.


def read(clip: CLIPModel, words: Tensor, eos: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
    """T: embeddings (s, t, d_t), EOS positions (s,), prompts of deeper layers, each (n, d_t) -> (s, d)."""
    text, length = clip.text_model, words.shape[1]
    hidden = words + text.embeddings.position_embedding.weight[:length]
    mask = torch.ones(length, length, dtype=torch.bool, device=words.device).tril()[None, None]
    for i, layer in enumerate(text.encoder.layers):
        if 0 < i <= len(deep):
            prompts = deep[i - 1].expand(len(hidden), -1, -1)
            hidden = torch.cat([hidden[:, :1], prompts, hidden[:, 1 + prompts.shape[1] :]], dim=1)
        hidden = layer(hidden, mask)
    hidden = text.final_layer_norm(hidden)
    return clip.text_projection(hidden[torch.arange(len(hidden), device=eos.device), eos])


def look(clip: CLIPModel, pixel_values: Tensor, prompts: Sequence[Tensor] = ()) -> Tensor:
    """The vision tower with prompts, each (n, d_v) or (b, n, d_v): (b, 3, h, w) -> (b, p + n, d_v)."""
    vision = clip.vision_model
    hidden = vision.embeddings(pixel_values)
    tokens = hidden.shape[1]
    for i, layer in enumerate(vision.encoder.layers):
        if i < len(prompts):
            hidden = torch.cat([hidden[:, :tokens], prompts[i].expand(len(hidden), -1, -1)], dim=1)
        hidden = layer(vision.pre_layrnorm(hidden) if i == 0 else hidden, None)
    return hidden


def pool(clip: CLIPModel, hidden: Tensor) -> Tensor:
    return clip.visual_projection(clip.vision_model.post_layernorm(hidden[:, 0]))


def unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)


def embed(clip: CLIPModel, ids: Tensor) -> Tensor:
    """Token embeddings, padded to the whole context: ids (s, t) -> (s, 77, d_t)."""
    missing = clip.config.text_config.max_position_embeddings - ids.shape[1]
    return clip.text_model.embeddings.token_embedding(F.pad(ids, (0, missing)))


def class_texts(clip: CLIPModel, learner: Any, prompts: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
    """Unit features of all classes, (c, d), with prompts (n, d_t) in place of each sentence's first words."""
    words = embed(clip, learner.class_texts.ids)
    prompts = prompts.expand(len(words), -1, -1)
    words = torch.cat([words[:, :1], prompts, words[:, 1 + prompts.shape[1] :]], dim=1)
    return unit(read(clip, words, learner.class_texts.ends, deep))


def answer(logits: Tensor, labels: Tensor | None, more: Tensor | float = 0) -> Answer:
    return {"logits": logits, "loss": None if labels is None else F.cross_entropy(logits, labels) + more}


def coop(clip: CLIPModel, learner: Any, pixel_values: Tensor, labels: Tensor | None = None) -> Answer:
    features = unit(pool(clip, look(clip, pixel_values)))
    return answer(clip.logit_scale.exp() * features @ class_texts(clip, learner, learner.text_prompts).T, labels)


def maple(clip: CLIPModel, learner: Any, pixel_values: Tensor, labels: Tensor | None = None) -> Answer:
    first, *deep = learner.text_prompts
    visual = [couple(prompts) for couple, prompts in zip(learner.couplings, learner.text_prompts, strict=True)]
    features = unit(pool(clip, look(clip, pixel_values, visual)))
    return answer(clip.logit_scale.exp() * features @ class_texts(clip, learner, first, deep).T, labels)


def ivlp(clip: CLIPModel, learner: Any, pixel_values: Tensor, labels: Tensor | None = None) -> Answer:
    first, *deep = learner.text_prompts
    features = unit(pool(clip, look(clip, pixel_values, learner.vision_prompts)))
    return answer(clip.logit_scale.exp() * features @ class_texts(clip, learner, first, deep).T, labels)


def cocoop(clip: CLIPModel, learner: Any, pixel_values: Tensor, labels: Tensor | None = None) -> Answer:
    features = unit(pool(clip, look(clip, pixel_values)))
    logits = []
    for image, shift in zip(features, learner.shift(features), strict=True):  # one image after the other, as released
        logits.append(clip.logit_scale.exp() * class_texts(clip, learner, learner.text_prompts + shift) @ image)
    return answer(torch.stack(logits), labels)


def mutual_prompt(clip: CLIPModel, learner: Any, pixel_values: Tensor, labels: Tensor | None = None) -> Answer:
    config = learner.config
    plain = unit(pool(clip, look(clip, pixel_values)))
    shifts = learner.decompose(plain).unflatten(-1, (config.prompt_length, -1))
    texts = torch.stack([class_texts(clip, learner, learner.text_prompts + shift) for shift in shifts])  # (b, c, d)
    cosines = torch.einsum("bd,bcd->bc", plain, texts)
    least = cosines.topk(min(config.top_k, cosines.shape[1])).values[:, -1:]
    relevant = (cosines >= least) & (cosines > 0)
    shares = (cosines / config.temperature).masked_fill(~relevant, torch.finfo(cosines.dtype).min).softmax(-1)
    description = torch.einsum("bc,bcd->bd", shares * relevant, texts)
    visual = learner.vision_prompts + learner.guide(description).unflatten(-1, learner.vision_prompts.shape)
    features = unit(pool(clip, look(clip, pixel_values, visual.unbind(1))))
    return answer(clip.logit_scale.exp() * torch.einsum("bd,bcd->bc", features, texts), labels)


def tgpt(
    clip: CLIPModel,
    learner: Any,
    pixel_values: Tensor,
    labels: Tensor | None = None,
    caption_ids: Tensor | None = None,
) -> Answer:
    hidden = look(clip, pixel_values)
    tokens = learner.image_to_text(clip.visual_projection(hidden))
    category = bond(learner.category_bonder, learner.category_queries, tokens)
    content = bond(learner.content_bonder, learner.content_queries, tokens)
    frame = embed(clip, learner.frame_ids)  # BOS, full stop, EOS and padding

    def sentence(prompts: Tensor) -> Tensor:
        before, after = (part.expand(len(prompts), -1, -1) for part in (frame[:, :1], frame[:, 1 : -prompts.shape[1]]))
        eos = torch.full((len(prompts),), prompts.shape[1] + 2, device=prompts.device)
        return read(clip, torch.cat([before, prompts, after], dim=1), eos)

    def sentence_loss(prompts: Tensor, ids: Tensor, eos: Tensor) -> Tensor:
        length = prompts.shape[1]
        ids = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) > eos[:, None], -100)[:, 1 : 1 + length]
        scores = prompts @ clip.text_model.embeddings.token_embedding.weight.T  # (b, n, v)
        targets = F.pad(ids, (0, length - ids.shape[1]), value=-100)
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), label_smoothing=learner.config.label_smoothing)

    features = unit(torch.cat([pool(clip, hidden), (sentence(category) + sentence(content)) / 2], dim=-1))
    logits = 100 * features @ learner.head.T
    if labels is None or caption_ids is None:
        return answer(logits, labels)
    end = caption_ids == learner.frame_ids[0, -1]
    more = sentence_loss(category, learner.category_ids[labels], learner.category_ends[labels])
    return answer(logits, labels, more + sentence_loss(content, caption_ids, end.int().argmax(-1)))


def bond(bonder: Any, queries: Tensor, tokens: Tensor) -> Tensor:
    """TGP-T's Bonder for each image by itself: queries (1, n, d), tokens (b, p, d) -> (b, n, d)."""
    queries = queries.expand(len(tokens), -1, -1)
    asked, keys, values = bonder.self_qkv(bonder.norm_self(queries)).unflatten(-1, (3, 8, -1)).permute(2, 0, 3, 1, 4)
    scale = asked.shape[-1] ** -0.5
    mixed = (asked @ keys.mT * scale).softmax(-1) @ values
    queries = queries + bonder.self_out(mixed.transpose(1, 2).flatten(2))
    keys = bonder.norm_image(tokens)
    mixed = (bonder.cross_query(bonder.norm_query(queries)) @ keys.mT * scale).softmax(-1) @ keys
    queries = queries + bonder.cross_out(mixed)
    return queries + bonder.mlp(bonder.norm_mlp(queries))


PLAIN: dict[str, Callable[..., Answer]] = {
    "coop": coop, "maple": maple, "ivlp": ivlp, "cocoop": cocoop, "mutual_prompt": mutual_prompt, "tgpt": tgpt
}  # fmt: skip


def floor(
    clip: CLIPModel,
    learner: Any,
    method: str,
    training: bool,
    pixel_values: Tensor,
    chunk: int = 256,
) -> None:
    """The plain image forward, then forward and, in training, backward of each of the method's sentences, once."""
    with torch.no_grad():
        look(clip, pixel_values)
    conditioned = method in ("cocoop", "mutual_prompt")
    for ids in sentences(clip, learner, len(pixel_values), conditioned, training, chunk):
        words = clip.text_model.embeddings.token_embedding(ids).detach().requires_grad_(training)
        features = read(clip, words, torch.full((len(ids),), ids.shape[1] - 1, device=ids.device))
        if training:
            features.sum().backward()


def sentences(
    clip: CLIPModel, learner: Any, images: int, conditioned: bool, training: bool, chunk: int
) -> Iterator[Tensor]:
    """Yields token ids (s, t) of all sentences that a step has to read, `chunk` at a time."""
    if hasattr(learner, "frame_ids"):  # TGP-T: two for each image; which tokens they have makes no difference
        for queries in (learner.category_queries, learner.content_queries):
            yield learner.frame_ids[:, :1].expand(images, queries.shape[1] + 3)
    elif conditioned:
        for _ in range(images):
            yield from learner.class_texts.ids.split(chunk)
    elif training:  # otherwise class features are kept between batches
        yield from learner.class_texts.ids.split(chunk)


if __name__ == "__main__":
    main()
