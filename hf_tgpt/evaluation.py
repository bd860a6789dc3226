"""The accuracy of any classifier, in one process or several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.modeling_outputs import ImageClassifierOutput

from .data import Collator, FewShotImages
from .metrics import classification_metrics
from .references import Reference


class UnknownClasses(ValueError):
    """A classifier whose classes are fixed is asked for others."""


def for_classes(model: PeftModel | Reference, class_names: list[str]) -> Callable[..., ImageClassifierOutput]:
    """A trained model as a classifier among `class_names`, in their order.

    A model that takes new classes is given them. Another one, whose classes are fixed, is scored among those of its
    own that are named. Raises UnknownClasses, a ValueError, if it does not know one of them.
    """
    if list(class_names) == list(model.class_names):
        return model
    if model.takes_new_classes:
        model.set_class_names(class_names)
        return model
    known = {name: column for column, name in enumerate(model.class_names)}
    unknown = [name for name in class_names if name not in known]
    if unknown:
        raise UnknownClasses(
            f"The model knows {len(known)} classes, fixed when it was trained, but not {unknown[0]!r} "
            f"({len(unknown)} of the data set's {len(class_names)} are unknown); use a method that classifies by text, "
            "or train on these classes."
        )
    columns = [known[name] for name in class_names]

    def classify(pixel_values: torch.Tensor) -> ImageClassifierOutput:
        output = model(pixel_values)
        for name in ("logits", "head_logits", "zero_shot_logits"):
            if output.get(name) is not None:
                output[name] = output[name][:, columns]
        return output

    return classify


def evaluation_loader(
    images: FewShotImages, accelerator: Accelerator, num_workers: int = 0, batch_size: int = 64
) -> DataLoader:
    """The pictures in order, shared out to the processes."""
    pin = torch.cuda.is_available()
    loader = DataLoader(images, batch_size, collate_fn=Collator(), num_workers=num_workers, pin_memory=pin)
    return accelerator.prepare(loader)


@torch.inference_mode()
def predict(
    classify: Callable[..., ImageClassifierOutput],
    loader: DataLoader,
    accelerator: Accelerator,
    description: str = "evaluating",
) -> dict[str, np.ndarray]:
    """`logits` (n, c) and `labels` (n,) of all pictures, from a model in evaluation mode or any other classifier.

    `loader` must be prepared by `accelerator`; every picture counts once, however many processes share the work. Where
    the output carries `zero_shot_logits` (TGP-T), `wise_ft_logits` (n, c) are those at equal shares of both heads.
    """
    parts: dict[str, list[torch.Tensor]] = {"logits": [], "labels": []}
    for batch in tqdm(loader, desc=description, leave=False, disable=silent(accelerator)):
        with accelerator.autocast():
            kept = batch.get("image_states")  # of `hf_tgpt.features`
            output = classify(batch["pixel_values"]) if kept is None else classify(image_states=kept)
        found = {"logits": output.logits.float(), "labels": batch["labels"]}
        if output.get("zero_shot_logits") is not None:
            found["wise_ft_logits"] = (output.head_logits + output.zero_shot_logits).float() / 2
        for name, value in accelerator.gather_for_metrics(found).items():
            parts.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values).numpy() for name, values in parts.items()}


def evaluate(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """All metrics of `hf_tgpt.metrics` for what `predict` gives; arguments as there.

    With TGP-T also `wise_ft_accuracy`.
    """
    return measure(predict(*args, **kwargs))


def measure(predictions: dict[str, np.ndarray]) -> dict[str, Any]:
    """The metrics of what `predict` gave."""
    metrics = classification_metrics(predictions["logits"], predictions["labels"])
    if "wise_ft_logits" in predictions:
        hits = predictions["wise_ft_logits"].argmax(-1) == predictions["labels"]
        metrics["wise_ft_accuracy"] = float(hits.mean())
    return metrics


def silent(accelerator: Accelerator) -> bool | None:
    """For tqdm: never but on the main process, and there (None) only on a terminal."""
    return None if accelerator.is_main_process else True
