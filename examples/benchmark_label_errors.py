"""Measures how many wrong labels `hf-tgpt check` finds: labels are swapped on purpose, and looked for.

    python examples/benchmark_label_errors.py pictures
    python examples/benchmark_label_errors.py pictures --model path/to/clip --share 0.1 --seeds 5

For each seed, a random share of all labels is changed to a random other class. It prints the shares of the swapped
labels among the first k and the first 2 k of the check's list, where k is the number of swapped labels; a random order
would find the shares k / n and 2 k / n. Labels that are wrong without being swapped count against it. The means and
standard deviations are over seeds.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch

import hf_tgpt
from hf_tgpt.adapters.fitting import Features
from hf_tgpt.cli.arguments import base_model_of
from hf_tgpt.cli.output import markdown_table, tidy_output
from hf_tgpt.data import ImageTransform, class_names, load_splits
from hf_tgpt.encoders import encoder_of
from hf_tgpt.encoders.loading import load_image_processor
from hf_tgpt.evaluation.label_errors import cross_validated, label_errors
from hf_tgpt.inference.encoded import encode_splits
from hf_tgpt.methods.gda import GDA
from hf_tgpt.methods.zero_shot import zero_shot_beside
from hf_tgpt.training.config import TrainingConfig, steps_of


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", help="data sets, as --dataset in training")
    parser.add_argument("--model", help="a CLIP: a Hub id or folder (default: as in training)")
    parser.add_argument("--share", type=float, default=0.05, help="of the labels to swap (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache_dir", help="keep the features there for the next time")
    args = parser.parse_args(arguments)
    tidy_output()
    rows = []
    for source in args.pictures:
        splits = load_splits(source, seed=None)
        clip = (
            hf_tgpt.load_clip(base_model_of(args.model, source) or str(hf_tgpt.TOY_CLIP)).requires_grad_(False).eval()
        )
        transform = ImageTransform.from_processor(load_image_processor(clip.name_or_path), train=False)
        encoded = encode_splits(splits, zero_shot_beside(clip, ["photo"]), transform, args.cache_dir)
        names, truth = class_names(next(iter(splits.values()))), encoded.labels[encoded.readable]
        found = np.array(
            [measure(clip, names, encoded.features, truth, args.share, seed) for seed in range(args.seeds)]
        )
        mean, std = 100 * found.mean(0), 100 * found.std(0)
        chance = 100 * swapped_count(len(truth), args.share) / len(truth)
        shares = [f"{mean[i]:.1f}±{std[i]:.1f} ({(i + 1) * chance:.1f})" for i in range(2)]
        rows.append([source, len(truth), len(names), f"{mean[2]:.1f}", *shares])
    header = ["pictures", "n", "classes", "agrees with labels", "found in first k (random)", "in first 2 k (random)"]
    print("\n".join(markdown_table(header, rows)))


def measure(
    clip: torch.nn.Module, names: list[str], features: torch.Tensor, truth: np.ndarray, share: float, seed: int
) -> list[float]:
    """The shares of swapped labels that are found in the first k and 2 k, and of labels that the head agrees with."""
    random = np.random.default_rng(seed)
    rows = random.permutation(len(truth))[: swapped_count(len(truth), share)]
    labels = truth.copy()
    labels[rows] = (truth[rows] + random.integers(1, len(names), len(rows))) % len(names)
    encoder = encoder_of(clip)
    head = GDA(hf_tgpt.GDAConfig(class_names=names), encoder)
    data = Features(features[None], torch.from_numpy(labels))
    logits = cross_validated(head, encoder, data, steps_of(TrainingConfig()))
    if logits is None:
        raise SystemExit("Every class has one picture, so no label can be judged; give more pictures.")
    order = [error.row for error in label_errors(logits, data.labels)]
    found = [len(set(rows.tolist()).intersection(order[: times * len(rows)])) / len(rows) for times in (1, 2)]
    return [*found, float((logits.argmax(-1) == data.labels).float().mean())]


def swapped_count(count: int, share: float) -> int:
    return max(1, round(share * count))


if __name__ == "__main__":
    main()
