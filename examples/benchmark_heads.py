"""Measures the cost of fitting a head on frozen features, relative to the pass over the pictures that it needs.

    python examples/benchmark_heads.py
    python examples/benchmark_heads.py --methods gda --model path/to/clip --pictures 2000

Two measurements, each method in a process of its own:

    fit / pass   `hf_tgpt.fit` on random pictures of 224 pixels, beside one pass of the views through the image tower
                 alone, decoding and augmentation included; the least of --repeats, which take turns
    large        the fit alone, search of open values included, to random features of --large_pictures of
                 --large_classes, and the peak of the whole process

Without --model the tower has the size of ViT-B/32 and random weights. Threads are torch's: OMP_NUM_THREADS sets them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from peft import PeftModel, get_peft_model
from PIL import Image as PILImage
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

import hf_tgpt
from hf_tgpt.adapters import fitting
from hf_tgpt.cli.arguments import Arguments, parse_arguments
from hf_tgpt.cli.output import markdown_table, tidy_output
from hf_tgpt.data import FewShotImages, ImageTransform
from hf_tgpt.encoders import encoder_of
from hf_tgpt.encoders.loading import load_image_processor
from hf_tgpt.training.config import steps_of
from hf_tgpt.training.features import encode_pictures
from hf_tgpt.training.results import peak_memory_bytes

# By their recipes: those with a closed form, and those that train weights.
CLOSED = ["gda", "tip_adapter", "proker"]
TRAINED = ["tip_adapter_f", "zs_lp", "clap", "lp_plus_plus", "task_res", "clip_adapter"]
METHODS = {"tip_adapter_f": "tip_adapter"}
MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=CLOSED + TRAINED, choices=CLOSED + TRAINED)
    parser.add_argument("--model", help="a CLIP: a Hub id or folder (default: ViT-B/32's size at random)")
    parser.add_argument("--pictures", type=int, default=640)
    parser.add_argument("--classes", type=int, default=40)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large_pictures", type=int, default=10_000)
    parser.add_argument("--large_classes", type=int, default=1_000)
    parser.add_argument("--large_views", type=int, default=10)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # a process of its own is asked for this case
    args = parser.parse_args(arguments)
    tidy_output()
    if args.case:
        print(json.dumps(measure(args)))
        return
    rows = []
    for method in args.methods:
        row = [method]
        for case in ("small", "large"):
            given = sys.argv[1:] if arguments is None else arguments
            command = [sys.executable, __file__, *given, "--methods", method, "--case", case]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{method}, {case}: {done.stderr.strip().splitlines()[-1]}")
            row += json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(*row, sep=", ", file=sys.stderr)
    large = f"{args.large_pictures:,} x {args.large_classes:,}, {args.large_views} views"
    header = ["method", "pass s", "fit s", "fit / pass", f"{large}: fit s", "peak MiB"]
    print("\n".join(markdown_table(header, rows)))


def measure(args: argparse.Namespace) -> list[str]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        return {"small": beside_a_pass, "large": large}[args.case](args, args.methods[0], Path(folder))


def beside_a_pass(args: argparse.Namespace, method: str, folder: Path) -> list[str]:
    clip = load(args.model, folder)
    pictures = random_pictures(args.pictures, args.classes)
    processor = load_image_processor(clip.name_or_path)
    transform = ImageTransform.from_processor(processor, train=True, crop_scale=recipe_of(method).training.crop_scale)
    images = FewShotImages(pictures, transform)
    passes, fits = [], []
    for _ in range(args.repeats):
        model = adapted(clip, method, args.classes)
        start = time.perf_counter()
        encode_pictures(encoder_of(model.get_base_model()), model.learner, images, args.views)
        passes.append(time.perf_counter() - start)
        start = time.perf_counter()
        hf_tgpt.fit(model, pictures, views=args.views, training=recipe_of(method).training)
        fits.append(time.perf_counter() - start)
        clip = model.unload()
    return [f"{min(passes):.2f}", f"{min(fits):.2f}", f"{min(fits) / min(passes):.3f}"]


def large(args: argparse.Namespace, method: str, folder: Path) -> list[str]:
    model = adapted(load(None, folder, layers=1), method, args.large_classes)
    encoder, labels = encoder_of(model.get_base_model()), torch.arange(args.large_pictures) % args.large_classes
    centres = torch.randn(args.large_classes, encoder.shape()["projection_width"])
    states = torch.stack([centres[labels] + 2 * torch.randn(len(labels), centres.shape[1])
                          for _ in range(args.large_views)])  # fmt: skip
    start = time.perf_counter()
    model.learner.fit(encoder, fitting.Features(states, labels), None, steps_of(recipe_of(method).training))
    seconds = time.perf_counter() - start
    with torch.no_grad():
        model.learner.classify(encoder, states[0, :64], model.learner.texts(encoder))
    return [f"{seconds:.1f}", f"{peak_memory_bytes() / MIB:.0f}"]


def load(model: str | None, folder: Path, layers: int = 12) -> CLIPModel:
    if model is not None:
        return hf_tgpt.load_clip(model).eval()
    toy = CLIPConfig.from_pretrained(hf_tgpt.TOY_CLIP).text_config  # whose tokenizer there is
    words = {name: getattr(toy, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config={"num_hidden_layers": layers, **words}, vision_config={"num_hidden_layers": layers}
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(hf_tgpt.TOY_CLIP).save_pretrained(folder)
    processor = load_image_processor(str(hf_tgpt.TOY_CLIP))
    processor.size, processor.crop_size = {"shortest_edge": 224}, {"height": 224, "width": 224}
    processor.save_pretrained(folder)
    return hf_tgpt.load_clip(str(folder)).eval()


def adapted(clip: CLIPModel, name: str, classes: int) -> PeftModel:
    recipe = recipe_of(name)
    config = hf_tgpt.config_class(recipe.method)
    return get_peft_model(clip, config(class_names=[f"thing {i}" for i in range(classes)], **recipe.method_config))


def recipe_of(name: str) -> Arguments:
    return parse_arguments(["--method", METHODS.get(name, name), "--config", f"{name}.json"])


def random_pictures(count: int, classes: int) -> Dataset:
    random = np.random.default_rng(0)
    columns = {
        "image": [PILImage.fromarray(random.integers(0, 256, (256, 256, 3), dtype=np.uint8)) for _ in range(count)],
        "label": [number % classes for number in range(count)],
    }
    names = ClassLabel(names=[f"thing {number}" for number in range(classes)])
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": names}))


if __name__ == "__main__":
    main()
