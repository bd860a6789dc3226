"""How near prediction from files comes to the image tower's own speed, and how many cores decoding needs for that.

    python examples/benchmark_predict.py pictures --adapter runs/my-run
    python examples/benchmark_predict.py pictures --model openai/clip-vit-base-patch16 --compile --drafts

Each round measures, one after another in alternating order, pictures a second of the model on ready pixel values, of
prediction from files, and of decoding and resizing alone, per second that one core works on it. The table has medians,
and the ratio that of the first two in one round. Decoding keeps up with the tower if so many cores are free for it.
`--threads 1` leaves the other cores free where the tower runs on the CPU itself.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import torch
from PIL import Image

import hf_tgpt
from hf_tgpt.cli.output import markdown_table, tidy_output
from hf_tgpt.cli.predict import find_files
from hf_tgpt.data.images import ImageTransform, decode_image
from hf_tgpt.encoders.loading import load_image_processor
from hf_tgpt.inference.classifier import Classifier
from hf_tgpt.methods.zero_shot import zero_shot_beside

HEADER = ["batch", "ready pixel values", "from files", "ratio", "decoding, one core", "cores for decoding"]
DRAFTS = [
    "smallest side",
    "pictures",
    "decoding time",
    "values of 255, mean",
    "largest",
    "scores, largest",
    "same labels",
]


def zero_shot(model: str, files: list[str], device: str) -> Classifier:
    """A base model with the names of the pictures' folders as classes, and one more."""
    transform = ImageTransform.from_processor(load_image_processor(model), train=False)
    clip = hf_tgpt.load_clip(model).to(device).eval()
    names = {Path(file).parent.name.replace("_", " ") for file in files} | {"something else"}
    return Classifier(zero_shot_beside(clip, sorted(names)), transform)


@torch.inference_mode()
def scores_of(classifier: Classifier, batches: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Scores (n, c) of ready pixel values, in batches (b, 3, s, s)."""
    classify = classifier.among(classifier.class_names)
    return torch.cat([classify(batch).logits.float() for batch in batches]).softmax(-1).cpu()


def decode(classifier: Classifier, files: list[str]) -> torch.Tensor:
    """Pixel values (n, 3, s, s)."""
    return torch.stack([classifier.pixel_values(file) for file in files])


def seconds_of(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """How long a call takes."""
    start = clock()
    call()
    return clock() - start


def speed(classifier: Classifier, files: list[str], batch: int, rounds: int) -> list[str]:
    """A line of the table."""
    device = next(classifier.model.parameters()).device
    batches = decode(classifier, files).to(device).split(batch)
    cases = {
        "ready": lambda: seconds_of(lambda: scores_of(classifier, batches)),
        "files": lambda: seconds_of(lambda: classifier(files, batch_size=batch)),
        # CPU time, so that a busy machine does not change how many cores decoding needs.
        "tower": lambda: (
            seconds_of(lambda: scores_of(classifier, batches), time.process_time) / torch.get_num_threads()
        ),
        "decoding": lambda: seconds_of(lambda: decode(classifier, files), time.thread_time),
    }
    scores_of(classifier, batches)
    classifier(files[:batch], batch_size=batch)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(cases[name]())
    rates = {name: len(files) / statistics.median(values) for name, values in seconds.items()}
    ratio = statistics.median(a / b for a, b in zip(seconds["ready"], seconds["files"], strict=True))
    tower = seconds["tower" if device.type == "cpu" else "ready"]
    cores = statistics.median(a / b for a, b in zip(seconds["decoding"], tower, strict=True))
    return [str(batch), f"{rates['ready']:.1f}", f"{rates['files']:.1f}", f"{ratio:.2f}", f"{rates['decoding']:.1f}",
            f"{cores:.2f}"]  # fmt: skip


def drafts(classifier: Classifier, files: list[str]) -> list[list[str]]:
    """What Pillow's reduced decoding of JPEG would change: lines for several smallest sizes of what it decodes to."""
    transform, device = classifier.transform, next(classifier.model.parameters()).device
    side, std = transform.shorter_side or transform.size, torch.tensor(transform.std)[:, None, None]
    lines = []
    for times in (2, 3, 4):
        pixels, taken = [], []
        for file in files:
            data, start = Path(file).read_bytes(), time.thread_time()
            full = transform(decode_image({"bytes": data, "path": file}))
            middle = time.thread_time()
            with Image.open(io.BytesIO(data)) as image:
                size = image.size
                image.draft(None, (times * side, times * side))
                if image.size == size:
                    continue  # no JPEG, or so small that it is decoded in full
                reduced = transform(decode_image(image))
            pixels.append((full, reduced))
            taken.append((time.thread_time() - middle) / (middle - start))
        if not pixels:
            lines.append([f"{times} x {side}", "0", *[""] * 5])
            continue
        both = [torch.stack(values) for values in zip(*pixels, strict=True)]
        apart = ((both[0] - both[1]) * std * 255).abs()
        full, reduced = (scores_of(classifier, values.to(device).split(32)) for values in both)
        same = (full.argmax(-1) == reduced.argmax(-1)).float().mean()
        lines.append([f"{times} x {side}", str(len(pixels)), f"{statistics.median(taken):.2f}", f"{apart.mean():.2f}",
                      f"{apart.max():.0f}", f"{(full - reduced).abs().max():.3f}", f"{same:.3f}"])  # fmt: skip
    return lines


def compiled(classifier: Classifier, files: list[str], batch: int, rounds: int) -> str:
    """What torch.compile gains and costs, on ready pixel values."""
    device = next(classifier.model.parameters()).device
    batches = decode(classifier, files).to(device).split(batch)
    plain = classifier.among(classifier.class_names)
    fast = torch.compile(plain)

    @torch.inference_mode()
    def run(classify: Callable) -> float:
        return seconds_of(lambda: [classify(values).logits.cpu() for values in batches])

    first = run(fast)
    ratios = []
    for number in range(rounds):
        times = {classify: run(classify) for classify in [plain, fast][:: 1 if number % 2 == 0 else -1]}
        ratios.append(times[plain] / times[fast])
    return (
        f"torch.compile: {statistics.median(ratios):.2f} times as fast, after {first:.0f} seconds for the first round."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", help="files, or folders of any depth")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--adapter", help="a folder that training wrote, or an id on the Hub")
    which.add_argument("--model", help="a base model, which classifies without training")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--count", type=int, default=256, help="pictures in each round (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[32], help="pictures at a time (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of the tower on the CPU (default: torch's)")
    parser.add_argument("--compile", action="store_true", help="also measure the image tower after torch.compile")
    parser.add_argument("--drafts", action="store_true", help="also compare reduced decoding of JPEG with all of it")
    args = parser.parse_args()
    tidy_output()
    if args.threads:
        torch.set_num_threads(args.threads)
    found, device = find_files(args.pictures), args.device
    classifier = zero_shot(args.model, found, device) if args.model else hf_tgpt.load_classifier(args.adapter, device)
    chosen = found[:: max(1, len(found) // args.count)][: args.count]
    files = list(islice(cycle(chosen), args.count))
    print("\n".join(markdown_table(HEADER, [speed(classifier, files, size, args.rounds) for size in args.batch])))
    if args.compile:
        print("\n" + compiled(classifier, files, args.batch[0], args.rounds))
    if args.drafts:
        print("\n" + "\n".join(markdown_table(DRAFTS, drafts(classifier, chosen))))


if __name__ == "__main__":
    main()
