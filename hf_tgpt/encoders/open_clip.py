"""open_clip's plain CLIP as transformers' CLIPModel: tensor names, sizes, and which models are something else.

open_clip (https://github.com/mlfoundations/open_clip) stores a layer's queries, keys and values in one matrix, both
projections transposed, and in a config what tensors do not determine: the number of heads and the activation.

Letters: d_t text width, d_v vision width, d joint width, g patches a side, t context length, v words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

ACTIVATIONS = ("quick_gelu", "gelu")
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
# Which weights use which activation, if only the file's name indicates it.
_WHO_HAS_WHICH = (
    "'quick_gelu' for weights of OpenAI, DFN, MetaCLIP, GeoRSCLIP ViT-B/32 and whatever open_clip calls -quickgelu, "
    "'gelu' for those of LAION-2B, DataComp, BioCLIP and GeoRSCLIP ViT-H/14, and for RemoteCLIP as its authors load it"
)
# Signs of another architecture: a pattern of its tensors' names, and what it has that plain CLIP lacks.
_OTHERS = {
    r"(vision_model|text_model)\.": "the names of transformers already; use its folder as it is",
    r"text_decoder\.|(text\.)?cls_emb$|map_(viz|cap)": "the caption decoder of CoCa",
    r"visual\.(layer\d|attnpool|bn\d)\b": "a ResNet as its image tower",
    r"visual\.(trunk|head)\.": "an image tower of timm (as ConvNeXt, EVA, SigLIP and NaFlex models of open_clip have)",
    r"visual\.(blocks|patch_embed|cls_token|pos_embed|rope)\b": "EVA's image tower",
    r"text\.transformer\.(embeddings|encoder|layer|shared)|text\.proj\.": "a text tower of transformers, as RoBERTa",
    r"logit_bias$": "the logit bias of SigLIP",
    r".*\.ls_[12]\.": "layer scale",
    r"visual\.attn_pool": "attentional pooling",
}
# Scalars and masks in older files, which follow from the sizes.
_DERIVED = ("attn_mask", "input_resolution", "context_length", "vocab_size")
# Fields of open_clip's config that do not affect plain CLIP: for training, or for towers that it lacks.
_WITHOUT_EFFECT = (
    *("patch_dropout", "output_tokens", "pad_id", "custom_text", "init_logit_scale"),
    *("attn_pooler_queries", "attn_pooler_heads", "n_queries", "timm_pool", "timm_proj", "timm_drop"),
    *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "proj", "pooler_type"),
)
# Plain CLIP's value in fields that may have others.
_PLAIN = {
    ("vision_cfg", "pool_type"): "tok",
    ("vision_cfg", "pos_embed_type"): "learnable",
    ("vision_cfg", "block_type"): "default",
    ("text_cfg", "pool_type"): "argmax",
    ("text_cfg", "proj_type"): "linear",
    ("text_cfg", "block_type"): "default",
}
_HEAD_WIDTH, _TEXT_HEADS = 64, 8  # open_clip's if its config does not name them
# Its published vision towers have heads of width 64 up to this width, and 16 heads above.
_WIDEST_OF_64, _HEADS_OF_WIDE = 1024, 16

_TOWERS = {None: "text_model", "visual.": "vision_model"}
_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection.weight": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)(weight|bias)$")
_LAYER_NAMES = {
    "ln_1.": "layer_norm1.",
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def read_open_clip(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    activation: str | None = None,
    heads: Sequence[int] | None = None,
) -> tuple[CLIPConfig, dict[str, torch.Tensor]]:
    """The config of a CLIPModel and its weights by name, from open_clip's `tensors`.

    `config` is the "model_cfg" of open_clip's config. `activation` and `heads` (of the image and the text tower)
    override it. Without it, `activation` is required, and `heads` if a width is not a multiple of 64.

    Raises ValueError for an architecture other than plain CLIP, for tensors that are missing, unknown or of a shape
    that does not match the others, and for another model's config.
    """
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"`activation`={activation!r} is not known; choose {' or '.join(ACTIVATIONS)}.")
    tensors = _plain_names(tensors)
    weights = _renamed(tensors)
    sizes = _sizes(tensors)
    if config is not None:
        _check_config(config, sizes)
    elif activation is None:
        raise ValueError(
            "`activation`=None, and there is no open_clip_config.json beside the tensors, which do not determine "
            f"it; give {_WHO_HAS_WHICH}."
        )
    if activation is None:
        activation = "quick_gelu" if config and config.get("quick_gelu") else "gelu"
    towers = _towers(sizes, config, activation, heads)
    clip_config = CLIPConfig(projection_dim=sizes["joint_width"], **towers)
    _check_weights(weights, clip_config)
    return clip_config, weights


def build_clip(config: CLIPConfig, weights: Mapping[str, torch.Tensor], tokenizer: Any) -> CLIPModel:
    """A CLIPModel in evaluation mode, with weights of their own type, or of the widest if they differ.

    It reads a sentence where open_clip does: at the highest id, EOS, which follows BOS at the end of CLIP's vocabulary.
    The tokenizer's length is set to the model's context.

    Raises ValueError for a tokenizer that does not match the model's vocabulary.
    """
    text = config.text_config
    ids, highest = tokenizer("a").input_ids, max(tokenizer.get_vocab().values())
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if highest >= text.vocab_size or not [text.bos_token_id, text.eos_token_id] == [begin, end] == [ids[0], ids[-1]]:
        raise ValueError(
            f"`tokenizer`={tokenizer.name_or_path!r} has ids up to {highest}, BOS {begin} and EOS {end}, but the model "
            f"has {text.vocab_size} words, of which CLIP's last two are BOS and EOS; name this model's tokenizer."
        )
    text.pad_token_id = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tokenizer.model_max_length = text.max_position_embeddings
    dtype = reduce(torch.promote_types, {value.dtype for value in weights.values()})
    with torch.random.fork_rng(devices=[]):  # the initial weights are replaced immediately
        model = CLIPModel(config).to(dtype).eval()
    model.load_state_dict(weights)
    return model


def settings(config: CLIPConfig) -> dict[str, Any]:
    """What a converted model's tensors do not determine: its activation, and the heads of both towers."""
    vision, text = config.vision_config, config.text_config
    return {"activation": vision.hidden_act, "heads": [vision.num_attention_heads, text.num_attention_heads]}


