"""Tiny random models of kinds that are known by their features alone, with a tokenizer and an image processor."""

import torch
import transformers
from conftest import chinese_tokenizer, siglip_tokenizer
from PIL import Image

from hf_tgpt.utils.compat import pil_image_processor

TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SQUARE = {"height": 32, "width": 32}


def bert(tokenizer, **fields):
    return TOWER | dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id) | fields


def align(tokenizer):
    blocks = dict(
        in_channels=[32, 16], out_channels=[16, 32], kernel_sizes=[3, 3], strides=[1, 2], expand_ratios=[1, 2]
    )
    vision = blocks | dict(image_size=32, depth_divisor=8, num_block_repeats=[1, 1], hidden_dim=32,
                           squeeze_expansion_ratio=0.25, width_coefficient=1.0, depth_coefficient=1.0)  # fmt: skip
    text = bert(tokenizer, max_position_embeddings=40)
    config = transformers.AlignConfig(
        text_config=text, vision_config=vision, projection_dim=32, temperature_init_value=0.2
    )
    # As Kakao's checkpoint has it: both sides resized, the centre cropped, values in -1..1 by an offset.
    processor = pil_image_processor("EfficientNetImageProcessor")(
        size={"height": 40, "width": 40}, crop_size=SQUARE, do_center_crop=True, rescale_factor=1 / 127.5,
        rescale_offset=True, do_normalize=False, include_top=False, resample=Image.Resampling.BILINEAR,
    )  # fmt: skip
    return transformers.AlignModel(config), processor


def altclip(tokenizer):
    text = bert(tokenizer, max_position_embeddings=42, project_dim=24)
    vision = TOWER | dict(image_size=32, patch_size=8, projection_dim=24)
    config = transformers.AltCLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return transformers.AltCLIPModel(config), pil_image_processor()(size={"shortest_edge": 32}, crop_size=SQUARE)


def blip(tokenizer):
    text = bert(tokenizer, max_position_embeddings=40, encoder_hidden_size=32, bos_token_id=2, eos_token_id=3)
    vision = TOWER | dict(image_size=32, patch_size=8)
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=24)
    return transformers.BlipModel(config), pil_image_processor("BlipImageProcessor")(size=SQUARE)


def clipseg(tokenizer):
    text = bert(tokenizer, max_position_embeddings=40, eos_token_id=tokenizer.eos_token_id)
    vision = TOWER | dict(image_size=32, patch_size=8)
    config = transformers.CLIPSegConfig(text_config=text, vision_config=vision, projection_dim=24)
    return transformers.CLIPSegModel(config), pil_image_processor("ViTImageProcessor")(size=SQUARE)


KINDS = {
    "align": (align, chinese_tokenizer),
    "altclip": (altclip, lambda: siglip_tokenizer(padding="<pad>")),
    "blip": (blip, chinese_tokenizer),
    "clipseg": (clipseg, siglip_tokenizer),
}


def write(kind, folder):
    """A model of a kind on disk, as on the Hub."""
    make, tokenizer = KINDS[kind]
    model, processor = make(tokenizer := tokenizer())
    chance = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=chance)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return str(folder)
