"""Compares answers in half precision with those in float32, and their time, of trained adapters on real pictures.

    python examples/benchmark_precision.py runs/gda runs/maple --dataset pictures

A row for each adapter and precision: the share of pictures with the same label, the largest difference of a score, the
accuracy of both, and the time on this device beside float32's, of the model alone on ready pixel values, in turns. The
last line gives the choice of `--dtype auto` on this device.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hf_tgpt import load_classifier
from hf_tgpt.cli.output import markdown_table, tidy_output
from hf_tgpt.data import FewShotImages, load_splits
from hf_tgpt.encoders.precision import PRECISIONS, read_dtype

HEADER = ["adapter", "dtype", "same labels", "largest difference", "accuracy", "in float32", "time / float32"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", help="folders of runs, or ids on the Hub")
    parser.add_argument("--dataset", required=True, help="labelled pictures, as in training; their test split")
    parser.add_argument("--count", type=int, default=500, help="pictures (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="pictures at a time (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=[*PRECISIONS][1:])
    args = parser.parse_args()
    tidy_output()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    test = load_splits(args.dataset)["test"]
    test = test.shuffle(seed=0).select(range(min(args.count, len(test))))
    lines = []
    for adapter in args.adapters:
        models = {name: load_classifier(adapter, device, dtype=name) for name in ["fp32", *args.dtypes]}
        images = FewShotImages(test, models["fp32"].transform)
        pixels = torch.stack([images[i]["pixel_values"] for i in range(len(images))])  # (n, 3, h, w)
        labels = torch.tensor([images[i]["labels"] for i in range(len(images))])
        asked = {name: classifier.among(test.features["label"].names) for name, classifier in models.items()}
        scores, seconds = answer(asked, pixels.split(args.batch), device)
        full = scores["fp32"]
        for name in args.dtypes:
            same = (scores[name].argmax(-1) == full.argmax(-1)).float().mean().item()
            hits = [(each.argmax(-1) == labels).float().mean().item() for each in (scores[name], full)]
            ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["fp32"], strict=True))
            apart = (scores[name] - full).abs().max().item()
            lines.append([Path(adapter).name, name, f"{same:.3f}", f"{apart:.3f}", *(f"{hit:.3f}" for hit in hits),
                          f"{ratio:.2f}"])  # fmt: skip
    print("\n".join(markdown_table(HEADER, lines)))
    print(f"\n--dtype auto is {str(read_dtype('auto', device)).removeprefix('torch.')} on this device.")


@torch.inference_mode()
def answer(
    asked: dict[str, Callable], batches: tuple[torch.Tensor, ...], device: str
) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """The scores (n, c) and the seconds of each batch by each model; the first batch warms up and is not timed."""
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in asked}
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    for classify in asked.values():
        classify(batches[0].to(device))
    for batch in batches:
        for name, classify in asked.items():
            start = time.perf_counter()
            scores[name].append(classify(batch.to(device)).logits.float().softmax(-1).cpu())
            seconds[name].append(time.perf_counter() - start)
    return {name: torch.cat(parts) for name, parts in scores.items()}, seconds


if __name__ == "__main__":
    main()
