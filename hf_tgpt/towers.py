"""CLIP's two towers with prompts spliced in. The only file that knows the insides of transformers' `CLIPModel`.

Letters: b images, s sentences, t text tokens, p vision tokens (CLS and patches), n prompt tokens,
d_t text width, d_v vision width, d joint (projection) width.

The functions are pure: they walk the model's own embeddings, layers, norms and projections and change nothing in it.
Gradient checkpointing, attention backends and autocast therefore work as the model's owner set them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CLIPModel
from transformers.masking_utils import create_causal_mask

from .chunks import CHUNK_TOKENS, chunks, in_chunks
from .packing import Packing, common_length, pack


def dimensions(clip: CLIPModel) -> dict[str, int]:
    """What an adapter depends on: it fits another CLIP exactly when all of these agree."""
    text, vision = clip.config.text_config, clip.config.vision_config
    return {
        "text_width": text.hidden_size,
        "text_layers": text.num_hidden_layers,
        "context_length": text.max_position_embeddings,
        "vocabulary": text.vocab_size,
        "vision_width": vision.hidden_size,
        "vision_layers": vision.num_hidden_layers,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "projection_width": clip.config.projection_dim,
    }


def text_parameters(clip: CLIPModel) -> Iterator[torch.nn.Parameter]:
    """All that T rests on."""
    yield from clip.text_model.parameters()
    yield from clip.text_projection.parameters()


def vision_parameters(clip: CLIPModel) -> Iterator[torch.nn.Parameter]:
    """All that V rests on."""
    yield from clip.vision_model.parameters()
    yield from clip.visual_projection.parameters()


def token_embeddings(clip: CLIPModel) -> torch.Tensor:
    """The vocabulary E, (v, d_t)."""
    return clip.text_model.embeddings.token_embedding.weight


def logit_scale(clip: CLIPModel) -> torch.Tensor:
    """s, the factor that turns cosines into logits; a scalar."""
    return clip.logit_scale.exp()


def unit(features: torch.Tensor) -> torch.Tensor:
    """Features at unit length, in float32 at least so that a half-precision CLIP still ranks close classes."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


@contextmanager
def eager_attention(clip: CLIPModel) -> Iterator[None]:
    """Both towers' attention in its plain operations, whose weights can be seen."""
    before = clip.config._attn_implementation
    clip.set_attn_implementation("eager")
    try:
        yield
    finally:
        clip.set_attn_implementation(before)


