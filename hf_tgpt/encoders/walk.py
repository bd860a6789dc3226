"""The two towers with prompts spliced in, for every family of encoders.

Letters as in `base.py`, and n prompt tokens. Prompts are {layer: tokens}: the tokens (n, d), or (s, n, d) with each
sentence's or picture's own, take their places before that layer, counted from 0.

The functions are pure: they walk the model's own embeddings, layers, norms and projections and change nothing in it.
Gradient checkpointing, attention backends and autocast therefore work as they are set on the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from .base import DualEncoder
from .chunks import CHUNK_TOKENS, chunks, in_chunks
from .packing import Packing, common_length, pack

Prompts = Mapping[int, torch.Tensor]


def unit(features: torch.Tensor) -> torch.Tensor:
    """Features at unit length, in float32 at least, so that a half-precision model still ranks close classes."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


# Text ----------------------------------------------------------------------------------------------------------------


def encode_text(
    encoder: DualEncoder,
    embeddings: torch.Tensor,
    ends: torch.Tensor,
    prompts: Prompts | None = None,
    packing: Packing | None = None,
    insert: bool = False,
) -> torch.Tensor:
    """Token embeddings without positions (s, t, d_t) that end at `ends` (s,) -> text features (s, d), not normalised.

    Prompts replace the first n words. Layer 0's prompts replace their embeddings, and so get positions. With `insert`
    the words stay and the sentence grows: the first prompts are inserted before the first word, without positions, and
    later layers' prompts replace them.

    `packing` defines which leading tokens, including the prompts, the sentences have in common. Without it, each
    sentence is computed separately, and also if a later layer's prompts differ between sentences or extend beyond the
    common beginning. Raises ValueError for prompts of a layer that does not exist, and for too many.
    """
    prompts, start = dict(prompts or {}), encoder.prefix
    _check_prompts(prompts, len(encoder.text_layers()), insert, embeddings.shape[1] - start)
    embeddings = embeddings.to(encoder.words().dtype)
    if 0 in prompts and not insert:
        embeddings = _put(embeddings, prompts.pop(0), start)
    if packing is not None and not (
        encoder.text_takes_masks() and _are_common(prompts, packing.shared - start, insert)
    ):
        packing = None
    if packing is None:
        rows = torch.arange(embeddings.shape[0], device=embeddings.device)
        hidden = encoder.enter_text(embeddings)  # (s, t, d_t)
        mask = encoder.text_mask(hidden, ends)
    else:
        rows, ends = packing.row, packing.place
        embeddings = embeddings[packing.sentence, packing.position]  # (r, l, d_t)
        hidden = encoder.enter_text(embeddings, packing.position)  # (r, l, d_t)
        mask = encoder.packed_mask(packing.mask, hidden)
    for i, layer in enumerate(encoder.text_layers()):
        if i in prompts:
            hidden = _put(hidden, prompts[i], start, insert)
            if insert:
                ends, insert = ends + prompts[i].shape[-2], False
                mask = (
                    encoder.text_mask(hidden, ends)
                    if packing is None
                    else encoder.packed_mask(packing.with_room(start, prompts[i].shape[-2]), hidden)
                )
        hidden = layer(hidden, mask)
    return encoder.leave_text(hidden[rows, encoder.reading_places(ends, hidden.shape[1])])  # (s, d)


