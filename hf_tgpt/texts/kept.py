"""A value that is computed once and kept while the weights it depends on do not change."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

Kept = tuple[list | None, torch.Tensor]


@torch.compiler.disable  # a compiler cannot follow what it compares (addresses, versions)
def kept(
    before: Kept | None,
    rests_on: Iterable[nn.Parameter],
    compute: Callable[[], torch.Tensor],
    generation: object = None,
) -> Kept:
    """(state, value): the value from `before` if nothing it depends on has changed, else computed, without gradient.

    Every change that torch counts is detected: to weights, their device, dtype and autocast. `generation` stands for
    all others: a value kept with one that is not equal is computed again.
    """
    weights = list(rests_on)
    if any(p.is_inference() for p in weights):  # such tensors do not count their changes
        return None, compute()
    device = weights[0].device.type
    precision = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    # None where the others have their weight, which must be the very same one.
    state = [(None, generation), *((p, p.data_ptr(), p._version, p.dtype, precision) for p in weights)]
    if before is not None and before[0] is not None and _same(before[0], state):
        return before
    with torch.inference_mode(False), torch.no_grad():
        return state, compute()


def _same(old: list, new: list) -> bool:
    return len(old) == len(new) and all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(old, new, strict=True))
