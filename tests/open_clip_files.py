"""Tiny random models as open_clip writes them, and open_clip's answers, written down once more from its tensors."""

import json
import string
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

_WORDS = string.ascii_lowercase + string.digits + string.punctuation
VOCABULARY = {word: number for number, word in enumerate([*_WORDS, *(f"{word}</w>" for word in _WORDS)])}
VOCABULARY |= {"<|startoftext|>": len(VOCABULARY), "<|endoftext|>": len(VOCABULARY) + 1}


@dataclass(frozen=True)
class Kind:
    """The sizes of a model: towers as (width, layers, heads), pictures of side x side patches."""

    patch: int = 16
    side: int = 2
    context: int = 77
    joint: int = 24
    vision: tuple[int, int, int] = (128, 2, 2)
    text: tuple[int, int, int] = (64, 2, 1)
    quick_gelu: bool = False
    dtype: torch.dtype = torch.float32
    custom_text: bool = False  # the text tower's names begin with "text."
    linear_projection: bool = False  # that of texts is an nn.Linear

    @property
    def image_size(self):
        return self.patch * self.side

    def config(self, **fields):
        """model_cfg of open_clip_config.json."""
        vision = {"image_size": self.image_size, "patch_size": self.patch}
        vision |= {"width": self.vision[0], "layers": self.vision[1]}
        if self.vision[0] // self.vision[2] != 64:
            vision["head_width"] = self.vision[0] // self.vision[2]
        text = {"context_length": self.context, "vocab_size": len(VOCABULARY)}
        text |= {"width": self.text[0], "heads": self.text[2], "layers": self.text[1]}
        quick = {"quick_gelu": True} if self.quick_gelu else {}
        return {"embed_dim": self.joint, "vision_cfg": vision, "text_cfg": text} | quick | fields


def random_tensors(kind, seed=0):
    """A state dict in open_clip's names."""
    chance = torch.Generator().manual_seed(seed)

    def random(*shape, scale=None):
        return torch.randn(*shape, generator=chance) * (shape[-1] ** -0.5 if scale is None else scale)

    def norm(name, width):
        return {f"{name}.weight": 1 + random(width, scale=0.1), f"{name}.bias": random(width, scale=0.1)}

    def tower(prefix, width, layers):
        tensors = {}
        for i in range(layers):
            block = f"{prefix}transformer.resblocks.{i}."
            tensors |= norm(f"{block}ln_1", width) | norm(f"{block}ln_2", width)
            for name, rows, columns in (
                ("attn.in_proj_", 3 * width, width),
                ("attn.out_proj.", width, width),
                ("mlp.c_fc.", 3 * width, width),
                ("mlp.c_proj.", width, 3 * width),
            ):
                tensors[f"{block}{name}weight"] = random(rows, columns)
                tensors[f"{block}{name}bias"] = random(rows, scale=0.3)
        return tensors

    (vision, vision_layers, _), (text, text_layers, _) = kind.vision, kind.text
    projection = {"text_projection": random(text, kind.joint)}
    if kind.linear_projection:
        projection = {"text_projection.weight": random(kind.joint, text)}
    texts = projection | tower("", text, text_layers) | norm("ln_final", text)
    texts |= {
        "positional_embedding": random(kind.context, text, scale=0.3),
        "token_embedding.weight": random(len(VOCABULARY), text, scale=1),
    }
    if kind.custom_text:
        texts = {f"text.{name}": value for name, value in texts.items()}
    images = tower("visual.", vision, vision_layers) | norm("visual.ln_pre", vision) | norm("visual.ln_post", vision)
    images |= {
        "visual.class_embedding": random(vision, scale=1),
        "visual.positional_embedding": random(1 + kind.side**2, vision, scale=0.3),
        "visual.conv1.weight": random(vision, 3, kind.patch, kind.patch, scale=1 / kind.patch),
        "visual.proj": random(vision, kind.joint),
    }
    tensors = texts | images | {"logit_scale": torch.tensor(3.2)}
    return {name: value.to(kind.dtype) for name, value in tensors.items()}


def write_open_clip(folder, kind=Kind(), config=True, tokenizer=True, preprocess=None, **fields):
    """The files of a model on the Hub, in `folder`; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(kind)
    save_file(tensors, folder / "open_clip_model.safetensors")
    if config:
        content = {"model_cfg": kind.config(**fields), "preprocess_cfg": preprocess or {}}
        (folder / "open_clip_config.json").write_text(json.dumps(content))
    if tokenizer:
        write_tokenizer(folder)
    return tensors


def write_tokenizer(folder):
    """CLIP's kind of tokenizer, whose words are letters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    (folder / "merges.txt").write_text("#version: 0.2\n")


# open_clip's answers --------------------------------------------------------------------------------------------------


def _norm(tensors, name, hidden):
    return F.layer_norm(hidden, hidden.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-5)


def _tower(tensors, prefix, layers, heads, quick_gelu, hidden, mask=None):
    """Hidden states (b, t, d) through torch's own attention, which open_clip's layers are made of."""
    width = hidden.shape[-1]
    for i in range(layers):
        block = f"{prefix}transformer.resblocks.{i}."
        attention = nn.MultiheadAttention(width, heads, batch_first=True, dtype=hidden.dtype)
        place = f"{block}attn."
        own = {name.removeprefix(place): value for name, value in tensors.items() if name.startswith(place)}
        attention.load_state_dict(own)
        seen = _norm(tensors, f"{block}ln_1", hidden)
        hidden = hidden + attention(seen, seen, seen, need_weights=False, attn_mask=mask)[0]
        inner = F.linear(
            _norm(tensors, f"{block}ln_2", hidden), tensors[f"{block}mlp.c_fc.weight"], tensors[f"{block}mlp.c_fc.bias"]
        )
        inner = inner * torch.sigmoid(1.702 * inner) if quick_gelu else F.gelu(inner)
        hidden = hidden + F.linear(inner, tensors[f"{block}mlp.c_proj.weight"], tensors[f"{block}mlp.c_proj.bias"])
    return hidden


def image_features(tensors, kind, pixels):
    """Pictures (b, 3, h, w) -> (b, d)."""
    patches = F.conv2d(pixels, tensors["visual.conv1.weight"], stride=kind.patch).flatten(2).mT
    first = tensors["visual.class_embedding"].expand(len(pixels), 1, -1)
    hidden = torch.cat([first, patches], dim=1) + tensors["visual.positional_embedding"]
    hidden = _norm(tensors, "visual.ln_pre", hidden)
    hidden = _tower(tensors, "visual.", kind.vision[1], kind.vision[2], kind.quick_gelu, hidden)
    return _norm(tensors, "visual.ln_post", hidden[:, 0]) @ tensors["visual.proj"]


def text_features(tensors, kind, ids):
    """Sentences (s, t), of which each is read at its highest id -> (s, d)."""
    tensors = {name.removeprefix("text."): value for name, value in tensors.items()}
    length = ids.shape[1]
    hidden = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"][:length]
    mask = torch.full((length, length), float("-inf"), dtype=hidden.dtype).triu(1)
    hidden = _tower(tensors, "", kind.text[1], kind.text[2], kind.quick_gelu, hidden, mask)
    hidden = _norm(tensors, "ln_final", hidden)[torch.arange(len(ids)), ids.argmax(dim=-1)]
    if kind.linear_projection:
        return F.linear(hidden, tensors["text_projection.weight"])
    return hidden @ tensors["text_projection"]
