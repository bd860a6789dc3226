"""Rows that all training processes need, each computing its share of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

# Below so many rows for each process, sending them costs more than computing them.
LEAST_SHARE = 32


def in_shares(encode: Callable[[slice], torch.Tensor], count: int) -> torch.Tensor:
    """All `count` rows, each process in DDP training computing its share; `encode(slice)` returns a slice's rows.

    Exact: the backward pass sums all processes' gradients for a share, and DDP's mean over the processes is then the
    mean of the losses' gradients, as if each process had computed every row. Only inside the forward pass of a
    DistributedDataParallel model, which ensures that all processes have the same weights and take the same steps.
    """
    # Not torch.distributed.is_initialized(): its processes may train separate adapters.
    ddp = DistributedDataParallel._get_active_ddp_module()
    processes = 1 if ddp is None else dist.get_world_size(ddp.process_group)
    share = math.ceil(count / processes)
    if processes == 1 or share < LEAST_SHARE:
        return encode(slice(0, count))
    # The last shares start earlier than necessary, since all must have the same size.
    starts = [min(rank * share, count - share) for rank in range(processes)]
    start = starts[dist.get_rank(ddp.process_group)]
    shares = all_gather(encode(slice(start, start + share)), ddp.process_group)
    return torch.cat([rows[rank * share - starts[rank] :] for rank, rows in enumerate(shares)])