def eos_positions(clip: CLIPModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Where each sentence ends, as CLIP itself finds it. input_ids (s, t) -> (s,).

    OpenAI's first configs carry `eos_token_id` 2 by mistake; for them CLIP takes the highest id, which is EOS. All
    others name it, and the first one counts because CLIP's tokenizer also pads with it.
    """
    eos_token_id = clip.config.text_config.eos_token_id
    ends = input_ids if eos_token_id == 2 else (input_ids == eos_token_id).int()
    return ends.argmax(dim=-1)


def trim(clip: CLIPModel, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Drops what no EOS can see: input_ids (s, t) -> ids (s, longest), EOS positions (s,). Exact by causality."""
    eos = eos_positions(clip, input_ids)
    return input_ids[:, : int(eos.max()) + 1], eos


def after_bos(hidden: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Replaces tokens 1..n by prompts: hidden (s, t, d_t), prompts (n, d_t) or (s, n, d_t) -> (s, t, d_t)."""
    prompts = _per_sample(hidden, prompts)
    return torch.cat([hidden[:, :1], prompts, hidden[:, 1 + prompts.shape[1] :]], dim=1)


def at_end(hidden: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Replaces the last n tokens by prompts: hidden (b, p+n, d_v), prompts (n, d_v) or (b, n, d_v) -> (b, p+n, d_v)."""
    prompts = _per_sample(hidden, prompts)
    return torch.cat([hidden[:, : -prompts.shape[1]], prompts], dim=1)


def encode_text(
    clip: CLIPModel,
    embeddings: torch.Tensor,
    eos: torch.Tensor,
    deep_prompts: Sequence[torch.Tensor] = (),
    packing: Packing | None = None,
) -> torch.Tensor:
    """T: token embeddings without positions (s, t, d_t), EOS positions (s,) -> joint features (s, d), not normalised.

    `deep_prompts[i]`, (n, d_t), replaces tokens 1..n before layer i + 1; layer 0 takes what `embeddings` already holds.
    `packing` says which leading tokens the sentences have in common, the deep prompts among them; without one, each
    sentence is computed by itself.
    """
    text = clip.text_model
    embeddings = embeddings.to(token_embeddings(clip).dtype)
    attention = text.config._attn_implementation
    if packing is None or attention not in ("sdpa", "eager"):  # others, such as flash attention, take no masks
        rows, ends = torch.arange(embeddings.shape[0], device=embeddings.device), eos
        hidden = text.embeddings(inputs_embeds=embeddings)  # (s, t, d_t)
        mask = create_causal_mask(config=text.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
    else:
        rows, ends = packing.row, packing.place
        embeddings = embeddings[packing.sentence, packing.position]  # (r, l, d_t)
        hidden = text.embeddings(inputs_embeds=embeddings, position_ids=packing.position)  # (r, l, d_t)
        mask = packing.mask
        if attention == "eager":
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
    for i, layer in enumerate(text.encoder.layers):
        if 0 < i <= len(deep_prompts):
            hidden = after_bos(hidden, deep_prompts[i - 1])
        hidden = layer(hidden, mask, is_causal=True)
    return clip.text_projection(text.final_layer_norm(hidden[rows, ends]))  # (s, d)


def chunk_tokens(clip: CLIPModel) -> int:
    """Own tokens of the sentences whose activations a training step holds at a time, where nobody says how many.

    On a GPU as many as take an eighth of its memory, since what does not fit is computed twice; elsewhere few. It does
    not depend on what is free just now, so a run that is repeated or resumed sums in the same order.
    """
    if clip.device.type != "cuda":
        return CHUNK_TOKENS
    text = clip.config.text_config
    kept = 18 * text.hidden_size * text.num_hidden_layers * clip.dtype.itemsize  # a token's bytes, as measured
    return max(CHUNK_TOKENS, torch.cuda.get_device_properties(clip.device).total_memory // 8 // kept)


def encode_tokens(
    clip: CLIPModel, input_ids: torch.Tensor, eos: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """CLIP's own text features: ids (s, t), EOS positions (s,) -> (s, d), `chunk` at once."""
    embed, shared = clip.text_model.embeddings.token_embedding, common_length(input_ids, eos)

    def encode(part: slice) -> torch.Tensor:
        packing = pack(eos[part], shared, clip.config.text_config.max_position_embeddings)
        return encode_text(clip, embed(input_ids[part]), eos[part], packing=packing)

    return in_chunks(encode, chunks(eos, shared, chunk, chunk_tokens(clip)), text_parameters(clip))


def vision_tokens(
    clip: CLIPModel,
    pixel_values: torch.Tensor,
    prompts: Sequence[torch.Tensor] = (),
    interpolate_pos_encoding: bool = False,
) -> torch.Tensor:
    """The vision tower's last hidden states: pixel_values (b, 3, h, w) -> (b, p + n, d_v), before `post_layernorm`.

    `prompts[0]`, (n, d_v) or (b, n, d_v), is appended after the patches; `prompts[i]` replaces it before layer i.
    Raises ValueError if the picture's size is not the model's.
    """
    vision = clip.vision_model
    size = vision.config.image_size
    if not interpolate_pos_encoding and tuple(pixel_values.shape[-2:]) != (size, size):
        height, width = pixel_values.shape[-2:]
        raise ValueError(
            f"`pixel_values` holds pictures of {height}x{width} pixels but this CLIP takes {size}x{size}; resize them "
            "with the model's own image processor or pass interpolate_pos_encoding=True."
        )
    hidden = vision.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)  # (b, p, d_v)
    if len(prompts):
        hidden = torch.cat([hidden, _per_sample(hidden, prompts[0])], dim=1)  # (b, p + n, d_v)
    hidden = vision.pre_layrnorm(hidden)
    for i, layer in enumerate(vision.encoder.layers):
        if 0 < i < len(prompts):
            hidden = at_end(hidden, prompts[i])
        hidden = layer(hidden, None)
    return hidden


def cls_attention(clip: CLIPModel, see: Callable[[], object], layer: int = -1) -> torch.Tensor:
    """What the CLS token looks at in a layer of the vision tower while `see()` runs it: (b, heads, p + n), sums of 1.

    Where the tower runs more than once, the last time counts.
    """
    seen = []
    attention = clip.vision_model.encoder.layers[layer].self_attn
    hook = attention.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))  # (b, heads, p, p)
    try:
        with eager_attention(clip):
            see()
    finally:
        hook.remove()
    return seen[-1][:, :, 0]


def pool_image(clip: CLIPModel, hidden: torch.Tensor) -> torch.Tensor:
    """The picture's own feature: hidden states (b, p + n, d_v) -> (b, d), not normalised."""
    return clip.visual_projection(clip.vision_model.post_layernorm(hidden[:, 0]))


def project_image(clip: CLIPModel, hidden: torch.Tensor) -> torch.Tensor:
    """All tokens in the joint space, without `post_layernorm`: (b, p + n, d_v) -> (b, p + n, d)."""
    return clip.visual_projection(hidden)


def encode_image(
    clip: CLIPModel, pixel_values: torch.Tensor, prompts: Sequence[torch.Tensor] = (), **kwargs: Any
) -> torch.Tensor:
    """V: pixel_values (b, 3, h, w) and prompts as in `vision_tokens` -> joint features (b, d), not normalised."""
    return pool_image(clip, vision_tokens(clip, pixel_values, prompts, **kwargs))


def _per_sample(hidden: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    # Adapter weights stay in float32 on a half-precision CLIP; prompts take the tower's dtype where they enter it.
    return prompts.to(hidden.dtype).expand(hidden.shape[0], -1, -1)  # not len, which an exporter takes as fixed
