"""The methods as the released research codes compute them, plainly on a CLIPModel's own modules.

Ours are tested against them, and examples/benchmark.py measures them as its reference. They are also the shortest way
to read what a method is: sentences padded to the whole context, all classes at once, nothing shared, cut, chunked or
kept. Mutual prompt learning has no released code; here it follows its file in hf_tgpt/methods, written in this way.

A reference takes a CLIP, an adapter's learner (for its weights), pixel_values (b, 3, h, w) and labels (b,). It gives
a dict with logits (b, c) and loss. Letters as in hf_tgpt/encoders/base.py, and c classes, n prompt tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from hf_tgpt.encoders import encoder_of

Answer = dict[str, Tensor | None]  # logits and loss


def read(clip: CLIPModel, words: Tensor, eos: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
    """T: embeddings (s, t, d_t), EOS positions (s,), prompts of deeper layers, each (n, d_t) -> (s, d)."""
    text, length = clip.text_model, words.shape[1]
    hidden = words + text.embeddings.position_embedding.weight[:length]
    mask = torch.ones(length, length, dtype=torch.bool, device=words.device).tril()[None, None]
    for i, layer in enumerate(text.encoder.layers):
        if 0 < i <= len(deep):
            prompts = deep[i - 1].expand(len(hidden), -1, -1)
            hidden = torch.cat([hidden[:, :1], prompts, hidden[:, 1 + prompts.shape[1] :]], dim=1)
        hidden = layer(hidden, mask)
    hidden = text.final_layer_norm(hidden)
    return clip.text_projection(hidden[torch.arange(len(hidden), device=eos.device), eos])


def look(clip: CLIPModel, pixel_values: Tensor, prompts: Sequence[Tensor] = ()) -> Tensor:
    """The vision tower with prompts, each (n, d_v) or (b, n, d_v): (b, 3, h, w) -> (b, p + n, d_v)."""
    vision = clip.vision_model
    hidden = vision.embeddings(pixel_values)
    tokens = hidden.shape[1]
    for i, layer in enumerate(vision.encoder.layers):
        if i < len(prompts):
            hidden = torch.cat([hidden[:, :tokens], prompts[i].expand(len(hidden), -1, -1)], dim=1)
        hidden = layer(vision.pre_layrnorm(hidden) if i == 0 else hidden, None)
    return hidden


def pool(clip: CLIPModel, hidden: Tensor) -> Tensor:
    return clip.visual_projection(clip.vision_model.post_layernorm(hidden[:, 0]))


def unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)


def embed(clip: CLIPModel, ids: Tensor) -> Tensor:
    """Token embeddings, padded to the whole context: ids (s, t) -> (s, 77, d_t)."""
    missing = clip.config.text_config.max_position_embeddings - ids.shape[1]
    return clip.text_model.embeddings.token_embedding(F.pad(ids, (0, missing)))


def class_texts(clip: CLIPModel, learner: Any, prompts: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
    """Unit features of all classes, (c, d), with prompts (n, d_t) in place of each sentence's first words."""
    words = embed(clip, learner.class_texts.ids)
    prompts = prompts.expand(len(words), -1, -1)
    words = torch.cat([words[:, :1], prompts, words[:, 1 + prompts.shape[1] :]], dim=1)
    return unit(read(clip, words, learner.class_texts.ends, deep))


def answer(logits: Tensor, labels: Tensor | None, more: Tensor | float = 0) -> Answer:
    return {"logits": logits, "loss": None if labels is None else F.cross_entropy(logits, labels) + more}


def coop(clip: CLIPModel, learner: Any, pixel_values: Tensor, labels: Tensor | None = None) -> Answer:
    features = unit(pool(clip, look(clip, pixel_values)))
    return answer(clip.logit_scale.exp() * features @ class_texts(clip, learner, learner.text_prompts).T, labels)


def maple(clip: CLIPModel, learner: Any, pixel_values: Tensor, labels: Tensor | None = None) -> Answer:
    first, *deep = learner.text_prompts
    visual = [couple(prompts) for couple, prompts in zip(learner.couplings, learner.text_prompts, strict=True)]
    features = unit(pool(clip, look(clip, pixel_values, visual)))
    return answer(clip.logit_scale.exp() * features @ class_texts(clip, learner, first, deep).T, labels)


def ivlp(clip: CLIPModel, learner: Any, pixel_values: Tensor, labels: Tensor | None = None) -> Answer:
    first, *deep = learner.text_prompts
    features = unit(pool(clip, look(clip, pixel_values, learner.vision_prompts)))
    return answer(clip.logit_scale.exp() * features @ class_texts(clip, learner, first, deep).T, labels)


