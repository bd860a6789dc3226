"""Measures whether calibrated answers reach their coverage, over random draws of training and held-out pictures.

    python examples/benchmark_coverage.py --datasets pictures other-pictures
    python examples/benchmark_coverage.py --datasets pictures --model path/to/clip --held_out 4 20 --coverage 0.9

For each seed, of all pictures of a data set --shots per class (at most half of them) are trained on, --held_out per
class calibrate, also choosing what the method leaves open, as in `hf-tgpt train`, and the rest are tested. Rows, as
mean and standard deviation over the seeds:

    coverage     share of tested pictures whose class is in the answer, and the classes per answer
    error        expected calibration error, before and after
    AUROC, FPR95 how well the largest logit tells tested pictures from all pictures of the other data sets

Methods are heads on frozen features, so that each picture is encoded once.
"""

import argparse
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model

import hf_tgpt
from hf_tgpt.adapters.fitting import Features
from hf_tgpt.cli.arguments import DEFAULT_MODEL
from hf_tgpt.cli.output import markdown_table, tidy_output
from hf_tgpt.data import DataWarning, FewShotImages, ImageTransform, class_names, load_splits
from hf_tgpt.encoders import encoder_of
from hf_tgpt.encoders.loading import load_image_processor
from hf_tgpt.evaluation.calibration import calibrate, familiarity, tell_apart
from hf_tgpt.evaluation.metrics import classification_metrics
from hf_tgpt.training.config import steps_of
from hf_tgpt.training.features import encode_pictures
from hf_tgpt.training.recipes import training_of


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", required=True, help="as in training")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a CLIP: a Hub id or folder (default: %(default)s)")
    parser.add_argument("--method", default="gda", help="a head on frozen features (default: %(default)s)")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--held_out", type=int, nargs="+", default=[4, 20])
    parser.add_argument("--coverage", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args(arguments)
    tidy_output()
    warnings.simplefilter("ignore", DataWarning)
    models: dict[str, PeftModel] = {}
    pictures: dict[str, Features] = {}
    for source in args.datasets:
        models[source], pictures[source] = encoded(args, source)
    header = ["pictures", "held out", "accuracy"]
    for share in args.coverage:
        header += [f"coverage {share}", "classes"]
    rows = []
    for source in args.datasets:
        for held_out in args.held_out:
            rows.append([source, str(held_out), *row(args, models[source], pictures, source, held_out)])
    print("\n".join(markdown_table([*header, "error before", "after", "AUROC", "FPR95"], rows)))


def encoded(args: argparse.Namespace, source: str) -> tuple[PeftModel, Features]:
    """A model that is not fitted yet, and the features of all pictures of a data set: (1, n, d)."""
    splits = load_splits(source, skip_damaged=True)
    clip = hf_tgpt.load_clip(args.model).eval()
    model = get_peft_model(clip, hf_tgpt.config_class(args.method)(class_names=class_names(splits["test"])))
    transform = ImageTransform.from_processor(load_image_processor(args.model), train=False)
    parts, labels = [], []
    for split in splits.values():
        images = FewShotImages(split, transform)
        parts.append(encode_pictures(encoder_of(clip), model.learner, images, 1))
        labels += split["label"][:]
    return model, Features(torch.cat(parts, dim=1), torch.tensor(labels))


def row(
    args: argparse.Namespace, model: PeftModel, pictures: dict[str, Features], source: str, count: int
) -> list[str]:
    """The cells of one data set with so many held-out pictures per class; dashes where too few are left to test."""
    measured = []
    for seed in range(args.seeds):
        if parts := drawn(pictures[source].labels, args.shots, count, seed):
            measured.append(measure(args, model, pictures, source, parts))
    width = 5 + 2 * len(args.coverage)
    if not measured:
        return ["-"] * width
    values = torch.tensor(measured, dtype=torch.float64)  # (seeds, cells)
    deviations = values.std(0) if len(values) > 1 else torch.zeros(width)
    cells = zip(values.mean(0).tolist(), deviations.tolist(), strict=True)
    return ["-" if mean != mean else f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in cells]


def drawn(labels: torch.Tensor, shots: int, held_out: int, seed: int) -> list[torch.Tensor]:
    """The rows to train on, to hold out and to test, drawn by class; none where a class has none left to test."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[torch.Tensor]] = [[], [], []]
    for label in labels.unique():
        rows = (labels == label).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        first = min(shots, len(rows) // 2)
        if first < 1 or len(rows) <= first + held_out:
            return []
        for part, chosen in zip(parts, (rows[:first], rows[first:][:held_out], rows[first + held_out :]), strict=True):
            part.append(chosen)
    return [torch.cat(part) for part in parts]


def measure(
    args: argparse.Namespace, model: PeftModel, pictures: dict[str, Features], source: str, parts: list[torch.Tensor]
) -> list[float]:
    """Accuracy, coverage and classes per answer for each wanted coverage, error before and after, AUROC and FPR95."""
    data, (train, held_out, test), learner = pictures[source], parts, model.learner
    encoder, names = encoder_of(model.get_base_model()), model.class_names
    start = hf_tgpt.config_class(args.method)(class_names=names)
    for field in learner.grid:
        setattr(learner.config, field, getattr(start, field))
    learner.fit(encoder, data.select(train), data.select(held_out), steps_of(training_of(args.method)))

    @torch.no_grad()
    def logits_of(states: torch.Tensor) -> Any:
        return learner.classify(encoder, states.float(), learner.texts(encoder)).double()

    tested, labels = logits_of(data.states[0, test]), data.labels[test]
    others = [logits_of(other.states[0]) for name, other in pictures.items() if name != source]
    trusted = calibrate(logits_of(data.states[0, held_out]), data.labels[held_out], names)
    cells = [float((tested.argmax(-1) == labels).double().mean())]
    for share in args.coverage:
        try:
            answers = trusted.answers(tested, names, share)
        except ValueError:  # so few pictures cannot tell it
            cells += [float("nan")] * 2
            continue
        cells += [float(answers.gather(1, labels[:, None]).double().mean()), float(answers.sum(-1).double().mean())]
    for logits in (tested, trusted.scaled(tested)):
        cells.append(classification_metrics(logits.numpy(), labels.numpy())["expected_calibration_error"])
    if not others:
        return [*cells, float("nan"), float("nan")]
    strangers = tell_apart(familiarity(tested), familiarity(torch.cat(others)))
    return [*cells, strangers["auroc"], strangers["fpr95"]]


if __name__ == "__main__":
    main()
