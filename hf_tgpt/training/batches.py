"""The images of a step, such that any number of processes and parts of a batch gives the same result."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator, DistributedType
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, Sampler

from ..data import Collator, FewShotImages
from .config import TrainingConfig
from .features import CachedImages


class EpochSampler(Sampler):
    """A permutation of the images that depends only on seed and epoch, so a resumed epoch is the same.

    Not accelerate's SeedableRandomSampler: it seeds an epoch with seed + epoch, so runs with neighbouring seeds, whose
    mean and spread are reported, would share nearly all of their orders.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


def train_loader(
    images: FewShotImages | CachedImages,
    sampler: EpochSampler,
    config: TrainingConfig,
    accelerator: Accelerator,
    collate: Collator,
) -> DataLoader:
    """A batch is a process's images of a step; all processes' images do not depend on their number."""
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    # As in the releases, an incomplete last batch is dropped, unless it is the only one.
    batch_size = min(config.batch_size, len(images) // parts * parts)
    if batch_size % parts or batch_size == 0:
        raise ValueError(
            f"`batch_size`={config.batch_size} with {len(images)} images cannot be shared by "
            f"{accelerator.num_processes} processes x {config.gradient_accumulation_steps} accumulated parts; choose a "
            f"multiple of {parts} and at least as many images."
        )
    return DataLoader(
        images,
        batch_size=batch_size // accelerator.num_processes,
        sampler=sampler,
        collate_fn=collate,
        num_workers=config.num_workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
    )


def check_labels(dataset: Dataset, class_names: list[str]) -> None:
    """Raises ValueError unless the data set's labels are the adapter's classes."""
    names = dataset.features["label"].names
    if names != class_names:
        first = next((i for i, pair in enumerate(zip(names, class_names, strict=False)) if pair[0] != pair[1]), None)
        detail = f"label {first} is {names[first]!r} there" if first is not None else f"{len(names)} classes there"
        raise ValueError(
            f"`class_names` ({len(class_names)} classes) are not the data set's: {detail}. Use the data set's names in "
            "their order, hf_tgpt.data.class_names(dataset)."
        )


def split(batch: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """A process's images of a step, in equal parts."""
    size = len(batch["labels"]) // parts
    pieces = zip(*(value.split(size) for value in batch.values()), strict=True)
    return [dict(zip(batch, piece, strict=True)) for piece in pieces]


def of_the_whole_batch(
    model: nn.Module, batch: dict[str, torch.Tensor], parts: int, accelerator: Accelerator
) -> dict[str, dict[str, torch.Tensor]]:
    """What a method needs from a step's whole batch for the same loss with any number of processes and parts."""
    count = getattr(accelerator.unwrap_model(model), "tokens_per_image", None)
    if count is None or parts * accelerator.num_processes == 1:
        return {}
    tokens = count(batch["labels"], batch.get("caption_ids"))
    return {"tokens_per_image": accelerator.reduce(tokens, "mean")} if tokens else {}


def check_engine(accelerator: Accelerator, accumulation_steps: int) -> None:
    """Raises ValueError if Accelerate is configured for an engine that cannot train an adapter on a CLIP here.

    torch's `fully_shard` refuses scalar parameters such as CLIP's `logit_scale`, and Accelerate needs a model's input
    embeddings, which CLIPModel does not define.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            "`distributed_type`=FSDP cannot shard a CLIPModel; train with DDP, `accelerate launch --multi_gpu`: the "
            "gradients and optimizer states of an adapter are small, and CLIP itself is frozen."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accumulation_steps > 1:
        raise ValueError(
            f"`gradient_accumulation_steps`={accumulation_steps} under DeepSpeed, which would step after each part; "
            "choose 1, or MULTI_GPU instead of DEEPSPEED."
        )