def kgcoop(clip: CLIPModel, learner: Any, pixel_values: Tensor, labels: Tensor | None = None) -> Answer:
    features = unit(pool(clip, look(clip, pixel_values)))
    texts = class_texts(clip, learner, learner.text_prompts)
    anchors = learner.frozen_class_features(encoder_of(clip), learner.config.anchor_templates)  # once, as released
    distance = 1 - (texts * anchors).sum(-1).mean()
    return answer(clip.logit_scale.exp() * features @ texts.T, labels, learner.config.anchor_weight * distance)


def promptsrc(clip: CLIPModel, learner: Any, pixel_values: Tensor, labels: Tensor | None = None) -> Answer:
    config, (first, *deep) = learner.config, learner.text_prompts
    features = unit(pool(clip, look(clip, pixel_values, learner.vision_prompts)))
    texts = class_texts(clip, learner, first, deep)
    with torch.no_grad():
        plain = unit(pool(clip, look(clip, pixel_values)))
        teacher = learner.frozen_class_features(encoder_of(clip), config.teacher_templates, None, False)
        wanted = (clip.logit_scale.exp() * plain @ teacher.T).log_softmax(-1)
    logits = clip.logit_scale.exp() * features @ texts.T
    divergence = F.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True) / logits.numel()
    distances = config.text_loss_weight * F.l1_loss(texts, teacher) + config.image_loss_weight * F.l1_loss(
        features, plain
    )
    return answer(logits, labels, distances + config.logit_loss_weight * divergence)


def mmrl(clip: CLIPModel, learner: Any, pixel_values: Tensor, labels: Tensor | None = None) -> Answer:
    config, count = learner.config, len(learner.tokens)
    texts = embed(clip, learner.class_texts.ids) + clip.text_model.embeddings.position_embedding.weight
    texts = through(clip.text_model.encoder.layers, texts, learner.prompts("text"), causal=True)
    texts = clip.text_model.final_layer_norm(texts)[torch.arange(len(texts)), learner.class_texts.ends + count]
    texts = unit(clip.text_projection(texts))
    images = clip.vision_model.pre_layrnorm(clip.vision_model.embeddings(pixel_values))
    images = through(clip.vision_model.encoder.layers, images, learner.prompts("vision"))
    inserted = clip.vision_model.post_layernorm(images[:, 1 : 1 + count]).mean(1) @ learner.token_projection
    by_class_token, by_tokens = (unit(features) for features in (pool(clip, images), inserted))
    with torch.no_grad():
        plain = unit(pool(clip, look(clip, pixel_values)))
        own = learner.frozen_class_features(encoder_of(clip), config.templates)
    scale = clip.logit_scale.exp() if config.logit_scale is None else config.logit_scale
    answers = scale * by_class_token @ texts.T, scale * by_tokens @ texts.T
    logits = torch.lerp(answers[1], answers[0], config.alpha)
    if labels is None:
        return answer(logits, labels)
    by_class, by_token = (F.cross_entropy(each, labels) for each in answers)
    loss = torch.lerp(by_token, by_class, config.alpha)
    distances = 2 - (by_class_token * plain).sum(-1).mean() - (texts * own).sum(-1).mean()
    return {"logits": logits, "loss": loss + config.regularization_weight * distances}


def through(layers: Iterable[Any], hidden: Tensor, tokens: dict[int, Tensor], causal: bool = False) -> Tensor:
    """(b, t, d) -> (b, t + n, d), with tokens (n, d) behind the first one, inserted before a layer, then replaced."""
    there = 0
    for i, layer in enumerate(layers):
        if i in tokens:
            new = tokens[i].expand(len(hidden), -1, -1)
            hidden, there = torch.cat([hidden[:, :1], new, hidden[:, 1 + there :]], dim=1), new.shape[1]
        length = hidden.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()[None, None]
        hidden = layer(hidden, mask if causal else None)
    return hidden


def own_towers(clip: CLIPModel, learner: Any, pixel_values: Tensor, labels: Tensor | None = None) -> Answer:
    """LoRA and the first stage of 2SFS, whose weights are in the layers."""
    texts = unit(read(clip, embed(clip, learner.class_texts.ids), learner.class_texts.ends))
    return answer(clip.logit_scale.exp() * unit(pool(clip, look(clip, pixel_values))) @ texts.T, labels)


def cocoop(clip: CLIPModel, learner: Any, pixel_values: Tensor, labels: Tensor | None = None) -> Answer:
    features = unit(pool(clip, look(clip, pixel_values)))
    logits = []
    for image, shift in zip(features, learner.shift(features), strict=True):  # one image after the other, as released
        logits.append(clip.logit_scale.exp() * class_texts(clip, learner, learner.text_prompts + shift) @ image)
    return answer(torch.stack(logits), labels)


