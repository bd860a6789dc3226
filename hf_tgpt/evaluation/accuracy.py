"""The accuracy of any classifier, in one process or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.modeling_outputs import ImageClassifierOutput

from ..adapters.tower_classifier import AdaptedModel
from ..data import Collator
from ..utils.names import composed
from .metrics import classification_metrics


class UnknownClasses(ValueError):
    """A classifier with fixed classes cannot classify these classes."""


def for_classes(model: AdaptedModel, class_names: Sequence[str]) -> Callable[..., ImageClassifierOutput]:
    """A trained model as a classifier among `class_names`, in their order. The model itself does not change.

    A model that takes new classes classifies among them. A model with fixed classes is restricted to those that are
    named. Raises UnknownClasses, a ValueError, if one of them is not a class of the model.

    Example:
        >>> logits = for_classes(model, ["newt", "toad"])(pixel_values).logits  # (b, 2)
    """
    if list(class_names) == list(model.class_names):
        return model
    if model.takes_new_classes:
        return partial(model, class_texts=model.texts_for(class_names))
    known = {composed(name): column for column, name in enumerate(model.class_names)}
    unknown = [name for name in class_names if composed(name) not in known]
    if unknown:
        raise UnknownClasses(
            f"The model has {len(known)} classes, fixed when it was trained, but not {unknown[0]!r} "
            f"({len(unknown)} of {len(class_names)} are unknown); use a method that classifies by text, "
            "or train on these classes."
        )
    columns = [known[composed(name)] for name in class_names]

    def classify(pixel_values: torch.Tensor) -> ImageClassifierOutput:
        output = model(pixel_values)
        for name in output:
            if name.endswith("logits"):
                output[name] = output[name][:, columns]
        return output

    return classify


def evaluation_loader(
    images: Dataset, accelerator: Accelerator, num_workers: int = 0, batch_size: int = 64
) -> DataLoader:
    """A loader of the pictures, or of their stored features, in order, distributed over the processes."""
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

    `loader` must be prepared by `accelerator`; every picture counts once, however many processes share the work. If the
    output also has `other_logits` (TGP-T's {"wise_ft": ...}), they are returned as `wise_ft_logits` (n, c).
    """
    parts: dict[str, list[torch.Tensor]] = {"logits": [], "labels": []}
    for batch in tqdm(loader, desc=description, leave=False, disable=silent(accelerator)):
        with accelerator.autocast():
            states = batch.get("image_states")  # of `training.features`
            output = classify(batch["pixel_values"]) if states is None else classify(image_states=states)
        answers = {"logits": output.logits.float(), "labels": batch["labels"]}
        if hasattr(output, "other_logits"):
            answers |= {f"{name}_logits": logits.float() for name, logits in output.other_logits().items()}
        for name, value in accelerator.gather_for_metrics(answers).items():
            parts.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values).numpy() for name, values in parts.items()}


def evaluate(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """All metrics of `evaluation.metrics` for the output of `predict`, with the same arguments.

    For the model's other logits only the accuracy is computed: with TGP-T, `wise_ft_accuracy`.

    Example:
        >>> accelerator = Accelerator()
        >>> accuracy = evaluate(model, evaluation_loader(images, accelerator), accelerator)["accuracy"]
    """
    return measure(predict(*args, **kwargs))


def measure(predictions: dict[str, np.ndarray]) -> dict[str, Any]:
    """The metrics of the output of `predict`."""
    metrics = classification_metrics(predictions["logits"], predictions["labels"])
    for name, logits in predictions.items():
        if name.endswith("_logits"):
            hits = logits.argmax(-1) == predictions["labels"]
            metrics[name.replace("_logits", "_accuracy")] = float(hits.mean())
    return metrics


def silent(accelerator: Accelerator) -> bool | None:
    """`disable` for tqdm: None, a bar only on a terminal, on the main process, and True on others."""
    return None if accelerator.is_main_process else True
