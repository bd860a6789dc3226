"""The precision that the towers of a base model compute in."""

from __future__ import annotations

import time
from functools import cache

import torch
from transformers import PreTrainedModel

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO = "auto"
_WORTH = 0.8  # of float32's time; a smaller gain is not worth the lost digits
_HOPELESS = 4  # times float32's time for a small product, where overheads count too


def read_dtype(name: str | torch.dtype, device: str | torch.device = "cpu") -> torch.dtype:
    """The type that "fp32", "bf16", "fp16" or "auto" stands for; a torch.dtype of these stands for itself.

    "auto" is bfloat16 if a measurement, made once per process in well under a second, finds it faster on the device,
    and float32 otherwise. Raises ValueError for anything else.

    Example:
        >>> read_dtype("bf16")
        torch.bfloat16
    """
    if name == AUTO:
        return torch.bfloat16 if multiplies_faster(torch.bfloat16, str(device)) else torch.float32
    if name in PRECISIONS.values():
        return name  # type: ignore[return-value]
    if name not in PRECISIONS:
        raise ValueError(f"`dtype`={name!r} is unknown; choose one of {', '.join([AUTO, *PRECISIONS])}.")
    return PRECISIONS[name]


def cast_towers(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Casts a dual encoder's weights, but not the logit scale and bias, which half precision changes by a percent.

    Example:
        >>> clip = cast_towers(hf_tgpt.load_clip("openai/clip-vit-base-patch16"), torch.bfloat16)
    """
    exact = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.numel() == 1}
    model.to(dtype)
    for name, value in exact.items():
        model.get_parameter(name).data = value
    return model


@cache
def multiplies_faster(dtype: torch.dtype, device: str) -> bool:
    """Whether the device multiplies matrices of a tower's size in less time in this type than in float32."""

    def ratio(rows: int, times: int) -> float:
        taken: dict[torch.dtype, list[float]] = {dtype: [], torch.float32: []}
        pairs = {
            kind: (torch.ones(rows, 768, dtype=kind, device=device), torch.ones(768, 3072, dtype=kind, device=device))
            for kind in taken
        }
        for _ in range(times):  # alternately, so that other load on the machine affects both
            for kind, (left, right) in pairs.items():
                start = time.perf_counter()
                float((left @ right)[0, 0])  # which waits for the GPU
                taken[kind].append(time.perf_counter() - start)
        return min(taken[dtype]) / min(taken[torch.float32])

    # A processor without instructions for the type takes seconds for a large product; a small one shows it at once.
    return ratio(rows=16, times=3) < _HOPELESS and ratio(rows=256, times=7) < _WORTH