def mutual_prompt(clip: CLIPModel, learner: Any, pixel_values: Tensor, labels: Tensor | None = None) -> Answer:
    config = learner.config
    plain = unit(pool(clip, look(clip, pixel_values)))
    shifts = learner.decompose(plain).unflatten(-1, (config.prompt_length, -1))
    texts = torch.stack([class_texts(clip, learner, learner.text_prompts + shift) for shift in shifts])  # (b, c, d)
    cosines = torch.einsum("bd,bcd->bc", plain, texts)
    least = cosines.topk(min(config.top_k, cosines.shape[1])).values[:, -1:]
    relevant = (cosines >= least) & (cosines > 0)
    shares = (cosines / config.temperature).masked_fill(~relevant, torch.finfo(cosines.dtype).min).softmax(-1)
    description = torch.einsum("bc,bcd->bd", shares * relevant, texts)
    visual = learner.vision_prompts + learner.guide(description).unflatten(-1, learner.vision_prompts.shape)
    features = unit(pool(clip, look(clip, pixel_values, visual.unbind(1))))
    return answer(clip.logit_scale.exp() * torch.einsum("bd,bcd->bc", features, texts), labels)


def tgpt(
    clip: CLIPModel,
    learner: Any,
    pixel_values: Tensor,
    labels: Tensor | None = None,
    caption_ids: Tensor | None = None,
) -> Answer:
    hidden = look(clip, pixel_values)
    tokens = learner.image_to_text(clip.visual_projection(hidden))
    category = bond(learner.category_bonder, learner.category_queries, tokens)
    content = bond(learner.content_bonder, learner.content_queries, tokens)
    frame = embed(clip, learner.frame_ids)  # BOS, full stop, EOS and padding

    def sentence(prompts: Tensor) -> Tensor:
        before, after = (part.expand(len(prompts), -1, -1) for part in (frame[:, :1], frame[:, 1 : -prompts.shape[1]]))
        eos = torch.full((len(prompts),), prompts.shape[1] + 2, device=prompts.device)
        return read(clip, torch.cat([before, prompts, after], dim=1), eos)

    def sentence_loss(prompts: Tensor, ids: Tensor, eos: Tensor) -> Tensor:
        length = prompts.shape[1]
        ids = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) > eos[:, None], -100)[:, 1 : 1 + length]
        scores = prompts @ clip.text_model.embeddings.token_embedding.weight.T  # (b, n, v)
        targets = F.pad(ids, (0, length - ids.shape[1]), value=-100)
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), label_smoothing=learner.config.label_smoothing)

    features = unit(torch.cat([pool(clip, hidden), (sentence(category) + sentence(content)) / 2], dim=-1))
    logits = 100 * features @ learner.head.T
    if labels is None or caption_ids is None:
        return answer(logits, labels)
    end = caption_ids == learner.frame_ids[0, -1]
    more = sentence_loss(category, learner.category_ids[labels], learner.category_ends[labels])
    return answer(logits, labels, more + sentence_loss(content, caption_ids, end.int().argmax(-1)))


def bond(bonder: Any, queries: Tensor, tokens: Tensor) -> Tensor:
    """TGP-T's Bonder for each image by itself: queries (1, n, d), tokens (b, p, d) -> (b, n, d)."""
    queries = queries.expand(len(tokens), -1, -1)
    asked, keys, values = bonder.self_qkv(bonder.norm_self(queries)).unflatten(-1, (3, 8, -1)).permute(2, 0, 3, 1, 4)
    scale = asked.shape[-1] ** -0.5
    mixed = (asked @ keys.mT * scale).softmax(-1) @ values
    queries = queries + bonder.self_out(mixed.transpose(1, 2).flatten(2))
    keys = bonder.norm_image(tokens)
    mixed = (bonder.cross_query(bonder.norm_query(queries)) @ keys.mT * scale).softmax(-1) @ keys
    queries = queries + bonder.cross_out(mixed)
    return queries + bonder.mlp(bonder.norm_mlp(queries))


PLAIN: dict[str, Callable[..., Answer]] = {
    "coop": coop, "maple": maple, "ivlp": ivlp, "cocoop": cocoop, "mutual_prompt": mutual_prompt, "tgpt": tgpt,
    "kgcoop": kgcoop, "promptsrc": promptsrc, "mmrl": mmrl, "lora": own_towers, "two_stage": own_towers,
}  # fmt: skip