def _plain_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by the names in open_clip's CLIP, also from wrapped models and CustomTextCLIP; raises for others."""
    named = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in tensors.items()}
    for pattern, other in _OTHERS.items():
        if match := next((name for name in named if re.match(pattern, name)), None):
            raise ValueError(f"{match!r} shows that the model has {other}; only open_clip's plain CLIP is converted.")
    named = {name.removeprefix("text."): value for name, value in named.items()}
    return {name: value for name, value in named.items() if name not in _DERIVED}


def _renamed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by the names in CLIPModel. Raises ValueError for tensors that have no place in it."""
    weights, unknown = {}, []
    for name, value in tensors.items():
        layer = _LAYER.match(name)
        if name in _NAMES:
            weights[_NAMES[name]] = value
        elif name in _TRANSPOSED and value.ndim == 2:
            weights[_TRANSPOSED[name]] = value.T.contiguous()
        elif layer and layer[3] == "attn.in_proj_":  # (3 d, d) and (3 d): queries, keys, values
            for part, rows in zip("qkv", value.chunk(3), strict=False):
                place = f"{_TOWERS[layer[1]]}.encoder.layers.{int(layer[2])}.self_attn.{part}_proj."
                weights[place + layer[4]] = rows.contiguous()
        elif layer and layer[3] in _LAYER_NAMES:
            place = f"{_TOWERS[layer[1]]}.encoder.layers.{int(layer[2])}.{_LAYER_NAMES[layer[3]]}"
            weights[place + layer[4]] = value
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"The file holds {', '.join(map(repr, unknown[:3]))}{' and others' if len(unknown) > 3 else ''}, which "
            "plain CLIP does not have; only open_clip's plain CLIP is converted."
        )
    return weights


def _sizes(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The sizes from the tensors' shapes. Raises ValueError if these are not plain CLIP's."""

    def shape(name: str, axes: int) -> torch.Size:
        if name not in tensors:
            raise ValueError(f"The file lacks {name!r}, so it is not a complete plain CLIP of open_clip.")
        if tensors[name].ndim != axes:
            raise ValueError(f"{name!r} has shape {tuple(tensors[name].shape)}; a plain CLIP's has {axes} axes.")
        return tensors[name].shape

    def layers(tower: str) -> int:
        numbers = [int(match[2]) for name in tensors if (match := _LAYER.match(name)) and (match[1] or "") == tower]
        return max(numbers, default=-1) + 1

    vision_width, channels, patch, patch_width = shape("visual.conv1.weight", 4)
    patches = shape("visual.positional_embedding", 2)[0] - 1
    side = math.isqrt(max(patches, 0))
    if channels != 3 or patch != patch_width or side**2 != patches or not patches:
        raise ValueError(
            f"The image tower reads {channels} channels in patches of {patch}x{patch_width} pixels and has {patches} "
            "places for patches; a plain CLIP takes square pictures of three channels in square patches."
        )
    vocabulary, text_width = shape("token_embedding.weight", 2)
    return {
        "joint_width": shape("visual.proj", 2)[1],
        "vision_width": vision_width,
        "vision_layers": layers("visual."),
        "vision_hidden": shape("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "patch_size": patch,
        "image_size": side * patch,
        "text_width": text_width,
        "text_layers": layers(""),
        "text_hidden": shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "context_length": shape("positional_embedding", 2)[0],
        "vocabulary": vocabulary,
    }


def _check_config(config: Mapping[str, Any], sizes: dict[str, int]) -> None:
    """Raises ValueError for fields that plain CLIP does not have, and for sizes other than the tensors'.

    Takes the picture's size from the config, since patches may not cover its last pixels.
    """
    vision, text = (config.get(name) for name in ("vision_cfg", "text_cfg"))
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        raise ValueError("'model_cfg' of open_clip_config.json has no 'vision_cfg' and 'text_cfg'; download it again.")
    picture = vision.get("image_size", sizes["image_size"])
    if isinstance(picture, int) and picture // sizes["patch_size"] == sizes["image_size"] // sizes["patch_size"]:
        sizes["image_size"] = picture
    in_tensors = {
        "model_cfg": {"embed_dim": sizes["joint_width"]},
        "vision_cfg": {
            "image_size": sizes["image_size"],
            "patch_size": sizes["patch_size"],
            "width": sizes["vision_width"],
            "layers": sizes["vision_layers"],
        },
        "text_cfg": {
            "context_length": sizes["context_length"],
            "vocab_size": sizes["vocabulary"],
            "width": sizes["text_width"],
            "layers": sizes["text_layers"],
        },
    }
    read = ("vision_cfg", "text_cfg", "quick_gelu", "head_width", "heads", "mlp_ratio", *_WITHOUT_EFFECT)
    for section, fields in (("model_cfg", config), ("vision_cfg", vision), ("text_cfg", text)):
        for name, value in fields.items():
            if name in in_tensors[section]:
                if value != in_tensors[section][name]:
                    raise ValueError(
                        f"{name!r} of {section!r} in open_clip_config.json is {value!r}, but the tensors have "
                        f"{in_tensors[section][name]}: it is another model's config; put the right one there, or "
                        "move it away and give `activation`."
                    )
            elif value and name not in read and value != _PLAIN.get((section, name)):
                raise ValueError(
                    f"{name!r} of {section!r} in open_clip_config.json is {value!r}, which is not plain CLIP's; only "
                    "open_clip's plain CLIP is converted."
                )


def _check_weights(weights: Mapping[str, torch.Tensor], config: CLIPConfig) -> None:
    """Raises ValueError unless these are all of a CLIPModel's tensors, in its shapes, with finite numbers."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in CLIPModel(config).state_dict().items()}
    for name, shape in shapes.items():
        if name not in weights:
            raise ValueError(
                f"The file lacks what becomes {name!r} of a CLIPModel, so it is not a complete plain CLIP."
            )
        value = weights[name]
        if value.shape != shape:
            raise ValueError(
                f"What becomes {name!r} has shape {tuple(value.shape)}, but the other tensors require "
                f"{tuple(shape)}; the file is damaged or not a plain CLIP."
            )
        if value.dtype not in _TYPES:
            raise ValueError(
                f"What becomes {name!r} is of type {value.dtype}; save it as float32, float16 or bfloat16."
            )
        if not value.isfinite().all():
            raise ValueError(f"What becomes {name!r} holds NaN or infinity; use another file.")


def _towers(
    sizes: dict[str, int], config: Mapping[str, Any] | None, activation: str, heads: Sequence[int] | None
) -> dict[str, dict[str, Any]]:
    """Both towers' configs. Raises ValueError for numbers of heads that do not divide the widths."""
    widths = sizes["vision_width"], sizes["text_width"]
    if heads is not None:
        numbers: Sequence[Any] = heads
    elif config is not None:
        head_width = config["vision_cfg"].get("head_width", _HEAD_WIDTH)
        whole = isinstance(head_width, int) and head_width > 0 and not widths[0] % head_width
        numbers = widths[0] // head_width if whole else 0, config["text_cfg"].get("heads", _TEXT_HEADS)
    elif any(width % _HEAD_WIDTH for width in widths):
        raise ValueError(
            f"`heads`=None, and the towers' widths {widths[0]} and {widths[1]} are not multiples of {_HEAD_WIDTH}; "
            "give the numbers of attention heads of the image and of the text tower."
        )
    else:
        wide = widths[0] > _WIDEST_OF_64
        numbers = _HEADS_OF_WIDE if wide else widths[0] // _HEAD_WIDTH, widths[1] // _HEAD_WIDTH
    if len(numbers) != 2 or not all(isinstance(number, int) and number > 0 for number in numbers):
        raise ValueError(f"`heads`={list(numbers)} but there are two towers; give a number for each, such as 12 8.")
    for tower, width, number in zip(("image", "text"), widths, numbers, strict=True):
        if width % number:
            raise ValueError(
                f"`heads`={list(numbers)}, but {number} heads do not divide the {tower} tower's width of {width}; give "
                "the numbers of attention heads of the image and of the text tower."
            )
    common = {"hidden_act": activation, "layer_norm_eps": 1e-5, "projection_dim": sizes["joint_width"]}
    vision = common | {
        "hidden_size": sizes["vision_width"],
        "intermediate_size": sizes["vision_hidden"],
        "num_hidden_layers": sizes["vision_layers"],
        "num_attention_heads": numbers[0],
        "image_size": sizes["image_size"],
        "patch_size": sizes["patch_size"],
    }
    text = common | {
        "hidden_size": sizes["text_width"],
        "intermediate_size": sizes["text_hidden"],
        "num_hidden_layers": sizes["text_layers"],
        "num_attention_heads": numbers[1],
        "max_position_embeddings": sizes["context_length"],
        "vocab_size": sizes["vocabulary"],
        "bos_token_id": sizes["vocabulary"] - 2,
        "eos_token_id": sizes["vocabulary"] - 1,
    }
    return {"vision_config": vision, "text_config": text}
