"""The supported dual encoders, and how prompts go through them."""

from __future__ import annotations

from typing import Any

import transformers

from .base import DualEncoder as DualEncoder
from .chinese_clip import ChineseCLIP
from .clip import CLIP
from .features_only import NAFLEX, FeaturesOnly, other_model_class
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
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    name = model_class_of(model_type)
    if name is None or not isinstance(model, getattr(transformers, name)):
        raise ValueError(
            f"The base model is a {type(model).__name__}; prompt learning needs a transformers model with both "
            f"towers, one of {families()}: CLIPModel.from_pretrained(...){naflex_remedy(model_type)}."
        )
    return FAMILIES.get(model_type, FeaturesOnly)(model)


def model_class_of(model_type: str) -> str | None:
    """The supported transformers class for a `config.model_type`; None if there is none."""
    family = FAMILIES.get(model_type)
    return other_model_class(model_type) if family is None else family.model_class


def families() -> str:
    """The classes of models that take prompts, in words."""
    return ", ".join(family.model_class for family in FAMILIES.values())


def check_takes_prompts(encoder: DualEncoder, method: str) -> None:
    """Raises ValueError for a method with prompts on a model of which only the features can be used."""
    if not encoder.takes_prompts:
        raise ValueError(
            f"{method} puts prompts into the layers of the towers, which works on {families()}, and the base model is "
            f"{encoder.model_class}; choose one of these, or a method on frozen features such as GDA."
        )


def naflex_remedy(model_type: str) -> str:
    """What to do about a NaFlex checkpoint, as the end of a message; empty for other models."""
    if model_type != NAFLEX:
        return ""
    return (
        "; this is SigLIP 2's NaFlex form, whose pictures vary in shape: choose one of fixed resolution, such as "
        "google/siglip2-base-patch16-224"
    )
