"""Zero-shot CLIP and the accuracy of any classifier, in one process or several."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import CLIPModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import ImageClassifierOutput

from .classes import load_tokenizer, tokenize
from .data import Collator, FewShotImages
from .metrics import classification_metrics
from .towers import encode_image, encode_tokens, logit_scale, unit


def zero_shot_head(
    clip: CLIPModel,
    class_names: list[str],
    templates: list[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> torch.Tensor:
    """Unit text features of the classes, averaged over templates after encoding -> (c, d)."""
    tokenizer = tokenizer or load_tokenizer(clip)
    features = []
    for template in templates:
        sentences = [template.replace("{}", name) for name in class_names]
        features.append(unit(encode_tokens(clip, *tokenize(tokenizer, sentences, clip, class_names))))
    return unit(torch.stack(features).mean(0))


def zero_shot_classifier(clip: CLIPModel, *args, **kwargs) -> Callable[[torch.Tensor], ImageClassifierOutput]:
    """Plain CLIP as a classifier of pixel_values (b, 3, h, w); arguments as for `zero_shot_head`."""
    head = zero_shot_head(clip, *args, **kwargs)  # (c, d)

    def classify(pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=logit_scale(clip) * unit(encode_image(clip, pixel_values)) @ head.T)

    return classify


def evaluation_loader(
    images: FewShotImages, accelerator: Accelerator, num_workers: int = 0, batch_size: int = 64
) -> DataLoader:
    """The pictures in order, shared out to the processes."""
    pin = torch.cuda.is_available()
    loader = DataLoader(images, batch_size, collate_fn=Collator(), num_workers=num_workers, pin_memory=pin)
    return accelerator.prepare(loader)


@torch.inference_mode()
def evaluate(
    classify: Callable[[torch.Tensor], ImageClassifierOutput],
    loader: DataLoader,
    accelerator: Accelerator,
    description: str = "evaluating",
) -> dict[str, float | list[float | None]]:
    """All metrics of `hf_tgpt.metrics` for a model in evaluation mode or any other classifier of pixel_values.

    `loader` must be prepared by `accelerator`; every picture counts once, however many processes share the work. Where
    the output carries `zero_shot_logits` (TGP-T), `wise_ft_accuracy` is the accuracy at equal shares of both heads.
    """
    logits, mixed, labels = [], [], []
    progress = tqdm(loader, desc=description, leave=False, disable=silent(accelerator))
    for batch in progress:
        with accelerator.autocast():
            output = classify(batch["pixel_values"])
        gathered = accelerator.gather_for_metrics((output.logits.float(), batch["labels"]))
        logits.append(gathered[0].cpu())
        labels.append(gathered[1].cpu())
        if output.get("zero_shot_logits") is not None:
            both = (output.head_logits + output.zero_shot_logits).float()
            mixed.append(accelerator.gather_for_metrics(both).cpu())
    labels = torch.cat(labels).numpy()
    metrics = classification_metrics(torch.cat(logits).numpy(), labels)
    if mixed:
        metrics["wise_ft_accuracy"] = float(np.mean(torch.cat(mixed).argmax(-1).numpy() == labels))
    return metrics


def silent(accelerator: Accelerator) -> bool | None:
    """For tqdm: never but on the main process, and there (None) only on a terminal."""
    return None if accelerator.is_main_process else True
