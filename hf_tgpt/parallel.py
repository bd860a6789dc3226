"""What processes and the parts of a batch share, so that any number of them computes what one does."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

# Below so many rows for each process, sending them costs more than computing them.
LEAST_SHARE = 32


def in_shares(encode: Callable[[slice], torch.Tensor], count: int) -> torch.Tensor:
    """`encode(slice)` gives the rows of a slice; all `count` rows, each process of a DDP training computing its share.

    Exact: the backward pass sums what all processes' losses say about a share, and DDP's mean over the processes is
    then the mean of the losses' gradients, as if each process had computed every row. Only inside the forward pass of
    a DistributedDataParallel model, which sees to it that all processes hold the same weights and take the same steps.
    """
    # Not torch.distributed.is_initialized(): its processes may train adapters of their own.
    ddp = DistributedDataParallel._get_active_ddp_module()
    processes = 1 if ddp is None else dist.get_world_size(ddp.process_group)
    share = math.ceil(count / processes)
    if processes == 1 or share < LEAST_SHARE:
        return encode(slice(0, count))
    # The last shares start earlier than they need, since all are to be of one size.
    starts = [min(rank * share, count - share) for rank in range(processes)]
    start = starts[dist.get_rank(ddp.process_group)]
    shares = all_gather(encode(slice(start, start + share)), ddp.process_group)
    return torch.cat([rows[rank * share - starts[rank] :] for rank, rows in enumerate(shares)])


def split(batch: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """A process's images of a step in equal parts."""
    size = len(batch["labels"]) // parts
    pieces = zip(*(value.split(size) for value in batch.values()), strict=True)
    return [dict(zip(batch, piece, strict=True)) for piece in pieces]


def of_the_whole_batch(
    model: nn.Module, batch: dict[str, torch.Tensor], parts: int, accelerator: Accelerator
) -> dict[str, dict[str, torch.Tensor]]:
    """What a method has to know of a step's batch over all processes and parts to give the same loss in any number."""
    count = getattr(accelerator.unwrap_model(model), "tokens_per_image", None)
    if count is None or parts * accelerator.num_processes == 1:
        return {}
    tokens = count(batch["labels"], batch.get("caption_ids"))
    return {"tokens_per_image": accelerator.reduce(tokens, "mean")} if tokens else {}


def check_engine(accelerator: Accelerator, accumulation_steps: int) -> None:
    """Raises ValueError where Accelerate is set up for an engine that cannot train an adapter on a CLIP here.

    torch's `fully_shard` refuses a scalar parameter, which CLIP's `logit_scale` is, and Accelerate asks a model for
    input embeddings that CLIPModel does not name.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            "`distributed_type`=FSDP cannot shard a CLIPModel; train by DDP, `accelerate launch --multi_gpu`: the "
            "gradients and optimizer states of an adapter are small, and CLIP itself is frozen."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accumulation_steps > 1:
        raise ValueError(
            f"`gradient_accumulation_steps`={accumulation_steps} under DeepSpeed, which would step after each part; "
            "choose 1, or MULTI_GPU in place of DEEPSPEED."
        )
