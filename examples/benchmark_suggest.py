"""Measures whether labelling what `hf-tgpt suggest` chooses is better than labelling pictures at random.

    python examples/benchmark_suggest.py pictures
    python examples/benchmark_suggest.py pictures other-pictures --model path/to/clip --start 2 --plot labels.png

All pictures but those of the test split are the pool. Of it, --start pictures of each class have a label at first, the
same for both ways to choose; with 0 nothing has, and zero-shot classification chooses the first. In each round --count
pictures get their right label, and GDA is fitted again, to the classes that have a label, and calibrated by
cross-validation; test pictures of other classes count as wrong. With --imbalance 10, the pool has 10 times as many
pictures of its largest class as of its smallest. Printed are the accuracy after some numbers of labels, the mean over
all rounds, and its lead over random, paired by seed: means and standard deviations over seeds.
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import hf_tgpt
from hf_tgpt.adapters.fitting import Features
from hf_tgpt.adapters.head_search import out_of_fold_logits
from hf_tgpt.cli.arguments import base_model_of
from hf_tgpt.cli.output import markdown_table, tidy_output
from hf_tgpt.data import DataWarning, ImageTransform, class_names, load_splits
from hf_tgpt.encoders import DualEncoder, encoder_of
from hf_tgpt.encoders.loading import load_image_processor
from hf_tgpt.evaluation.acquisition import SHARE, next_to_label
from hf_tgpt.evaluation.calibration import fit_temperature
from hf_tgpt.evaluation.plots import plot_curves
from hf_tgpt.inference.encoded import encode_splits
from hf_tgpt.methods.gda import GDA
from hf_tgpt.methods.zero_shot import zero_shot_beside
from hf_tgpt.training.config import TrainingConfig, steps_of

STEPS = steps_of(TrainingConfig())
SHOWN = 3  # numbers of labels in the table
# Features (n, d), logits (n, c) and a number k -> the rows (k,) to label.
Choose = Callable[[torch.Tensor, torch.Tensor, int, torch.Generator], torch.Tensor]


@dataclass
class Pictures:
    """Pool and test pictures of a data set, unit features (n, d) and labels (n,), and a base model that knows them."""

    encoder: DualEncoder
    names: list[str]
    pool: torch.Tensor
    pool_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", help="data sets with a test split, as --dataset in training")
    parser.add_argument("--model", help="a CLIP: a Hub id or folder (default: as in training)")
    parser.add_argument("--start", type=int, default=0, help="labels per class at first (default: %(default)s)")
    parser.add_argument("--count", type=int, default=10, help="labels per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--share", type=float, default=SHARE, help="of the pool, the more uncertain ones, to choose "
                        "from (default: %(default)s)")  # fmt: skip
    parser.add_argument("--imbalance", type=float, default=1.0, help="of the pool (default: as it is)")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--plot", help="a picture of all curves")
    parser.add_argument("--cache_dir", help="keep the features there for the next time")
    args = parser.parse_args(arguments)
    tidy_output()
    warnings.simplefilter("ignore")
    curves: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    rows = []
    for source in args.pictures:
        pictures = read(source, args)
        start = args.start * len(pictures.names)
        labels = [start + args.count * number for number in range(args.rounds + 1)]
        ways: dict[str, Choose] = {"random": at_random, "suggest": partial(by_model, share=args.share)}
        found = {
            way: torch.tensor([accuracies(pictures, choose, args, seed) for seed in range(args.seeds)]) * 100
            for way, choose in ways.items()
        }
        curves[source] = {way: list(zip(labels, values.mean(0).tolist(), spread(values).tolist(), strict=True))
                          for way, values in found.items()}  # fmt: skip
        lead = found["suggest"][:, 1:].mean(1) - found["random"][:, 1:].mean(1)
        for way, values in found.items():
            places = [round(args.rounds * (number + 1) / SHOWN) for number in range(SHOWN)]
            cells = [f"{labels[place]}: {cell(values[:, place])}" for place in places]
            rows.append([source, way, *cells, cell(values[:, 1:].mean(1)), cell(lead) if way == "suggest" else ""])
    print("\n".join(markdown_table(["pictures", "chosen", *["labels: accuracy"] * SHOWN, "mean", "lead"], rows)))
    if args.plot:
        plot_curves(args.plot, curves, "labels", "accuracy in percent")


def spread(values: torch.Tensor) -> torch.Tensor:
    """The standard deviation over the first dimension, 0 of one value."""
    return values.std(0) if len(values) > 1 else torch.zeros_like(values[0])


def cell(values: torch.Tensor) -> str:
    return f"{float(values.mean()):.1f}±{float(spread(values)):.1f}"


def read(source: str, args: argparse.Namespace) -> Pictures:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        splits = load_splits(source)
    clip = hf_tgpt.load_clip(base_model_of(args.model, source) or str(hf_tgpt.TOY_CLIP)).requires_grad_(False).eval()
    transform = ImageTransform.from_processor(load_image_processor(clip.name_or_path), train=False)
    encoded = encode_splits(splits, zero_shot_beside(clip, ["photo"]), transform, args.cache_dir)
    labels = torch.from_numpy(encoded.labels[encoded.readable])
    tested = torch.tensor([encoded.splits[row] == "test" for row in encoded.readable])
    features = encoded.features
    names = class_names(splits["test"])
    return Pictures(encoder_of(clip), names, features[~tested], labels[~tested], features[tested], labels[tested])


def at_random(features: torch.Tensor, logits: torch.Tensor, count: int, chance: torch.Generator) -> torch.Tensor:
    return torch.randperm(len(features), generator=chance)[:count]


def by_model(
    features: torch.Tensor, logits: torch.Tensor, count: int, chance: torch.Generator, share: float
) -> torch.Tensor:
    seed = int(torch.randint(2**31, (1,), generator=chance))
    return torch.tensor(next_to_label(features, logits.softmax(-1), count, share=share, seed=seed), dtype=torch.long)


def accuracies(pictures: Pictures, choose: Choose, args: argparse.Namespace, seed: int) -> list[float]:
    """The accuracy on the test pictures before the first round and after each."""
    chance = torch.Generator().manual_seed(seed)
    pool, labelled = drawn(pictures, args.start, args.imbalance, chance)
    found = []
    for number in range(args.rounds + 1):
        classify = fitted(pictures, labelled)
        found.append(float((classify(pictures.test).argmax(-1) == pictures.test_labels).double().mean()))
        free = pool[~torch.isin(pool, labelled)]
        if number < args.rounds:
            chosen = choose(pictures.pool[free], classify(pictures.pool[free]), args.count, chance)
            labelled = torch.cat([labelled, free[chosen]])
    return found


def drawn(
    pictures: Pictures, start: int, imbalance: float, chance: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the pool, and of those that have a label at first."""
    classes = len(pictures.names)
    pool, labelled = [], []
    for rank, label in enumerate(torch.randperm(classes, generator=chance).tolist()):
        rows = (pictures.pool_labels == label).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=chance)]
        rows = rows[: max(start + 1, round(len(rows) * imbalance ** -(rank / max(1, classes - 1))))]
        pool.append(rows)
        labelled.append(rows[:start])
    return torch.cat(pool), torch.cat(labelled)


def fitted(pictures: Pictures, rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Calibrated logits (n, c) of features (n, d), by these labelled pictures; without any those of zero-shot."""
    classes = pictures.pool_labels[rows].unique() if len(rows) else torch.arange(len(pictures.names))
    encoder = pictures.encoder
    head = GDA(hf_tgpt.GDAConfig(class_names=[pictures.names[label] for label in classes.tolist()]), encoder)
    temperature = 1.0
    if len(rows):
        labels = torch.searchsorted(classes, pictures.pool_labels[rows])
        data = Features(pictures.pool[rows][None], labels)
        head.fit(encoder, data, None, STEPS)
        if int(labels.bincount().max()) > 1:
            temperature = fit_temperature(*out_of_fold_logits(head, encoder, data, data.states[0], STEPS))
    else:
        head.config.alpha = 0.0

    @torch.no_grad()
    def classify(features: torch.Tensor) -> torch.Tensor:
        known = head.classify(encoder, features, head.texts(encoder)).double() / temperature
        logits = torch.full((len(features), len(pictures.names)), -torch.inf, dtype=torch.float64)
        logits[:, classes] = known
        return logits

    return classify


if __name__ == "__main__":
    main()
