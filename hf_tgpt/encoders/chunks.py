"""Encodes any number of sentences while keeping only one chunk's activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

# The sentences' own tokens in a chunk: about 0.5 GB of activations in ViT-B/16's text tower and float32.
CHUNK_TOKENS = 1024


def chunks(ends: torch.Tensor, shared: int, size: int | None = None, tokens: int = CHUNK_TOKENS) -> list[slice]:
    """Sentences that end at `ends` (s,) in slices of `size`, or of about `tokens` tokens beside the `shared` ones.

    The first slice is the remainder: the last, which `in_chunks` need not compute twice, should be a full one.
    """
    count = len(ends)
    if size is None:
        size = max(1, int(tokens / (ends + 1 - shared).float().mean()))
    return [slice(max(0, end - size), end) for end in range(count, 0, -size)][::-1]


def in_chunks(
    encode: Callable[[Any], torch.Tensor], parts: Sequence[Any], weights: Iterable[torch.Tensor]
) -> torch.Tensor:
    """The rows of `encode(part)` for all parts; `weights` are all tensors that may get gradients from it.

    Exact: in training the activations are dropped and computed again in the backward pass, at the price of a second
    forward pass. The last part, whose backward pass comes first, keeps its activations, so a single part costs nothing
    extra.
    """
    trained = [weight for weight in weights if weight.requires_grad]
    if len(parts) == 1 or not trained or not torch.is_grad_enabled():
        return torch.cat([encode(part) for part in parts])
    return torch.cat([_recomputed(encode, parts[:-1], trained), encode(parts[-1])])


@torch.compiler.disable
def _recomputed(
    encode: Callable[[Any], torch.Tensor], parts: Sequence[Any], weights: list[torch.Tensor]
) -> torch.Tensor:
    return _Recomputed.apply(encode, parts, *weights)


class _Recomputed(torch.autograd.Function):
    """One node for all parts. With `torch.utils.checkpoint` around each part, the little that each leaves on the heap
    lies between the large blocks and prevents their reuse: with glibc's malloc, memory then grows with the number of
    parts, to several times the activations of one.
    """

    @staticmethod
    def forward(
        ctx: Any, encode: Callable[[Any], torch.Tensor], parts: Sequence[Any], *weights: torch.Tensor
    ) -> torch.Tensor:
        device = weights[0].device.type
        ctx.encode, ctx.parts = encode, parts
        ctx.autocast = dict(
            device_type=device, enabled=torch.is_autocast_enabled(device), dtype=torch.get_autocast_dtype(device)
        )
        ctx.random = torch.get_rng_state(), *get_device_states(*weights)  # so that dropout drops the same again
        ctx.save_for_backward(*weights)
        return torch.cat([encode(part) for part in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights, start = ctx.saved_tensors, 0
        totals: list[torch.Tensor | None] = [None] * len(weights)
        state, devices, states = ctx.random
        with torch.random.fork_rng(devices), torch.enable_grad(), torch.autocast(**ctx.autocast):
            torch.set_rng_state(state)
            set_device_states(devices, states)
            for part in ctx.parts:
                rows = ctx.encode(part)
                gradients = torch.autograd.grad(rows, weights, gradient[start : start + len(rows)], allow_unused=True)
                start += len(rows)
                totals = [_sum(*pair) for pair in zip(totals, gradients, strict=True)]
                del rows, gradients
        return None, None, *totals


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return a if b is None else b if a is None else a + b
