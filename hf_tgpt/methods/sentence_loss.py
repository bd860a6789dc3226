"""How well prompts spell a sentence: cross entropy over a vocabulary, without ever storing all scores."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Rows and words that are scored at once: 25 MB in float32, most of which fits in a CPU's cache. That is CLIP's whole
# vocabulary; MetaCLIP 2's is 18 times as large.
ROWS, WORDS = 128, 49_408


@torch.compiler.disable  # how many prompts have a target is known only as it runs
def sentence_loss(
    prompts: torch.Tensor,
    ids: torch.Tensor,
    ends: torch.Tensor,
    vocabulary: torch.Tensor,
    label_smoothing: float = 0.0,
    tokens_per_image: torch.Tensor | None = None,
    prefix: int = 1,
) -> torch.Tensor:
    """How well prompts (b, n, d) spell sentences ids (b, t) that end at `ends` (b,), in words (v, d) -> a scalar.

    Prompt i is trained to be token i of its sentence after the `prefix`, BOS. EOS is a target, padding is not; a
    sentence longer than the prompt is cut. The mean is over tokens. If these are a part of a batch, the mean of all
    parts' losses equals the whole batch's loss if each part receives the whole batch's `tokens_per_image`
    (`target_tokens`).
    """
    length = min(prompts.shape[1], ids.shape[1] - prefix)
    targets = ids[:, prefix : prefix + length]  # (b, length)
    has_target = torch.arange(prefix, prefix + length, device=ids.device) <= ends[:, None]  # (b, length)
    loss = word_loss(prompts[:, :length][has_target], targets[has_target], vocabulary, label_smoothing)
    return loss if tokens_per_image is None else loss * (has_target.sum() / len(ids) / tokens_per_image)


def target_tokens(ends: torch.Tensor, prompt_length: int, prefix: int = 1) -> torch.Tensor:
    """The mean number of target tokens for prompts of a length, from sentences that end at `ends` (b,): a scalar."""
    return (ends + 1 - prefix).clamp(max=prompt_length).float().mean()


def check_captions(ids: torch.Tensor, ends: torch.Tensor, eos: torch.Tensor, count: int) -> None:
    """Raises ValueError unless ids (b, t) are `count` sentences with the token `eos` at `ends` (b,)."""
    if len(ids) != count:
        raise ValueError(f"`caption_ids` has {len(ids)} sentences for {count} pictures; pass one for each.")
    if int((ids.gather(1, ends[:, None]) == eos).logical_not().sum()):
        raise ValueError("`caption_ids` has a sentence without EOS; tokenise with special tokens and truncation=True.")


def word_loss(
    prompts: torch.Tensor, targets: torch.Tensor, vocabulary: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """`F.cross_entropy(prompts @ vocabulary.T, targets, label_smoothing=...)`: (m, d), (m,), (v, d) -> a scalar.

    Exact, in another order: with scores s, target t and smoothing e the loss of a row is logsumexp(s) - (1 - e) s_t - e
    mean(s), and since scores are linear, s_t and mean(s) are each the score of a single row.
    """
    spread = _log_sum_exp(prompts, vocabulary)  # (m,)
    wanted = torch.lerp(vocabulary[targets].to(prompts), vocabulary.mean(0).to(prompts), label_smoothing)  # (m, d)
    return (spread - (prompts * wanted).sum(-1)).mean()


def _log_sum_exp(prompts: torch.Tensor, vocabulary: torch.Tensor) -> torch.Tensor:
    """log sum exp(prompts @ vocabulary.T): (m, d), (v, d) -> (m,)."""
    if vocabulary.requires_grad:
        return (prompts.to(vocabulary.dtype) @ vocabulary.T).to(prompts.dtype).logsumexp(-1)
    return _LogSumExp.apply(prompts, vocabulary)


class _LogSumExp(torch.autograd.Function):
    """The gradient, softmax(scores) @ vocabulary, is computed while the scores are available.

    With a vocabulary of several blocks, the sums so far are scaled down whenever a block has a higher score.
    """

    @staticmethod
    def forward(ctx: Any, prompts: torch.Tensor, vocabulary: torch.Tensor) -> torch.Tensor:
        values, gradients = [], []
        for rows in prompts.split(ROWS):
            most, total = rows.new_full((len(rows), 1), float("-inf")), rows.new_zeros(len(rows), 1)
            gradient = torch.zeros_like(rows)
            for words in vocabulary.split(WORDS):
                scores = (rows.to(words.dtype) @ words.T).to(prompts.dtype)  # (rows, words)
                before, most = most, torch.maximum(most, scores.amax(-1, keepdim=True))
                weights, kept = scores.sub_(most).exp_(), (before - most).exp()
                total = total * kept + weights.sum(-1, keepdim=True)
                if ctx.needs_input_grad[0]:
                    gradient = gradient * kept + (weights.to(words.dtype) @ words).to(prompts.dtype)
            values.append(most + total.log())
            if ctx.needs_input_grad[0]:
                gradients.append(gradient / total)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient[:, None] * ctx.saved_tensors[0], None
