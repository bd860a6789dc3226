"""Many short sentences in few rows, so that what they have in common is computed once per row, not once per sentence.

Under the causal mask, BOS, learned tokens and fixed words before the class name have the same hidden states for every
class. A row is that common beginning, once, followed by the own tokens of as many sentences as fit in the context; a
mask lets each token attend to the beginning and its own sentence, and each token keeps its position. A class then costs
its own 3 to 5 tokens instead of the whole context. Exact: the same sums in another order.

Letters: s sentences, t tokens, r rows, l places in a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of s sentences lie in r rows of l places."""

    sentence: torch.Tensor  # (r, l), the sentence that the token here is taken from
    position: torch.Tensor  # (r, l), and its position in that sentence
    mask: torch.Tensor  # (r, 1, l, l), whether a place attends to another
    row: torch.Tensor  # (s,), where a sentence's EOS lies
    place: torch.Tensor  # (s,)
    shared: int  # places of the common beginning

    def to(self, device: torch.device) -> Packing:
        """The same on a device."""
        moved: dict[str, Any] = {
            name: part.to(device, non_blocking=True)
            for name, part in vars(self).items()
            if isinstance(part, torch.Tensor)
        }
        return replace(self, **moved)

    def with_room(self, start: int, count: int) -> torch.Tensor:
        """The mask (r, 1, l + count, l + count) with `count` places more, from `start` within the common beginning.

        They attend to what precedes them and to each other in order; everything after them attends to them.
        """
        rows, _, length, _ = self.mask.shape
        new = torch.ones(length + count, length + count, dtype=torch.bool, device=self.mask.device).tril()
        mask = new.expand(rows, 1, -1, -1).clone()
        before = torch.cat([torch.arange(start), torch.arange(start + count, length + count)]).to(mask.device)
        mask[:, :, before[:, None], before] = self.mask
        return mask


def common_length(input_ids: torch.Tensor, ends: torch.Tensor) -> int:
    """How many leading tokens all sentences have in common: ids (s, t), ends (s,). EOS is never among them."""
    same = (input_ids == input_ids[:1]).all(0)  # (t,)
    return min(int(same.cumprod(0).sum()), int(ends.min()))


@torch.compiler.disable  # Python code computes the layout
def pack(ends: torch.Tensor, shared: int, context: int, groups: torch.Tensor | None = None) -> Packing:
    """Lays out sentences with ends (s,) that have their first `shared` tokens in common, `context` at most.

    With `groups` (s,), only neighbours in the same group share them and lie in one row. The result is on the device of
    `ends`; it is computed on the CPU, so sentences on the CPU need no wait for a GPU.
    """
    own = ends.cpu() + 1 - shared  # (s,)
    group = torch.zeros_like(own) if groups is None else groups.cpu()
    _, group = torch.unique_consecutive(group, return_inverse=True)
    # Rows as even as whole sentences allow, so that the last one is not mostly padding.
    total, longest = int(torch.bincount(group, weights=own).max()), int(own.max())
    least = math.ceil(total / (context - shared))
    room = min(context - shared, math.ceil(total / least) + longest - 1)

    heads, rows, starts = [], [], []  # a row's first sentence; a sentence's row and first place in it
    used, current = 0, None
    for number, (length, member) in enumerate(zip(own.tolist(), group.tolist(), strict=True)):
        if used + length > room or member != current:
            heads.append(number)
            used, current = 0, member
        rows.append(len(heads) - 1)
        starts.append(shared + used)
        used += length
    row, start = torch.tensor(rows), torch.tensor(starts)
    width = int((start + own).max())  # l

    owner = torch.arange(len(own)).repeat_interleave(own)  # of every own token, (own.sum(),)
    within = torch.arange(len(owner)) - (own.cumsum(0) - own)[owner]  # its number in the sentence
    at = row[owner], start[owner] + within
    sentence = torch.tensor(heads)[:, None].repeat(1, width)  # (r, l); padding is the row's first BOS
    position = torch.zeros_like(sentence)
    position[:, :shared] = torch.arange(shared)
    sentence[at], position[at] = owner, shared + within

    segment = torch.full_like(sentence, -1)  # (r, l); a row's beginning and padding are segments of their own
    segment[:, :shared] = -2
    segment[at] = owner
    places = torch.arange(width)
    sees = (segment[:, :, None] == segment[:, None, :]) | (places < shared)  # (r, l, l)
    mask = sees & (places <= places[:, None])
    return Packing(sentence, position, mask[:, None], row, start + own - 1, shared).to(ends.device)
