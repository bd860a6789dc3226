"""The classes' text features from sentences about them, for zero-shot classification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ..encoders import DualEncoder
from ..encoders.walk import encode_words, unit
from .sentences import tokenize


def zero_shot_head(
    encoder: DualEncoder,
    class_names: Sequence[str],
    templates: list[str] | dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    normalize_each: bool = True,
) -> torch.Tensor:
    """Unit text features of the classes, averaged over sentences after encoding -> (c, d).

    Features are normalised before they are averaged, unless `normalize_each` is off.

    `templates` are sentences with {} for the class name, or {class name: [sentences about it]}, as
    `hf_tgpt.data.read_class_descriptions` reads; the latter are cut if they are longer than the context.

    Source: Radford et al., ICML 2021, section 3.1.4; per class: CuPL (Pratt et al., ICCV 2023, section 3).

    Raises ValueError for a class without sentences.
    """
    if isinstance(templates, dict):
        return _head_of_descriptions(encoder, class_names, templates, tokenizer)
    features = [template_features(encoder, class_names, template, tokenizer) for template in templates]
    return unit(torch.stack([unit(row) if normalize_each else row for row in features]).mean(0))


def mean_features(
    encoder: DualEncoder,
    class_names: Sequence[str],
    templates: list[str],
    tokenizer: PreTrainedTokenizerBase,
    chunk: int | None = None,
) -> torch.Tensor:
    """Text features of the classes, averaged over templates as they are -> (c, d), not normalised."""
    features = [template_features(encoder, class_names, template, tokenizer, chunk) for template in templates]
    return torch.stack(features).mean(0)


def template_features(
    encoder: DualEncoder,
    class_names: Sequence[str],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    chunk: int | None = None,
) -> torch.Tensor:
    """Text features of the classes in one template, a sentence with {} for the name -> (c, d), not normalised."""
    return encode_words(encoder, *template_tokens(encoder, class_names, template, tokenizer), chunk=chunk)


def template_tokens(
    encoder: DualEncoder, class_names: Sequence[str], template: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor]:
    """The classes in one template as ids (c, t) and ends (c,); raises ValueError for a name that does not fit."""
    return tokenize(tokenizer, [template.replace("{}", name) for name in class_names], encoder, class_names)


def _head_of_descriptions(
    encoder: DualEncoder,
    class_names: Sequence[str],
    descriptions: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
) -> torch.Tensor:
    missing = [name for name in class_names if not descriptions.get(name)]
    if missing:
        raise ValueError(
            f"`templates` has no sentences for {', '.join(map(repr, missing[:5]))}; add at least one each."
        )
    rows = []
    for name in class_names:
        sentences = descriptions[name]
        ids, ends = tokenize(tokenizer, sentences, encoder, [name] * len(sentences), truncate=True)
        rows.append(unit(encode_words(encoder, ids, ends)).mean(0))
    return unit(torch.stack(rows))