def encode_words(
    encoder: DualEncoder, input_ids: torch.Tensor, ends: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """The model's own text features: ids (s, t), ends (s,) -> (s, d), not normalised, `chunk` sentences at a time."""
    shared = common_length(input_ids, ends) if encoder.causal else 0

    def encode(part: slice) -> torch.Tensor:
        if not encoder.takes_prompts:
            return encoder.text_features(input_ids[part], ends[part])
        embeddings = F.embedding(input_ids[part], encoder.words())  # (s, t, d_t)
        packing = pack(ends[part], shared, encoder.shape()["context_length"]) if shared else None
        return encode_text(encoder, embeddings, ends[part], packing=packing)

    parts = text_chunks(encoder, ends, input_ids.shape[1], shared, chunk)
    return in_chunks(encode, parts, encoder.text_parameters())


def trim(
    encoder: DualEncoder, input_ids: torch.Tensor, end_token: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cuts what affects no sentence: input_ids (s, t) -> ids (s, longest), ends (s,). `end_token` as in `ends`."""
    ends = encoder.ends(input_ids, end_token)
    return (input_ids if encoder.fills_context else input_ids[:, : int(ends.max()) + 1]), ends


def text_chunks(
    encoder: DualEncoder, ends: torch.Tensor, length: int, shared: int, size: int | None = None
) -> list[slice]:
    """Sentences of `length` tokens with ends (s,), `shared` ones in common, in slices of `size` or as many as fit."""
    if not encoder.causal:  # padding is computed like words
        ends = torch.full_like(ends, length - 1)
    return chunks(ends, shared, size, chunk_tokens(encoder))


def chunk_tokens(encoder: DualEncoder) -> int:
    """The default number of own tokens in the sentences whose activations a training step keeps at a time.

    On a GPU as many as take an eighth of its memory, since the rest is computed twice; elsewhere few. It does not
    depend on the free memory, so a repeated or resumed run sums in the same order.
    """
    model, shape = encoder.model, encoder.shape()
    if model.device.type != "cuda":
        return CHUNK_TOKENS
    kept = 18 * shape["text_width"] * shape["text_layers"] * encoder.dtype.itemsize  # a token's bytes, as measured
    return max(CHUNK_TOKENS, torch.cuda.get_device_properties(model.device).total_memory // 8 // kept)


def replace_words(embeddings: torch.Tensor, prompts: torch.Tensor, prefix: int = 1) -> torch.Tensor:
    """Prompts (n, d_t) or (s, n, d_t) in place of the first n words of embeddings (s, t, d_t)."""
    return _put(embeddings, prompts, prefix)


# Images --------------------------------------------------------------------------------------------------------------


def encode_image(
    encoder: DualEncoder,
    pixel_values: torch.Tensor,
    prompts: Prompts | None = None,
    behind_class_token: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Pictures (b, 3, h, w) and prompts as in `image_tokens` -> image features (b, d), not normalised."""
    if not encoder.takes_prompts:
        return encoder.image_features(pixel_values, **kwargs)
    tokens = image_tokens(encoder, pixel_values, prompts, behind_class_token, **kwargs)
    return encoder.leave_image(split_tokens(tokens, prompts, behind_class_token, encoder.class_tokens)[0])


def image_tokens(
    encoder: DualEncoder,
    pixel_values: torch.Tensor,
    prompts: Prompts | None = None,
    behind_class_token: bool = False,
    behind_norm: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Pictures (b, 3, h, w) -> the last layer's hidden states (b, p + n, d_v), before any norm.

    The first prompts are appended after the patches, or with `behind_class_token` inserted before them, after the class
    token if there is one; later layers' prompts replace them. Layer 0's prompts enter before the norm that some towers
    have there, or with `behind_norm` after it. Raises ValueError if the picture's size is not the model's, for prompts
    of a layer that does not exist, and for layers with different numbers of prompts.
    """
    prompts = prompts or {}
    _check_prompts(prompts, len(encoder.image_layers()), insert=True)
    hidden, insert = encoder.enter_image(pixel_values, **kwargs), True  # (b, p, d_v)
    for i, layer in enumerate(encoder.image_layers()):
        if i == 0 and behind_norm:
            hidden = encoder.after_prompts(hidden)
        if i in prompts:
            behind_patches = hidden.shape[1] - (0 if insert else prompts[i].shape[-2])
            start = encoder.class_tokens if behind_class_token else behind_patches
            hidden, insert = _put(hidden, prompts[i], start, insert), False  # (b, p + n, d_v)
        if i == 0 and not behind_norm:
            hidden = encoder.after_prompts(hidden)
        if encoder.on_image_layer is not None:
            encoder.on_image_layer(i, hidden)
        hidden = layer(hidden, None)
    return hidden


def split_tokens(
    tokens: torch.Tensor, prompts: Prompts | None = None, behind_class_token: bool = False, class_tokens: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of `image_tokens` with these prompts -> the picture's tokens (b, p, d_v), the prompts' (b, n, d_v)."""
    count = next(iter(prompts.values())).shape[-2] if prompts else 0
    if behind_class_token:
        start = class_tokens
        return torch.cat([tokens[:, :start], tokens[:, start + count :]], dim=1), tokens[:, start : start + count]
    places = tokens.shape[1] - count
    return tokens[:, :places], tokens[:, places:]


def _check_prompts(prompts: Prompts, layers: int, insert: bool, words: int = 0) -> None:
    """Raises ValueError for prompts that do not fit a tower of this many layers, or this many words to replace."""
    lengths = {layer: part.shape[-2] for layer, part in prompts.items()}
    if unknown := [layer for layer in lengths if not 0 <= layer < layers]:
        raise ValueError(f"`prompts` are for layer {unknown[0]} of a tower with layers 0 to {layers - 1}; choose one.")
    if insert and len(set(lengths.values())) > 1:
        raise ValueError(f"`prompts` by layer are {lengths}; prompts that replace inserted ones must be as many.")
    if not insert and lengths and max(lengths.values()) > words:
        raise ValueError(f"`prompts` are {max(lengths.values())} in place of {words} tokens; use longer sentences.")


def _are_common(prompts: Prompts, room: int, insert: bool) -> bool:
    """Whether prompts lie in the first `room` words, which all sentences share, and are the same for all."""
    return all(part.ndim == 2 and (insert or part.shape[0] <= room) for part in prompts.values())


def _put(hidden: torch.Tensor, prompts: torch.Tensor, start: int, insert: bool = False) -> torch.Tensor:
    """Prompts (n, d) or (s, n, d) in place of the n tokens of hidden (s, t, d) from `start`, or before these."""
    # Adapter weights stay in float32 on a half-precision model; prompts take the tower's dtype where they enter it.
    prompts = prompts.to(hidden.dtype).expand(hidden.shape[0], -1, -1)  # not len, which an exporter takes as fixed
    rest = start if insert else start + prompts.shape[1]
    return torch.cat([hidden[:, :start], prompts, hidden[:, rest:]], dim=1)
