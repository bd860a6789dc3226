"""Damaged files of every kind that is read here: a clear error that names the file, in time and without eating memory.

HF_TGPT_FUZZ sets how many damaged files each reader gets, 50 by default; those that build a data set or a model for
each get a tenth. tests/FAULTS.md has the figures of 10,000.
"""

import copy
import csv
import io
import json
import os
import re
import resource
import signal
import sys
import tarfile
import warnings
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import METHODS, make_classifier, make_clip
from hub.test_old_formats import write_probe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from PIL import Image
from releases import write_release
from safetensors.torch import save_file
from transformers import CLIPModel

from hf_tgpt import load_adapter, load_trained
from hf_tgpt.cli.arguments import parse_arguments
from hf_tgpt.cli.info import describe_adapter
from hf_tgpt.data import FewShotImages, ImageTransform, attach_captions, decode_image, load_splits
from hf_tgpt.data.class_lists import read_class_names
from hf_tgpt.data.readers.coop import load_coop_split, select_draw
from hf_tgpt.data.readers.folders import image_index
from hf_tgpt.evaluation.published_results import FIELDS, read_published
from hf_tgpt.hub.convert import read_checkpoint
from hf_tgpt.hub.run import results_of
from hf_tgpt.training.checkpoint import adapter_checkpoints, load_checkpoint, save_checkpoint, trained_weights
from hf_tgpt.training.features import cache_features
from hf_tgpt.training.run_folder import prepare_output_dir

INPUTS = int(os.environ.get("HF_TGPT_FUZZ", "50"))
SECONDS, GIGABYTES = 10, 2
CLASSES = ["cat", "dog"]
FIELD = re.compile(r"`\w+(\[\d+\])?`|--\w+")  # a message names the file, or the field in it


# Damage --------------------------------------------------------------------------------------------------------------

