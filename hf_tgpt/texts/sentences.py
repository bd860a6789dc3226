"""From class names to token ids: the class sentences and every check on them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..encoders import DualEncoder
from ..utils.names import check_class_names, composed

PLACEHOLDER = "X"
# The default `hypothesis_template` of transformers' zero-shot-image-classification pipeline.
PIPELINE_SENTENCE = "This is a photo of {}."
Sentences = tuple[torch.Tensor, torch.Tensor]  # token ids (s, t), and where each sentence ends (s,)


@lru_cache(maxsize=8)
def _load_tokenizer(name_or_path: str, revision: str | None) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(name_or_path, **({"revision": revision} if revision else {}))


def load_tokenizer(
    encoder: DualEncoder, name_or_path: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The named tokenizer, or the base model's own. Raises ValueError if there is none or it does not fit the model."""
    name = name_or_path or encoder.model.name_or_path
    if not name:
        raise ValueError(
            f"`tokenizer_name_or_path`={name_or_path!r} and the base model was not loaded from a name or folder; pass "
            "the tokenizer's Hub id or folder."
        )
    try:
        tokenizer = _load_tokenizer(name, None if name_or_path else revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`tokenizer_name_or_path`={name!r}: no tokenizer could be loaded from it ({error})."
        ) from error
    vocabulary = encoder.shape()["vocabulary"]
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"`tokenizer_name_or_path`={name!r} has {len(tokenizer)} tokens but the text tower has {vocabulary}; use "
            "the tokenizer that the base model was trained with."
        )
    if 2 * len(tokenizer) < vocabulary:  # a few more words than tokens only pad the matrix
        raise ValueError(
            f"`tokenizer_name_or_path`={name!r} has {len(tokenizer)} tokens and the text tower has {vocabulary}, so "
            "it is another model's; use the tokenizer that the base model was trained with."
        )
    row, words = tokenizer(PLACEHOLDER)["input_ids"], word_ids(tokenizer, PLACEHOLDER)
    if encoder.takes_prompts and words and row[encoder.prefix : encoder.prefix + len(words)] != words:
        raise ValueError(
            f"`tokenizer_name_or_path`={name!r} turns {PLACEHOLDER!r} into {row}, but the text tower expects "
            f"{encoder.prefix} token(s) before the words; use the tokenizer that the base model was trained with."
        )
    return tokenizer


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    encoder: DualEncoder,
    names: Sequence[str] | None = None,
    extra: int = 0,
    truncate: bool = False,
) -> Sentences:
    """Sentences with the tokenizer's special tokens -> ids (s, longest) and ends (s,), on the model's device.

    For a text tower that reads padding too, ids (s, context).

    Raises ValueError, naming the class in `names`, for a sentence that with `extra` more tokens exceeds the context,
    unless `truncate` cuts it; for one that contains the token that ends sentences; for two classes whose sentences have
    the same tokens; and for a tokenizer that does not suit the model. Warns of a name that the tokenizer does not know.
    """
    context = encoder.shape()["context_length"]
    rows = tokenizer([composed(sentence) for sentence in sentences], verbose=not truncate)["input_ids"]
    if truncate:  # not with the tokenizer, which would keep the setting for later calls, in other threads too
        rows = [row if len(row) <= context else [*row[: context - 1], row[-1]] for row in rows]
    # Under a causal mask padding is a token like any other: some CLIPs pad with "!", which a name may contain.
    closing = (tokenizer.eos_token, *(() if encoder.causal else (tokenizer.sep_token, tokenizer.pad_token)))
    whole = _end_with_eos(tokenizer, rows, encoder)
    for i, row in enumerate(rows):
        culprit = f"the class name {names[i]!r}" if names else repr(sentences[i])
        for token in filter(None, closing):
            if token in sentences[i]:
                raise ValueError(f"{culprit} contains {token!r}, which ends a sentence; leave it out.")
        if not whole[i]:
            raise ValueError(
                f"`tokenizer_name_or_path`: the tokenizer turns {sentences[i]!r} into {row}, which does not end with "
                "the text tower's EOS token; use the tokenizer that the base model was trained with."
            )
        if len(row) + extra > context:
            raise ValueError(
                f"{culprit} makes a sentence of {len(row) + extra} tokens but the text tower's context holds {context};"
                " shorten it, or use fewer learned tokens."
            )
    if names:
        _check_tokens(tokenizer, names, [row[encoder.prefix : -1] for row in rows])
    # Under a causal mask no token attends to what follows EOS; any id will do.
    padding = rows[0][-1] if encoder.causal else tokenizer.pad_token_id
    length = context if encoder.fills_context else max(map(len, rows))
    device = encoder.model.device
    ids = torch.tensor([row + [padding] * (length - len(row)) for row in rows], device=device)
    return ids, torch.tensor([len(row) - 1 for row in rows], device=device)


def _end_with_eos(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], encoder: DualEncoder) -> list[bool]:
    """Whether each row of ids ends for the text tower at its last token; rows of one length together, unpadded."""
    whole = [False] * len(rows)
    for length in {len(row) for row in rows if len(row) > encoder.prefix}:
        alike = [i for i, row in enumerate(rows) if len(row) == length]
        ends = encoder.ends(torch.tensor([rows[i] for i in alike]), tokenizer.eos_token_id)
        for i, end in zip(alike, ends.tolist(), strict=True):
            whole[i] = end == length - 1
    return whole


