"""Registers a method with PEFT. PEFT's own mappings are the registry; there is no other."""

from __future__ import annotations

import re

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import PromptConfig, PromptMethod
from .learner import PromptLearner
from .tuner import PromptTuner


def register(method: str, config_class: type[PromptConfig], learner_class: type[PromptLearner]) -> None:
    """Registers `method` (upper case, as in adapter_config.json) so that `get_peft_model` takes `config_class`.

    `peft.utils.register_peft_method` accepts only names of PEFT's own enum, hence the three entries here.
    """
    name = PromptMethod(method)
    config_class.method, config_class.learner_class = method, learner_class
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[name] = PromptTuner
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = PromptTuner.prefix


def registered_methods() -> dict[str, type[PromptConfig]]:
    """The methods of this and other packages that are registered with PEFT: {"maple": MaPLeConfig, ...}."""
    known = PEFT_TYPE_TO_CONFIG_MAPPING.items()
    return {name.value.lower(): config for name, config in known if issubclass(config, PromptConfig)}


def plain_name(method: str) -> str:
    """The name without case and punctuation, so that "MaPLe" is "maple" and "zero-shot" is "zero_shot"."""
    return re.sub(r"[^a-z0-9]", "", method.lower())