DEEP = 100_000
MARKS = [
    b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3(", b"\r", b"\n\n", b'"', b"\t", b",", b"{", "\u2028".encode(),
    bytes(99), b"9" * 5000, b"1e999", b"NaN", b"[" * DEEP, b'{"a":' * DEEP, b'"\\ud800"', b"../" * 9, b"\xff" * 8,
]  # fmt: skip
NUMBERS = [0, 1, -1, 7, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308, float("nan"), float("inf")]
WORDS = ["", " ", "a", "\0", "\ud800", "a" * 10_000, "../../etc/passwd", "/", "~", "猫", "🐈‍⬛", "قطة", "\u202e"]


def odd_value(chance, depth=0):
    """A JSON value of any shape."""
    kind = chance.randrange(5 if depth < 3 else 3)
    if kind < 3:
        return chance.choice([[None, True, False], NUMBERS, WORDS][kind])
    inner = [odd_value(chance, depth + 1) for _ in range(chance.randrange(3))]
    return inner if kind == 3 else {chance.choice(WORDS): value for value in inner}


def odd_json(chance, value):
    """`value` with something in it removed, renamed, repeated or replaced by a value of any kind."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.15:
        return odd_value(chance)
    changed = value.copy()
    key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
    what = chance.choice(["change", "change", "change", "remove", "add"])
    if what == "change":
        changed[key] = odd_json(chance, value[key])
    elif what == "remove":
        del changed[key]
    elif isinstance(value, dict):
        changed[chance.choice(WORDS)] = odd_value(chance)
    else:
        changed.insert(key, chance.choice(value))
    return changed


def odd_bytes(chance, data):
    """`data` with bits turned over, parts cut off, taken out, repeated or put in."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        # Heads of files say the most, so half of the damage is there.
        at = chance.randint(0, chance.choice([min(len(data), 64), len(data)]))
        what = chance.choice(["flip", "cut", "remove", "insert", "mark", "splice", "newlines"])
        if what == "flip" and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif what == "cut":
            del data[at:]
        elif what == "remove":
            del data[at : at + chance.randint(1, 16)]
        elif what == "insert":
            data[at:at] = chance.randbytes(chance.randint(1, 16))
        elif what == "mark":
            data[at:at] = chance.choice(MARKS)
        elif what == "splice":
            start = chance.randint(0, len(data))
            data[at : at + chance.randint(0, 64)] = data[start : start + 64]
        elif what == "newlines":
            data = data.replace(b"\n", b"\r\n")
    return bytes(data)


def odd_safetensors(chance, data):
    """A header of another content, or one that claims to have another length."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(odd_json(chance, json.loads(data[8 : 8 + length]))).encode()
    claimed = chance.choice([len(header)] * 6 + [0, len(header) + 1, 10**8, 2**40, 2**63])
    return claimed.to_bytes(8, "little") + header + data[8 + length :]


def damage(chance, suffix, data):
    """Another content of a file: half of the time damaged as what it is, half as bytes."""
    if chance.random() < 0.5:
        return odd_bytes(chance, data)
    if suffix == ".json":
        return json.dumps(odd_json(chance, json.loads(data))).encode()
    if suffix == ".jsonl":
        lines = odd_json(chance, [json.loads(line) for line in data.splitlines()])
        return "\n".join(map(json.dumps, lines if isinstance(lines, list) else [lines])).encode()
    return odd_safetensors(chance, data) if suffix == ".safetensors" else odd_bytes(chance, data)


# Readers -------------------------------------------------------------------------------------------------------------


def pictures(root):
    """cat/0.png to dog/5.png."""
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for shade in range(6):
            Image.new("RGB", (32, 32), (40 * shade, 9, 90 * label)).save(root / name / f"{shade}.png")
    return root


def split_file(folder):
    rows = {"train": range(3), "val": range(3, 4), "test": range(4, 6)}
    content = {
        split: [[f"{name}/{i}.png", label, name] for label, name in enumerate(CLASSES) for i in part]
        for split, part in rows.items()
    }
    file = folder / "split_zhou_pets.json"
    file.write_text(json.dumps(content))
    return file, lambda: load_coop_split(file, folder / "pictures")


def few_shot_draw(folder):
    file, read = split_file(folder)
    splits = datasets.DatasetDict({{"val": "validation"}.get(name, name): data for name, data in read().items()})
    entries = [{"impath": f"cat/{i}.png", "label": 0, "classname": "cat"} for i in range(4)]
    file = folder / "shot_3.json"
    file.write_text(json.dumps({"train": {"data": entries[:3]}, "val": {"data": entries[3:]}}))
    return file, lambda: select_draw(file, splits)


def table(suffix):
    def make(folder):
        file = folder / f"all{suffix}"
        rows = [
            {"image": f"pictures/{name}/{i}.png", "label": name, "caption": f"a {name}, {i}"}
            for name in CLASSES
            for i in range(6)
        ]
        if suffix == ".jsonl":
            file.write_text("\n".join(map(json.dumps, rows)))
        elif suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(file)
        elif suffix == ".tar":
            (folder / "classnames.txt").write_text("\n".join(CLASSES))
            with tarfile.open(file, "w") as archive:
                for i, row in enumerate(rows):
                    parts = {"png": (folder / row["image"]).read_bytes(), "cls": b"%d" % CLASSES.index(row["label"])}
                    for kind, data in parts.items():
                        member = tarfile.TarInfo(f"{i}.{kind}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
        else:
            with file.open("w", newline="") as stream:
                lines = csv.DictWriter(stream, rows[0], delimiter="\t" if suffix == ".tsv" else ",")
                lines.writeheader()
                lines.writerows(rows)
        return file, lambda: load_splits(file)

    return make


def descriptions(suffix):
    def make(folder):
        file = folder / f"descriptions{suffix}"
        names = [f"{name}/{i}.png" for name in CLASSES for i in range(3)]
        if suffix == ".json":
            file.write_text(json.dumps({name: [f"a {name}", f"the {name}s"] for name in CLASSES}))
        elif suffix == ".jsonl":
            file.write_text(
                "\n".join(json.dumps({"file_name": name, "caption": "seen", "class": "x"}) for name in names)
            )
        else:
            file.write_text("\n".join(f"{name}\ta {name[:3]} sits there\t{name[:3]}" for name in names))
        data = load_coop_split(split_file(folder)[0], folder / "pictures")["train"]
        return file, lambda: attach_captions(data, file)

    return make


def class_names(suffix):
    def make(folder):
        file = folder / f"names{suffix}"
        file.write_text(
            json.dumps({"n1": "cat", "n2": "dog"}) if suffix == ".json" else "# of mine\nn1\tcat\nn2\tdog\n"
        )
        return file, lambda: read_class_names(file)

    return make


def recipe(folder):
    file = folder / "recipe.json"
    file.write_text(json.dumps({"method": "maple", "note": "mine", "prompt_depth": 3, "learning_rate": 0.1}))

    def read():
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                return parse_arguments(["--config", str(file)])
        except SystemExit as stop:
            raise ValueError(said.getvalue()) from stop

    return file, read


def published(folder):
    file = folder / "published.csv"
    file.write_text(
        ",".join(FIELDS) + "\nmaple,imagenet,dtd,all,16,46.5,paper\n" + 'coop,dtd,dtd,base,16,80.1,"a, b"\n'
    )
    return file, lambda: read_published(file)


def adapter(part, read=None):
    def make(folder):
        clip = CLIPModel.from_pretrained(make_clip("plain", folder / "clip"))
        get_peft_model(clip, METHODS["maple"].config(class_names=CLASSES)).save_pretrained(folder / "adapter")
        clip = CLIPModel.from_pretrained(folder / "clip")
        (folder / "adapter" / "results.json").write_text(json.dumps({"method": "maple", "accuracy": 0.5}))

        def load():
            try:
                load_adapter(clip, folder / "adapter").unload()
            finally:
                assert type(clip) is CLIPModel  # as it was, whatever came of it

        return folder / "adapter" / part, (lambda: read(folder / "adapter")) if read else load

    return make


def lora(part):
    def make(folder):
        clip = CLIPModel.from_pretrained(make_clip("plain", folder / "clip"))
        make_classifier("lora", copy.deepcopy(clip), CLASSES).save_pretrained(folder / "lora")
        return folder / "lora" / part, lambda: load_trained(copy.deepcopy(clip), folder / "lora")

    return make


def old_probe(part):
    def make(folder):
        clip = CLIPModel.from_pretrained(make_clip("plain", folder / "clip"))
        write_probe(folder / "probe", clip)
        return folder / "probe" / part, lambda: load_trained(copy.deepcopy(clip), folder / "probe")

    return make


def run_note(folder):
    accelerator, run = Accelerator(cpu=True), folder / "run"
    fields = {"shots": 16, "method": "maple", "templates": ["{}"]}
    prepare_output_dir(run, fields, False, accelerator)
    return run / "run.json", lambda: prepare_output_dir(run, fields, True, accelerator)


def checkpoint(part):
    def make(folder):
        accelerator = Accelerator(cpu=True)
        clip = CLIPModel.from_pretrained(make_clip("plain", folder / "clip"))
        model = get_peft_model(clip, METHODS["coop"].config(class_names=CLASSES))
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(weights)
        weights[0].sum().backward()
        optimizer.step()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        accelerator.free_memory()
        accelerator.prepare(model, optimizer)

        def load():
            with adapter_checkpoints(accelerator, trained_weights(model), schedule=schedule):
                load_checkpoint(accelerator, folder)

        with adapter_checkpoints(accelerator, trained_weights(model), schedule=schedule):
            save_checkpoint(accelerator, folder, 1)
        return folder / "checkpoint-1" / part, load

    return make


def release(suffix):
    def make(folder):
        file = folder / "model.safetensors"
        if suffix == ".safetensors":
            save_file({"ctx": torch.zeros(2, 8)}, file)
        elif suffix == ".zip":
            file = write_release(folder / "model.pth.tar-5", {"ctx": torch.zeros(2, 8)})
        else:
            file = folder / "model.pth.tar-5"
            torch.save({"state_dict": {"ctx": torch.zeros(2, 8)}}, file, _use_new_zipfile_serialization=False)
        return file, lambda: read_checkpoint(file)

    return make


def features(folder):
    clip = CLIPModel.from_pretrained(make_clip("plain", folder / "clip"))
    model = get_peft_model(clip, METHODS["coop"].config(class_names=CLASSES))
    data = load_coop_split(split_file(folder)[0], folder / "pictures")["val"]
    images = FewShotImages(data, ImageTransform(32, (0.5,) * 3, (0.5,) * 3, train=True))
    read = lambda: cache_features(model, images, 1, folder / "features")[0]  # noqa: E731
    read()
    return next((folder / "features").iterdir()), read


def folder_index(folder):
    image_index(folder / "pictures")
    note = next((Path(datasets.config.HF_DATASETS_CACHE) / "hf_tgpt").glob("*.json"))
    return note, lambda: image_index(folder / "pictures")


def picture(format, **options):
    def make(folder):
        file = folder / f"picture.{format}"
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8))
        if format == "gif":
            options.update(save_all=True, append_images=[noise.rotate(90)])
        noise.save(file, **options)
        return file, lambda: decode_image(file)

    return make


READERS = {
    "split file": split_file,
    "few-shot draw": few_shot_draw,
    **{f"table {suffix}": table(suffix) for suffix in (".csv", ".tsv", ".jsonl", ".parquet", ".tar")},
    **{f"descriptions {suffix}": descriptions(suffix) for suffix in (".txt", ".jsonl", ".json")},
    **{f"class names {suffix}": class_names(suffix) for suffix in (".txt", ".json")},
    "recipe": recipe,
    "published.csv": published,
    "adapter config": adapter("adapter_config.json"),
    "adapter weights": adapter("adapter_model.safetensors"),
    "adapter info, config": adapter("adapter_config.json", describe_adapter),
    "adapter info, results.json": adapter("results.json", describe_adapter),
    "results.json": adapter("results.json", results_of),
    "note of a probe": old_probe("reference.json"),
    "weights of a probe": old_probe("linear_probe.safetensors"),
    "note of LoRA": lora("reference.json"),
    "config of LoRA": lora("adapter_config.json"),
    "weights of LoRA": lora("adapter_model.safetensors"),
    "run.json": run_note,
    **{
        f"checkpoint's {part}": checkpoint(part)
        for part in ("adapter.safetensors", "states.json", "optimizer.bin", "random_states_0.pkl")
    },
    **{f"release {suffix}": release(suffix) for suffix in (".zip", ".legacy", ".safetensors")},
    "cached features": features,
    "folder index's note": folder_index,
    **{f"picture {format}": picture(format) for format in ("png", "jpg", "gif", "webp", "bmp", "tiff")},
}

SLOW = [name for name in READERS if name.startswith("table") or "LoRA" in name or "probe" in name] + ["cached features"]


class Hang(BaseException):
    """No Exception, so that nobody takes it for a damaged file."""


@contextmanager
def limits():
    """Within, an input may take SECONDS, and the process so many GIGABYTES more than it has."""

    def stop(*args):
        raise Hang(f"more than {SECONDS} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + GIGABYTES * 2**30, before[1]))
    handler = signal.signal(signal.SIGALRM, stop)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # pandas leaves open what it cannot parse
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_named(name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    pictures(tmp_path / "pictures")
    file, read = READERS[name](tmp_path)
    read()  # what is whole is read
    whole = file.read_bytes()
    count = {"read": 0, "refused": 0}

    def names_what(message):
        # A table that can be read is judged by its rows, in terms of columns and classes.
        return name.startswith("table") or file.name in message or file.parent.name in message or FIELD.search(message)

    @settings(
        max_examples=INPUTS // 10 if name in SLOW else INPUTS,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=True))
    def check(chance):
        content = damage(chance, file.suffix, whole)
        file.write_bytes(content)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        refusal = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read()
            count["read"] += 1
        except (ValueError, OSError) as error:
            refusal = error
            count["refused"] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        # A UnicodeDecodeError or JSONDecodeError is somebody else's ValueError and does not say where.
        if refusal is not None and type(refusal) is not ValueError and not isinstance(refusal, OSError):
            raise AssertionError(f"not a documented error, {refusal!r}, of {content[:3000]}") from refusal
        if refusal is not None and not names_what(str(refusal)):
            raise AssertionError(f"names neither the file nor what in it: {refusal}, of {content[:3000]}")

    with limits():
        check()
    print(f"{name}: {count['read']} read, {count['refused']} refused")  # seen with pytest -s
