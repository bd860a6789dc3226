"""Measures how long adapters take to load onto a base model in memory, to give a first answer and to be switched.

python examples/benchmark_adapters.py --model openai/clip-vit-base-patch16 --classes 1000 --methods coop gda
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import hf_tgpt
from hf_tgpt.adapters.class_features import use_class_features
from hf_tgpt.cli.output import markdown_table, tidy_output
from hf_tgpt.encoders import encoder_of
from hf_tgpt.encoders.loading import sharing_weights

COLUMNS = ["method", "load", "first answer", "load with features", "first answer", "second answer"]


def seconds(call: Callable[[], Any]) -> float:
    """The time that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ms(times: Iterable[float]) -> str:
    """The median in milliseconds."""
    return f"{1000 * statistics.median(times):,.1f}"


def load_and_answer(base: Any, folder: Path, picture: torch.Tensor) -> tuple[float, float, float]:
    """Seconds to load an adapter, with its class features if it has some, and for its first and second answer."""
    models: list[Any] = []

    def load() -> None:
        models.append(hf_tgpt.load_trained(sharing_weights(base), folder))
        use_class_features(models[0], folder)

    loading = seconds(load)
    with torch.inference_mode():
        return loading, seconds(lambda: models[0](picture)), seconds(lambda: models[0](picture))


def row_of(base: Any, method: str, names: list[str], picture: torch.Tensor, place: Path, repeats: int) -> list[str]:
    """A method's times without class features on disk and with them; the adapter is in `place` afterwards.

    It is as training would start from, which does not change the times.
    """
    model = hf_tgpt.config_class(method)(class_names=names).build(sharing_weights(base)).eval()
    model.save_pretrained(place / method)
    shutil.copytree(place / method, place / "without")
    stored = hf_tgpt.save_class_features(model, place / method)
    without, kept = [], []
    for _ in range(repeats):  # alternately, so that other load on the machine affects both
        without.append(load_and_answer(base, place / "without", picture))
        kept += [load_and_answer(base, place / method, picture)] if stored else []
    shutil.rmtree(place / "without")
    (load, first, second), own = map(ms, zip(*without, strict=True)), list(map(ms, zip(*kept, strict=True)))
    return [method, load, first, *(own[:2] or ["", ""]), second]


def switch(base: Any, folder: Path, picture: torch.Tensor, adapters: int) -> tuple[str, str, str]:
    """Milliseconds to load one of many adapters, to switch to it, and for the first answer after that."""
    model = hf_tgpt.load_adapter(sharing_weights(base), folder, adapter_name="adapter 0")
    loads = [
        seconds(lambda: model.load_adapter(folder, f"adapter {number}"))  # noqa: B023
        for number in range(1, adapters)
    ]
    towers: dict[Any, str] = {}
    switches, answers = [], []
    for name in model.peft_config:
        model.set_adapter(name)
        use_class_features(model, folder, towers)
    with torch.inference_mode():
        for name in model.peft_config:
            switches.append(seconds(lambda: model.set_adapter(name)))  # noqa: B023
            answers.append(seconds(lambda: model(picture)))
    return ms(loads), ms(switches), ms(answers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(hf_tgpt.TOY_CLIP), help="the base model (default: the toy CLIP)")
    parser.add_argument("--classes", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=["coop", "mmrl", "cocoop", "tgpt", "gda", "lora"])
    parser.add_argument("--adapters", type=int, default=10, help="of the first method, to switch among them")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    args = parser.parse_args()
    tidy_output()
    models: list[Any] = []
    reading = seconds(lambda: models.append(hf_tgpt.load_clip(args.model).eval()))
    (base,) = models
    size = encoder_of(base).shape()["image_size"]
    picture, names = torch.zeros(1, 3, size, size), [f"thing {number}" for number in range(args.classes)]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows = [row_of(base, method, names, picture, place, args.repeats) for method in args.methods]
        loading, switching, answer = switch(base, place / args.methods[0], picture, args.adapters)
    print(f"Milliseconds, {args.classes} classes; the base model alone takes {ms([reading])} to load.\n")
    print("\n".join(markdown_table(COLUMNS, rows)))
    print(f"\nOf {args.adapters} {args.methods[0]}: {loading} to load one, {switching} to switch, {answer} to answer.")
