"""Zero-shot CLIP and the accuracy of any classifier, over one process or several."""

from __future__ import annotations

import torch
from transformers import CLIPModel

from .classes import load_tokenizer, tokenize
from .towers import encode_tokens, unit


def zero_shot_head(clip: CLIPModel, class_names: list[str], templates: list[str], tokenizer=None) -> torch.Tensor:
    """Unit text features of the classes, averaged over templates after encoding -> (c, d)."""
    tokenizer = tokenizer or load_tokenizer(clip)
    features = []
    for template in templates:
        sentences = [template.format(name) for name in class_names]
        features.append(unit(encode_tokens(clip, *tokenize(tokenizer, sentences, clip, class_names))))
    return unit(torch.stack(features).mean(0))
