"""Which dual encoders there are, and how prompts go through one."""

from __future__ import annotations

from typing import Any

import transformers

from .base import DualEncoder as DualEncoder
from .chinese_clip import ChineseCLIP
from .clip import CLIP
from .metaclip2 import MetaCLIP2
from .siglip import SigLIP

# A family of encoders is one line here and one file beside this one.
FAMILIES: dict[str, type[DualEncoder]] = {
    family.model_type: family for family in (CLIP, MetaCLIP2, SigLIP, ChineseCLIP)
}


def encoder_of(model: Any) -> DualEncoder:
    """The view of a transformers model that prompts go through, by its `config.model_type`.

    Raises ValueError for a model of an unknown family, and for one of a known family without both towers.
    """
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if family is None or not isinstance(model, getattr(transformers, family.model_class)):
        names = ", ".join(family.model_class for family in FAMILIES.values())
        raise ValueError(
            f"The base model is a {type(model).__name__}; prompt learning needs a model of transformers with both "
            f"towers, one of {names}: CLIPModel.from_pretrained(...)."
        )
    return family(model)
