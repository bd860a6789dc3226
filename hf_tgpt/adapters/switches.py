"""The switches of PEFT's own adapters in a model's layers, with which answers change though no weight does."""

from __future__ import annotations

import copy
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import PromptConfig

_SLOT = PromptConfig.target_modules[0]


def switches_in(model: nn.Module) -> list[tuple[Any, ...]]:
    """Of each layer with such an adapter: its name, which adapters are active, whether all are off, and how strong each
    is. A copy, to be compared with another time.
    """
    configs: Any = getattr(model, "peft_config", {})
    if all(isinstance(config, PromptConfig) for config in configs.values()):
        return []
    return [
        (name, list(layer.active_adapters), layer.disable_adapters, copy.copy(getattr(layer, "scaling", None)))
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and name != _SLOT
    ]
