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


def test_a_sentence_ends_where_it_would_alone_whatever_it_is_padded_with(clip_folders, load_clip):
    encoder, tokenizer = (
        encoder_of(load_clip("chinese_clip")),
        AutoTokenizer.from_pretrained(clip_folders["chinese_clip"]),
    )
    tokenizer.pad_token = "circle"  # and the tower looks for its own padding
    sentences = ["a cat.", "a photo of a cat."]
    alone = [int(tokenize(tokenizer, [sentence], encoder)[1]) for sentence in sentences]
    assert tokenize(tokenizer, sentences, encoder)[1].tolist() == alone
    assert alone[0] < alone[1]


def test_a_tokenizer_that_neither_ends_sentences_nor_pads_is_refused_by_the_field(clip_folders, load_clip):
    encoder, own = encoder_of(load_clip("siglip")), AutoTokenizer.from_pretrained(clip_folders["siglip"])

    class Bare:
        eos_token = sep_token = pad_token = pad_token_id = None
        eos_token_id = own.eos_token_id

        def __call__(self, texts, **kwargs):
            return {"input_ids": [ids[:-1] for ids in own(texts)["input_ids"]]}

    with pytest.raises(ValueError, match=r"`tokenizer_name_or_path`: .* does not end with the text tower's EOS"):
        tokenize(Bare(), ["a cat.", "a photo of a cat."], encoder)


@pytest.mark.parametrize("shape", ["siglip", "chinese_clip"])
def test_a_tower_that_knows_words_from_padding_by_the_token_refuses_it_in_a_name(shape, clip_folders, load_clip):
    encoder, tokenizer = encoder_of(load_clip(shape)), AutoTokenizer.from_pretrained(clip_folders[shape])
    with pytest.raises(ValueError, match="which ends a sentence; leave it out"):
        tokenize(tokenizer, [f"a photo of a {tokenizer.pad_token}"], encoder)