def _check_tokens(tokenizer: PreTrainedTokenizerBase, names: Sequence[str], rows: list[list[int]]) -> None:
    """Raises ValueError for two classes with the same known tokens between BOS and EOS; warns if words are unknown.

    Classes that a tokenizer does not know have the same tokens, but pictures may still tell them apart.
    """
    first: dict[tuple[int, ...], str] = {}
    alike: list[str] = []
    for name, row in zip(names, rows, strict=True):
        other = first.setdefault(tuple(row), name)
        if other != name and tokenizer.unk_token_id in row:
            alike = alike or [other, name]
        elif other != name:
            raise ValueError(
                f"`class_names` has {other!r} and {name!r}, which are the same tokens for the base model's tokenizer "
                f"({' '.join(tokenizer.convert_ids_to_tokens(row))}) and cannot be told apart by text; rename one, or "
                "choose a base model that knows the language."
            )
    if alike:
        warnings.warn(
            f"The base model's tokenizer does not know the class names {alike[0]!r} and {alike[1]!r} and makes the "
            "same tokens of both, so only pictures tell them apart; rename one, or choose a base model that knows the "
            "language.",
            stacklevel=2,
        )
    unknown = tokenizer.unk_token_id
    for name, row in zip(names, rows, strict=True):
        if unknown in row and not tokenizer.decode([i for i in word_ids(tokenizer, name) if i != unknown]).strip():
            warnings.warn(
                f"The base model's tokenizer does not know the class name {name!r} and turns it into "
                f"{tokenizer.unk_token}; rename it, or choose a base model that knows the language.",
                stacklevel=2,
            )


def word_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text without BOS and EOS."""
    return tokenizer(composed(text), add_special_tokens=False)["input_ids"]


def class_template(initial_text: str) -> str:
    """The class sentence with {} for the name: the initial text if it contains {}, else '{initial_text} {}.'."""
    return initial_text if "{}" in initial_text else initial_text + " {}."


def words_before(initial_text: str) -> str:
    """The words of the class sentence before the name, which initialise the learned tokens."""
    before, place, _ = initial_text.partition("{}")
    return before.rstrip() if place else before


def full_stop(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The id of a full stop after a word (alone it may be another token); none if the tokenizer drops it."""
    ids = word_ids(tokenizer, f"{PLACEHOLDER}.")
    return [] if ids == word_ids(tokenizer, PLACEHOLDER) else ids[-1:]


def class_sentences(
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    initial_text: str | None,
    prompt_length: int,
    encoder: DualEncoder,
) -> Sentences:
    """Every class's sentence, from `class_template` -> ids (c, longest), ends (c,).

    Without initial text, `prompt_length` placeholder tokens replace it. Raises ValueError for names that are empty,
    repeated or too long, and if the first `prompt_length` tokens are not tokens of the words before the name.
    """
    check_class_names(names)
    context = encoder.shape()["context_length"]
    room = context - encoder.prefix - 3  # one token of a name, full stop, EOS
    if prompt_length > room:
        raise ValueError(
            f"`prompt_length`={prompt_length}: the text tower's context of {context} leaves room for {room}."
        )
    if initial_text is not None:
        template = class_template(initial_text)
        ids, ends = tokenize(tokenizer, [template.replace("{}", name) for name in names], encoder, names)
        _check_place(tokenizer, initial_text, prompt_length, names, ids[:, encoder.prefix :].tolist())
        return ids, ends
    ids, ends = tokenize(tokenizer, [f"{name}." for name in names], encoder, names, prompt_length)
    # By id: a tokenizer may split a placeholder's letter into several tokens.
    placeholder = ids.new_tensor(word_ids(tokenizer, PLACEHOLDER)[:1]).expand(len(ids), prompt_length)
    before, after = ids[:, : encoder.prefix], ids[:, encoder.prefix :]
    longer = torch.cat([before, placeholder, after], dim=1)  # (c, t + n); only padding exceeds the context
    return longer[:, :context], ends + prompt_length


def _check_place(
    tokenizer: PreTrainedTokenizerBase,
    initial_text: str,
    prompt_length: int,
    names: Sequence[str],
    rows: list[list[int]],
) -> None:
    """Raises ValueError if learned tokens would replace a part of the name, in sentences after BOS."""
    words = word_ids(tokenizer, words_before(initial_text))[:prompt_length]
    for name, row in zip(names, rows, strict=True):
        if row[: len(words)] != words:
            raise ValueError(
                f"`initial_text`={initial_text!r}: the tokenizer merges words before {{}} and the class name {name!r} "
                "into one token, so learned tokens would replace both; put a space before {}, or use fewer learned "
                "tokens."
            )


def initial_prompts(
    tokenizer: PreTrainedTokenizerBase, encoder: DualEncoder, initial_text: str | None, prompt_length: int
) -> torch.Tensor:
    """Initial learned tokens: E of the first `prompt_length` words before the name, or N(0, 0.02). -> (n, d_t)."""
    device = encoder.model.device
    if initial_text is None:
        return torch.empty(prompt_length, encoder.shape()["text_width"], device=device).normal_(std=0.02)
    ids = word_ids(tokenizer, words_before(initial_text))
    if len(ids) < prompt_length:
        before = " before {}" if "{}" in initial_text else ""
        raise ValueError(
            f"`initial_text`={initial_text!r} has {len(ids)} tokens{before} but `prompt_length`={prompt_length} must "
            "start from it; use a longer text, fewer tokens, or initial_text=None."
        )
    return encoder.words()[torch.tensor(ids[:prompt_length], device=device)].detach().float()
