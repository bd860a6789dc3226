"""From class names to token ids: the class sentences and every check on them."""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from .config import check_class_names

PLACEHOLDER = "X"


@lru_cache(maxsize=8)
def _load_tokenizer(name_or_path: str, revision: str | None) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(name_or_path, **({"revision": revision} if revision else {}))


def load_tokenizer(
    clip: CLIPModel, name_or_path: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The named tokenizer, or the base model's own. Raises ValueError if there is none or it does not fit the model."""
    name = name_or_path or clip.name_or_path
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
    vocabulary = clip.config.text_config.vocab_size
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"`tokenizer_name_or_path`={name!r} has {len(tokenizer)} tokens but the text tower knows {vocabulary}; use "
            "the tokenizer that the base model was trained with."
        )
    return tokenizer


def tokenize(
    tokenizer: PreTrainedTokenizerBase, sentences: list[str], clip: CLIPModel, names: list[str] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sentences with BOS and EOS -> ids (s, longest), EOS positions (s,), on the model's device.

    Raises ValueError for a sentence beyond the context, naming the class in `names` that it belongs to.
    """
    rows = tokenizer(sentences)["input_ids"]
    context = clip.config.text_config.max_position_embeddings
    for i, row in enumerate(rows):
        if len(row) > context:
            culprit = f"the class name {names[i]!r}" if names else repr(sentences[i])
            raise ValueError(
                f"{culprit} makes a sentence of {len(row)} tokens but the text tower's context holds {context}; "
                "shorten it, or use fewer learned tokens."
            )
    eos = torch.tensor([len(row) - 1 for row in rows])
    # What follows EOS is never seen; any id does.
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=rows[0][-1]
    )
    return ids.to(clip.device), eos.to(clip.device)


def words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text without BOS and EOS."""
    return tokenizer(text)["input_ids"][1:-1]


def class_sentences(class_names: list[str], initial_text: str | None, prompt_length: int) -> list[str]:
    """ "{initial_text} {name}." for every class; without initial text one placeholder for each learned token."""
    check_class_names(class_names)
    start = " ".join([PLACEHOLDER] * prompt_length) if initial_text is None else initial_text
    return [f"{start} {name}." for name in class_names]


def initial_prompts(
    tokenizer: PreTrainedTokenizerBase, clip: CLIPModel, initial_text: str | None, prompt_length: int
) -> torch.Tensor:
    """Where learned tokens start: E of the text's first `prompt_length` tokens, or N(0, 0.02). -> (n, d_t) float32."""
    width = clip.config.text_config.hidden_size
    if initial_text is None:
        return torch.empty(prompt_length, width, device=clip.device).normal_(std=0.02)
    ids = words(tokenizer, initial_text)
    if len(ids) < prompt_length:
        raise ValueError(
            f"`initial_text`={initial_text!r} has {len(ids)} tokens but `prompt_length`={prompt_length} are to start "
            "from it; use a longer text, fewer tokens, or initial_text=None."
        )
    embedding = clip.text_model.embeddings.token_embedding
    with torch.no_grad():
        return embedding(torch.tensor(ids[:prompt_length], device=clip.device)).float().clone()
