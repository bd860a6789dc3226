"""Descriptions for TGP-T from tiny random models of real architectures, by the command that a user runs."""

import json

import pytest
import torch
from conftest import Failed, ImageProcessor
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from hf_tgpt.data import attach_captions, load_splits

WORDS = ["describe", "the", "in", "this", "image", "one", "sentence", ".", "ant", "big", "cat", "a", "red", "thing"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} :"
)


def make_blip(folder):
    """A captioning model: it goes on from a text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"))
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=len(tokenizer), bos_token_id=5, pad_token_id=0, eos_token_id=3, sep_token_id=3)
    config = BlipConfig(
        text_config=size | text | dict(encoder_hidden_size=16, max_position_embeddings=32),
        vision_config=size | dict(image_size=16, patch_size=8),
    )
    model = BlipForConditionalGeneration(config)
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)


def make_llava(folder):
    """A model that chats about pictures: one decoder, which repeats what it was given."""
    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>", ":"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=16, patch_size=8),
        text_config=LlamaConfig(
            **size,
            vocab_size=len(tokenizer),
            max_position_embeddings=64,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    crop = {"height": 16, "width": 16}
    images = ImageProcessor(size={"shortest_edge": 16}, crop_size=crop)
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


@pytest.fixture(scope="module", params=[make_blip, make_llava], ids=["blip", "llava"])
def model(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "model"
    request.param(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    for split, shade in (("train", 0), ("test", 100)):
        for name in ("ant", "big_cat"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (20 + i, 16), (shade + 40 * i, 0, 0)).save(folder / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def describe(run_command):
    """describe(*arguments) runs `hf-tgpt describe` in this process and returns what it printed."""
    return lambda *arguments: run_command("describe", *arguments, "--max_new_tokens", "4")


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_training_image_gets_a_description_that_load_splits_reads(describe, model, pictures):
    out = pictures / "captions.jsonl"
    assert "6 descriptions in" in describe("--model", model, "--dataset", pictures, "--output", out, "--batch_size", 4)
    written = lines(out)
    assert [line["file_name"] for line in written] == [
        f"train/{c}/{i}.png" for c in ("ant", "big_cat") for i in (0, 1, 2)
    ]
    assert [line["class"] for line in written] == ["ant"] * 3 + ["big cat"] * 3
    assert not any("describe" in line["caption"] for line in written)  # the answer, not the question
    splits = load_splits(pictures)
    assert splits["train"]["caption"][:] == [line["caption"] for line in written]
    assert splits["test"].column_names == ["image", "label"]


def test_an_interrupted_run_goes_on_where_it_was(describe, model, pictures, tmp_path):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    describe("--model", model, "--dataset", pictures, "--output", whole)
    text = whole.read_text().splitlines(keepends=True)
    marked = text[0].replace('"caption": "', '"caption": "kept ')
    part.with_name("again.jsonl.part").write_text(marked + text[1] + text[2][:20])
    assert "6 images, 2 of them already described" in describe(
        "--model", model, "--dataset", pictures, "--output", part
    )
    assert part.read_text().splitlines(keepends=True) == [marked, *text[1:]]
    assert not part.with_name("again.jsonl.part").exists()
    assert "6 images, 6 of them" in describe("--model", model, "--dataset", pictures, "--output", part)
    with pytest.raises(Failed, match=r"was written by .*; choose another file"):
        describe("--model", "other/model", "--dataset", pictures, "--output", part)
    assert not part.with_name("again.jsonl.part").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"notes of mine", "line 1 is not JSON"),  # without an end of line, as a line that was cut off
        (b"\xff\xfe\n", "line 1 is not JSON"),
        (b'{"file_name": "a.png"}\n[]\n', "was written by None; choose another file"),
        (b"[]\n", "line 1 describes no image; choose another file"),
        (b'{"model": "m"}\n', "line 1 describes no image; choose another file"),
    ],
)
def test_a_file_that_is_something_else_is_named_and_stays(content, message, describe, pictures, tmp_path):
    out = tmp_path / "mine.txt"
    out.write_bytes(content)
    with pytest.raises(Failed, match=message):
        describe("--model", "m", "--dataset", pictures, "--output", out)
    assert out.read_bytes() == content
    assert not (tmp_path / "mine.txt.part").exists()
    with pytest.raises(SystemExit, match="2"):
        describe("--model", "m", "--dataset", pictures, "--output", out, "--batch_size", 0)


def test_only_the_drawn_images_are_described_and_found_again(describe, model, pictures, tmp_path):
    out = tmp_path / "few.jsonl"
    describe("--model", model, "--dataset", pictures, "--output", out, "--shots", 2, "--prompt", "a red thing")
    assert len(lines(out)) == 4
    train = load_splits(pictures)["train"]
    with pytest.warns(UserWarning, match="describes 4 of 6 images; the other 2 get"):
        captioned, word = attach_captions(train, out)
    assert word == "descriptions"
    assert sum(caption in {line["caption"] for line in lines(out)} for caption in captioned["caption"]) >= 4
