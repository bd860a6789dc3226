"""Sentences become tokens as the model's own tokenizer makes them."""

import pytest
import torch
from transformers import AutoTokenizer

from hf_tgpt.encoders import encoder_of
from hf_tgpt.texts.sentences import tokenize


def test_a_name_may_hold_what_a_causal_tower_is_padded_with(clip_folders, load_clip):
    """As "!", with which some CLIPs' tokenizers pad and which is a token like others."""
    encoder, tokenizer = encoder_of(load_clip()), AutoTokenizer.from_pretrained(clip_folders["plain"])
    expected = tokenize(tokenizer, ["a photo of a cat."], encoder)
    tokenizer.pad_token = "cat"
    for ours, theirs in zip(tokenize(tokenizer, ["a photo of a cat."], encoder), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", ["siglip", "chinese_clip"])
def test_a_tower_that_knows_words_from_padding_by_the_token_refuses_it_in_a_name(shape, clip_folders, load_clip):
    encoder, tokenizer = encoder_of(load_clip(shape)), AutoTokenizer.from_pretrained(clip_folders[shape])
    with pytest.raises(ValueError, match="which ends a sentence; leave it out"):
        tokenize(tokenizer, [f"a photo of a {tokenizer.pad_token}"], encoder)
