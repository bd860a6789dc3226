"""One case of benchmark.py: seconds and bytes of a step, or the floor of its seconds, in a process of its own."""

import contextlib
import ctypes
import dataclasses
import gc
import os
import resource  # not on Windows
import runpy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_floor import floor, record
from benchmark_table import CACHED, CACHED_FLOOR, CHECKPOINTING, FLOOR, PACKED, PADDED, REFERENCE, TRUNCATED, Row
from transformers import AutoTokenizer, PreTrainedModel

import hf_tgpt
from hf_tgpt.adapters.config import PromptConfig
from hf_tgpt.data.toyworld.scenes import BACKGROUNDS, COLOURS, SHAPES, SURFACES
from hf_tgpt.encoders import encoder_of
from hf_tgpt.training.features import check_can_be_cached
from hf_tgpt.training.results import peak_memory_bytes

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
ABSENT = "there is no "  # begins the status of what is no case


def plain_methods() -> dict[str, Callable[..., Any]]:
    """The methods as they were released, which the tests hold beside ours.

    Raises FileNotFoundError, with the remedy, where there are no tests.
    """
    file = Path(__file__).parent.parent / "tests" / "plain_methods.py"
    if not file.is_file():
        raise FileNotFoundError(
            f"The path {REFERENCE!r} needs {file}, which only a checkout of hf-tgpt's repository has; run the program "
            "from one, or name other --paths."
        )
    return runpy.run_path(str(file))["PLAIN"]


def measure(
    model: str,
    method: str,
    classes: int,
    batch: int,
    path: str,
    mode: str = "train",
    steps: int = 1,
    mixed_precision: str = "no",
    words: int | None = None,
    prompt_depth: int | None = None,
    image_size: int | None = None,
    clock: str = "wall",
) -> Row:
    """Seconds and bytes of a step, as a row; meant for a separate process."""
    now = CLOCKS[clock]
    if clock == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other take the processor's time
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = class_names(classes, words)
    training = mode == "train"
    torch.manual_seed(0)
    clip = load(model, image_size)
    config = default_config(method, names, clip, prompt_depth)
    if config is None:
        return {"status": f"{ABSENT}prompt depth"}
    plain = plain_methods().get(method) if path == REFERENCE else None
    if path == REFERENCE and plain is None:
        return {"status": f"{ABSENT}reference"}
    adapted = config.build(clip).to(device).train(training)
    inputs = make_batch(adapted, names, batch, training)
    learner = adapted.learner
    if path in (CACHED, CACHED_FLOOR):
        try:
            check_can_be_cached(adapted)
        except ValueError:
            return {"status": f"{ABSENT}cache"}
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
    weights = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-5)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision == "bf16")

    def forward() -> torch.Tensor | None:
        with autocast, torch.set_grad_enabled(training):
            output: Any = plain(clip, learner, **inputs) if plain else adapted(**inputs)
        return output["loss"] if training else None

    def step() -> None:
        loss = forward()
        if loss is not None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if path in (FLOOR, CACHED_FLOOR):
        step()  # which keeps what is computed only once
        row = floor(record(forward), device, now, least=0.02 * steps)
        return {"status": "ok", "images_per_second": batch / row["seconds_per_step"], "device": name} | row
    before = start_of_memory(device)
    taken = []
    for _ in range(steps + 1):
        start = now()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(now() - start)
    seconds, peak = statistics.median(taken[1:] or taken), peak_of_memory(device)
    return {
        "status": "ok",
        "seconds_per_step": seconds,
        "images_per_second": batch / seconds,
        "peak_bytes_above_model": max(0, peak - before),
        "peak_bytes": peak,
        "device": name,
    }


def load(model: str, image_size: int | None = None) -> PreTrainedModel:
    """A CLIP; for pictures of another size one of the same config with random weights, which takes the same time."""
    clip = hf_tgpt.load_clip(model)
    if image_size and image_size != clip.config.vision_config.image_size:
        clip.config.vision_config.image_size = image_size
        name, clip = clip.name_or_path, type(clip)(clip.config)
        clip.name_or_path = name
    return clip


def default_config(
    method: str, names: list[str], clip: PreTrainedModel, prompt_depth: int | None = None
) -> PromptConfig | None:
    """The method's defaults, or this depth, with prompts in no more layers than there are; None if it has no depth."""
    layers = min(clip.config.text_config.num_hidden_layers, clip.config.vision_config.num_hidden_layers)
    config = hf_tgpt.config_class(method)
    depths = [field for field in dataclasses.fields(config) if field.name.endswith("prompt_depth")]
    if prompt_depth and not depths:
        return None
    return config(class_names=names, **{field.name: min(prompt_depth or field.default, layers) for field in depths})


def class_names(count: int, length: int | None = None) -> list[str]:
    """Names of two words, or three where there are more than a thousand, or of `length`; they need not mean anything.

    With full stop and EOS those of two have 4.3 tokens on average. ImageNet's have 4.2.
    """
    words = [*COLOURS, *SHAPES, *BACKGROUNDS, *SURFACES]
    names = []
    for i in range(count):
        turn, first = divmod(i, len(words))
        third, step = divmod(turn, len(words) - 1)
        more = (
            words[:third][-1:] if length in (None, 2) else [words[(third + j) % len(words)] for j in range(length - 2)]
        )
        names.append(" ".join([words[first], words[(first + 1 + step) % len(words)], *more]))
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


def limit_memory(gibibytes: float | None) -> None:
    """Makes this process fail, instead of the machine, if a step on a CPU needs too much memory."""
    if not torch.cuda.is_available():
        machine = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
        room = int(gibibytes * 2**30 if gibibytes else 0.8 * machine)
        limit = host_memory("VmData") + room  # the limit counts what libraries have reserved and never touch
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


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
