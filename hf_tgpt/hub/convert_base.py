"""open_clip's files of a plain CLIP as a folder that transformers loads."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL.Image import Resampling
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from ..encoders import encoder_of
from ..encoders.open_clip import build_clip, read_open_clip, settings
from ..utils.compat import pil_image_processor
from ..utils.files import put_in_place, read_json
from .convert import read_checkpoint

CONFIG = "open_clip_config.json"
# CLIP's byte pairs, which all plain CLIPs of open_clip share.
TOKENIZER = "openai/clip-vit-base-patch32"
# Where open_clip puts its weights on the Hub, the safest first.
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_RESAMPLING = {"bicubic": Resampling.BICUBIC, "bilinear": Resampling.BILINEAR}


def convert_base(
    file: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    activation: str | None = None,
    heads: Sequence[int] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Writes the plain CLIP in open_clip's `file` to a new `folder`, as a CLIPModel with tokenizer and image processor.

    `file` is .safetensors, a pickle (.bin, .pt, .pth, read with `weights_only=True`) or the folder of one of them. What
    the tensors do not define is read from open_clip_config.json beside it. Without one, `activation` ("quick_gelu" or
    "gelu") is needed, `heads` (of the image and the text tower) are assumed to be those of open_clip's models (of width
    64; 16 in image towers wider than 1024), and pictures are preprocessed as for OpenAI's models. Both options override
    the config.

    `tokenizer` is a Hub id or a folder; by default the one beside the file, else `openai/clip-vit-base-patch32`.

    Returns what was converted: activation, heads, sizes, type of the weights and tokenizer. The folder appears only if
    everything was written, could be read again and gave the same answers.

    Raises ValueError for a model that is not a plain CLIP, such as CoCa, SigLIP, EVA or one with a ResNet.

    Example:
        >>> facts = hf_tgpt.convert_base("bioclip", "bioclip-transformers")
        >>> clip = hf_tgpt.load_clip("./bioclip-transformers")
    """
    folder = Path(os.path.expanduser(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`folder`={str(folder)!r} is no empty folder; choose a new one.")
    file = _weights_file(Path(os.path.expanduser(file)))
    open_clip_config = _read_config(file.parent / CONFIG)
    if _is_program(file):
        raise ValueError(
            f"{str(file)!r} is a TorchScript program, as OpenAI publishes its models, and is not run; use the same "
            "model from the Hub, such as openai/clip-vit-base-patch16, or save its state_dict() as safetensors."
        )
    tensors = read_checkpoint(file)
    try:
        config, weights = read_open_clip(tensors, open_clip_config.get("model_cfg"), activation, heads)
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not converted. {error}") from None
    clip_tokenizer = _load_tokenizer(tokenizer, file.parent)
    model = build_clip(config, weights, clip_tokenizer)
    shape = encoder_of(model).shape()
    processor = _image_processor(open_clip_config.get("preprocess_cfg", {}), shape["image_size"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as staged:
        written = Path(staged) / folder.name
        for part in (model, clip_tokenizer, processor):
            part.save_pretrained(written)
        _check_written(written, model)
        put_in_place(written, folder)
    kind = str(model.dtype).removeprefix("torch.")
    return settings(config) | shape | {"dtype": kind, "tokenizer": clip_tokenizer.name_or_path}


def _weights_file(path: Path) -> Path:
    """The file itself, or the folder's file of weights. Raises ValueError if that is ambiguous."""
    if not path.is_dir():
        if path.is_file() and path.suffix not in _SUFFIXES:
            raise ValueError(f"{str(path)!r} does not end with {', '.join(_SUFFIXES)}; name a file of weights.")
        return path
    files = [path / name for name in _WEIGHTS if (path / name).is_file()][:1]
    files = files or sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{str(path)!r} should hold one file of weights ({', '.join(_SUFFIXES)}); it has {names}.")
    return files[0]


def _is_program(file: Path) -> bool:
    """Whether torch.jit.save wrote it."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_config(file: Path) -> dict[str, Any]:
    """open_clip's config; empty if there is none. Raises ValueError for any other JSON."""
    if not file.is_file():
        return {}
    config = read_json(file)
    parts = [config.get(name) for name in ("model_cfg", "preprocess_cfg")] if isinstance(config, dict) else []
    if not parts or not isinstance(parts[0], dict) or not isinstance(parts[1], dict | None):
        raise ValueError(f"{str(file)!r} has no 'model_cfg'; download it again, or move it away and give `activation`.")
    return config


def _load_tokenizer(tokenizer: str | os.PathLike[str] | None, beside: Path) -> Any:
    """The named tokenizer, the folder's, or CLIP's own from the Hub. Raises ValueError if none can be loaded."""

    def in_folder(folder: Path) -> bool:
        return any(all((folder / name).is_file() for name in names) for names in _TOKENIZER_FILES)

    name = os.path.expanduser(beside if tokenizer is None and in_folder(beside) else tokenizer or TOKENIZER)
    if os.path.isdir(name) and not in_folder(Path(name)):
        raise ValueError(
            f"`tokenizer`={name!r} holds neither tokenizer.json nor vocab.json and merges.txt; name another."
        )
    try:  # open_clip's folders may not define its class; for a Hub id AutoTokenizer would make an empty one
        return AutoTokenizer.from_pretrained(name, **({"config": CLIPConfig()} if os.path.isdir(name) else {}))
    except Exception as error:  # the readers of its files may raise any exception
        raise ValueError(
            f"`tokenizer`={name!r} could not be loaded ({str(error).partition(chr(10))[0]}); connect to the Hub, or "
            "name a folder with CLIP's tokenizer, such as that of a CLIP which `hf download` wrote."
        ) from error


def _image_processor(config: Mapping[str, Any], size: int) -> Any:
    """open_clip's preprocessing for a model's image size. Raises ValueError for what a CLIP's processor cannot do."""
    possible = {
        "resize_mode": ("shortest", "squash"),
        "interpolation": tuple(_RESAMPLING),
        "mode": ("RGB",),
        "size": (size, [size, size]),
    }
    for name, value in config.items():
        if name in possible and value not in possible[name]:
            choices = " or ".join(map(repr, possible[name]))
            raise ValueError(f"{name!r} of 'preprocess_cfg' in {CONFIG} is {value!r}; only {choices} can be converted.")
        if name not in (*possible, "mean", "std", "fill_color"):  # the last is for an unsupported resize_mode
            raise ValueError(
                f"{name!r} of 'preprocess_cfg' in {CONFIG} is not known; a CLIP's processor may not do it."
            )
    mode, interpolation = config.get("resize_mode", "shortest"), config.get("interpolation", "bicubic")
    fields: dict[str, Any] = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    if mode == "squash":
        fields = {"size": {"height": size, "width": size}, "do_center_crop": False}
    for name in ("mean", "std"):
        if (values := config.get(name)) is None:
            continue
        if (
            not isinstance(values, list)
            or len(values) != 3
            or not all(isinstance(value, float | int) for value in values)
        ):
            raise ValueError(f"{name!r} of 'preprocess_cfg' in {CONFIG} is {values!r}; it should be three numbers.")
        fields[f"image_{name}"] = values
    return pil_image_processor()(resample=_RESAMPLING[interpolation], **fields)


@torch.no_grad()
def _check_written(folder: Path, model: CLIPModel) -> None:
    """Raises ValueError unless the folder's model has the same weights and outputs as the one that was written."""
    again = CLIPModel.from_pretrained(folder, dtype=model.dtype).eval()
    shape = encoder_of(model).shape()
    picture = torch.linspace(-1, 1, 3 * shape["image_size"] ** 2, dtype=model.dtype)
    inputs = {
        "pixel_values": picture.view(1, 3, shape["image_size"], shape["image_size"]),
        "input_ids": torch.arange(shape["vocabulary"])[None, -min(shape["context_length"], shape["vocabulary"]) :],
    }
    before, after = model.state_dict(), again.state_dict()
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    answers, tolerance = (model(**inputs), again(**inputs)), torch.finfo(model.dtype).eps ** 0.5
    for name in ("image_embeds", "text_embeds"):  # rounding depends on where weights lie in memory
        one, other = (answer[name] for answer in answers)
        same = same and torch.allclose(one, other, rtol=0, atol=tolerance)
    if not same:
        raise ValueError(f"The model that was written to {str(folder.parent)!r} reads otherwise; try another disk.")
