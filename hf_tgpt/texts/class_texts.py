"""A list of classes as a value: its names, their sentences, and cached results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from ..encoders import DualEncoder
from ..encoders.packing import Packing
from ..encoders.walk import text_chunks
from .kept import Kept, kept

Plan = list[tuple[slice, Packing | None]]  # parts of the classes, each with how its sentences share rows


class ClassTexts(nn.Module):
    """The classes of a call. It never changes; another list of classes is another object.

    An adapter owns one, for the classes that it was trained on. A call with other classes brings its own, so it does
    not affect other calls or what is saved. It is a module only so that its ids move with a model.

    Shapes: `ids` (c, t) and `ends` (c,), each sentence's last token; `trained_labels` (c,), each class's number among
    those that the adapter was trained on, -1 for one that is new to it.
    """

    ids: torch.Tensor
    ends: torch.Tensor
    trained_labels: torch.Tensor

    def __init__(self, names: Sequence[str], ids: torch.Tensor, ends: torch.Tensor, trained: Sequence[str]):
        super().__init__()
        labels = {name: label for label, name in enumerate(trained)}
        numbers = [labels.get(name, -1) for name in names]
        self.names, self.all_trained = tuple(names), -1 not in numbers
        self.ids = nn.Buffer(ids, persistent=False)
        self.ends = nn.Buffer(ends, persistent=False)
        self.trained_labels = nn.Buffer(torch.tensor(numbers, device=ids.device), persistent=False)
        # Cached results for these classes. Two threads may compute the same one; each gets its own result.
        self._memory: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self.names)

    def once(self, key: Any, work_out: Callable[[], Any]) -> Any:
        """The result of `work_out()`, cached under `key`."""
        if key not in self._memory:
            with torch.inference_mode(False):
                self._memory[key] = work_out()
        return self._memory[key]

    def features(
        self, key: Any, rests_on: list[nn.Parameter], encode: Callable[[], torch.Tensor], generation: object
    ) -> torch.Tensor:
        """The classes' features (c, d), cached under `key` while the weights they depend on stay (see `kept`)."""
        before: Kept | None = self._memory.get(("features", key))
        after = kept(before, rests_on, encode, generation)
        self._memory["features", key] = after
        return after[1]

    def plan(
        self,
        encoder: DualEncoder,
        share: slice,
        chunk: int | None,
        shared_length: Callable[[torch.Tensor, torch.Tensor], int],
        pack: Callable[[torch.Tensor, torch.Tensor], Packing | None],
    ) -> Plan:
        """A share's classes in chunks of this many (None: as in `text_chunks`), computed once."""

        def work_out() -> Plan:
            numbers = range(len(self))[share]
            shared = shared_length(self.ids, self.ends)
            parts = text_chunks(encoder, self.ends[share], self.ids.shape[1], shared, chunk)
            slices = [slice(numbers[part].start, numbers[part].stop) for part in parts]
            return [(part, pack(self.ids[part], self.ends[part])) for part in slices]

        return self.once(("plan", share.start, share.stop, chunk), work_out)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # .to(), .half(), .cuda(): cached results are on the old device or in the old dtype.
        self._memory = {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_memory": {}}
