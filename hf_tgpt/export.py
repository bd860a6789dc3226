"""A trained classifier with its class list frozen, for programs without this package: ONNX, or plain transformers."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPVisionModelWithProjection

from .conditioned import ImageConditionedLearner
from .config import check_class_names
from .data.transforms import Collator, FewShotImages, ImageTransform
from .learner import OpenPromptLearner
from .predict import Classifier
from .references import LinearProbe, LoRA, Reference, ZeroShot, clip_of
from .towers import after_bos, eager_attention, encode_image, encode_text, logit_scale, token_embeddings, unit
from .version import __version__

# protobuf holds 2 GB; beyond that, weights go to a file beside the model.
_ONE_FILE = 1_900_000_000
CLASSIFIER = "classifier.safetensors"


def export_onnx(
    classifier: Classifier, path: str | os.PathLike[str], class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Writes `path`, which makes `logits` (b, c) of `pixel_values` (b, 3, size, size), for any batch size b.

    Class texts that do not depend on the image are frozen into a matrix, so that the text tower stays out. Beside it
    is a JSON file of the same name, which is also returned: the labels in the order of the logits, and how pixel values
    are made of a picture. `class_names` is as in `Classifier.__call__`.

    Raises ValueError for a `path` without .onnx, for a missing exporter, and for an adapter that does things ONNX has
    no place for, naming them.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"`path`={str(path)!r}: give the file a name that ends with .onnx.")
    _require("onnx", "onnxscript")
    names = _freeze(classifier, class_names)
    module, size = _exportable(classifier.model), classifier.transform.size
    # The fused attention is traced with a mask and as causal at once, which its ONNX form refuses.
    with eager_attention(clip_of(classifier.model)), _quiet(), torch.no_grad():
        device = next(module.parameters()).device
        program = torch.onnx.export(
            module.eval(),
            (torch.zeros(2, 3, size, size, device=device),),
            dynamo=True,
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            input_names=["pixel_values"],
            output_names=["logits"],
            verbose=False,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = sum(
        value.nbytes for value in {**dict(module.named_parameters()), **dict(module.named_buffers())}.values()
    )
    assert program is not None  # with dynamo=True there is one
    program.save(str(path), external_data=weights > _ONE_FILE)
    facts = describe(classifier, names)
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def quantize_onnx(path: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Writes an ONNX model with its linear layers' weights in int8, their inputs quantised as they come."""
    _require("onnx", "onnxruntime")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    # The quantiser turns the weights of each Gemm round where they are, so no other node may read them there, nor may
    # their former shapes be noted.
    del model.graph.value_info[:]
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Gemm" and node.input[1] in weights:
            own = model.graph.initializer.add()
            own.CopyFrom(weights[node.input[1]])
            own.name = node.input[1] = f"{own.name} of {node.name}"
    with _quiet():
        quantize_dynamic(model, output, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])


def onnx_accuracy(path: str | os.PathLike[str], images: FewShotImages, batch_size: int = 32) -> float:
    """The share of labelled images that an exported model gets right, by onnxruntime on the CPU."""
    _require("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    hits = []
    for batch in DataLoader(images, batch_size, collate_fn=Collator()):
        (logits,) = session.run(None, {"pixel_values": batch["pixel_values"].numpy()})
        hits.append(logits.argmax(-1) == batch["labels"].numpy())
    return float(np.concatenate(hits).mean())


def export_transformers(
    classifier: Classifier, folder: str | os.PathLike[str], class_names: Sequence[str] | None = None
) -> str:
    """Writes a plain CLIPVisionModelWithProjection, its image processor and a class matrix; returns how to use them.

    The matrix is `classifier.safetensors`: `weight` (c, d) and `bias` (c,) of a linear layer on unit image embeddings
    that gives the logits. `README.md` holds the snippet that is returned.

    transformers' own CLIPForImageClassification cannot hold these: its head reads the mean of the last layer's patch
    tokens, CLIP's features are the CLS token after a norm and a projection, at unit length, and no weights of a linear
    head make the one of the other.

    Raises ValueError where the image tower has learned prompts or the texts depend on the image.
    """
    names = _freeze(classifier, class_names)
    model = classifier.model
    learner = getattr(model, "learner", None)
    if learner is not None:
        why = None
        if not learner.vision_is_frozen:
            why = "learns prompts in the image tower, extra tokens that a plain one does not read"
        elif isinstance(learner, ImageConditionedLearner) or not isinstance(learner, OpenPromptLearner):
            why = "reads prompts that depend on the image in its text tower"
        if why:
            raise ValueError(f"{learner.config.method} {why}, so plain transformers cannot hold it; export it to ONNX.")
    _, weight, bias = _image_part(model)
    clip = copy.deepcopy(model.clip).merge_and_unload() if isinstance(model, LoRA) else clip_of(model)

    config = copy.deepcopy(clip.config.vision_config)
    config.projection_dim = clip.config.projection_dim
    config.id2label, config.label2id = dict(enumerate(names)), {name: label for label, name in enumerate(names)}
    vision = CLIPVisionModelWithProjection(config).to(clip.dtype)
    vision.vision_model.load_state_dict(clip.vision_model.state_dict())
    vision.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    folder = Path(folder)
    vision.save_pretrained(folder)
    _processor(classifier.transform).save_pretrained(folder)
    save_file({"weight": weight.contiguous(), "bias": bias.contiguous()}, folder / CLASSIFIER)
    snippet = _SNIPPET.format(file=CLASSIFIER)
    readme = f"# An image classifier for {len(names)} classes\n\nFor plain transformers:\n\n```python\n{snippet}```\n"
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return snippet


_SNIPPET = """\
import sys, torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

folder, picture = sys.argv[1:]
vision, processor = (kind.from_pretrained(folder) for kind in (CLIPVisionModelWithProjection, CLIPImageProcessorPil))
with torch.no_grad():
    embeds = vision(**processor(images=Image.open(picture).convert("RGB"), return_tensors="pt")).image_embeds
logits = torch.nn.functional.linear(torch.nn.functional.normalize(embeds), **load_file(f"{{folder}}/{file}"))
print(vision.config.id2label[int(logits.argmax())])
"""


def describe(classifier: Classifier, names: list[str]) -> dict[str, Any]:
    """What a program needs to know beside the model: labels, and how pixel values are made of a picture."""
    transform, model = classifier.transform, classifier.model
    config = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
    return {
        "labels": names,
        "method": config.method if config else type(model).__name__,
        "input": {"name": "pixel_values", "shape": ["batch", 3, transform.size, transform.size], "type": "float32"},
        "output": {"name": "logits", "shape": ["batch", len(names)], "type": "float32"},
        "preprocessing": {
            "1_colour": "RGB, upright by EXIF, transparency on white",
            "2_resize_shorter_side": transform.shorter_side or transform.size,
            "resample": transform.resample.name.lower(),
            "3_crop_centre": transform.size,
            "4_scale": 1 / 255,
            "5_subtract_mean": list(transform.mean),
            "6_divide_by_std": list(transform.std),
        },
        "hf_tgpt": __version__,
    }


# What is exported ----------------------------------------------------------------------------------------------------


class _Frozen(nn.Module):
    """An image tower and a class matrix."""

    def __init__(self, model: PeftModel | Reference):
        super().__init__()
        self.tower = clip_of(model)
        self.encode, weight, bias = _image_part(model)
        self.weight = nn.Buffer(weight)  # (c, d)
        self.bias = nn.Buffer(bias)  # (c,)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return F.linear(unit(self.encode(pixel_values)), self.weight, self.bias)


class _Whole(nn.Module):
    """TGP-T, which reads two sentences of its own for every image."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


class _Conditioned(nn.Module):
    """Class texts for every image: the learner's own forward, but without packing, which is worked out in Python."""

    def __init__(self, clip: CLIPModel, learner: ImageConditionedLearner):
        super().__init__()
        self.clip, self.learner = clip, learner
        self.words = nn.Buffer(token_embeddings(clip)[learner.class_ids])  # (c, t, d_t)
        self.eos = nn.Buffer(learner.class_eos)  # (c,)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        clip, learner, count, classes = self.clip, self.learner, pixel_values.shape[0], self.words.shape[0]
        image_features = unit(encode_image(clip, pixel_values))  # (b, d)
        prompts = learner.prompts(image_features)[:, None].expand(-1, classes, -1, -1)  # (b, c, n, d_t)
        words = self.words[None].expand(count, -1, -1, -1)  # (b, c, t, d_t)
        sentences = after_bos(words.flatten(0, 1), prompts.flatten(0, 1))  # (b * c, t, d_t)
        text_features = unit(encode_text(clip, sentences, self.eos.repeat(count))).unflatten(0, (count, classes))
        seen = learner.see(clip, pixel_values, image_features, text_features, (learner.class_ids, self.eos))
        return logit_scale(clip) * torch.einsum("bd,bcd->bc", seen, text_features)


def _exportable(model: PeftModel | Reference) -> nn.Module:
    """The model as a module of pixel values alone. Raises ValueError for what cannot be one."""
    learner = getattr(model, "learner", None)
    if isinstance(learner, ImageConditionedLearner):
        for field, exportable in (("shortlist", None), ("conditioned_texts", True)):  # of mutual prompt learning
            value = getattr(learner.config, field, exportable)
            if value != exportable:
                raise ValueError(
                    f"`{field}`={value!r}: these texts are laid out in Python, which ONNX cannot hold; change it to "
                    f"{exportable!r} before the export."
                )
        return _Conditioned(clip_of(model), learner)
    return _Frozen(model) if learner is None or isinstance(learner, OpenPromptLearner) else _Whole(model)


def _image_part(
    model: PeftModel | Reference,
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor, torch.Tensor]:
    """The image tower, (b, 3, h, w) -> (b, d), and a linear layer on its unit features: weight (c, d), bias (c,)."""
    clip, learner = clip_of(model), getattr(model, "learner", None)
    bias = torch.zeros(len(model.class_names), device=clip.device)
    with torch.no_grad():
        if isinstance(model, LinearProbe):
            weight, bias = model.head.weight, model.head.bias.detach()
        elif learner is not None:
            weight = learner.class_features(clip)
        else:
            assert isinstance(model, ZeroShot)  # an adapted model without an active adapter has no class names
            weight = model.class_features()
        weight = (logit_scale(clip) * weight).detach().clone()
    return partial((learner or _Plain).image_features, clip), weight, bias


class _Plain:
    image_features = staticmethod(encode_image)


def _freeze(classifier: Classifier, class_names: Sequence[str] | None) -> list[str]:
    """Gives the model the classes to be exported, and returns their names."""
    check_class_names(classifier.class_names if class_names is None else class_names)
    names = list(classifier.class_names if class_names is None else class_names)
    if names != list(classifier.model.class_names):
        classifier.model.set_class_names(names)
    return names


def _processor(transform: ImageTransform) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": transform.shorter_side or transform.size},
        crop_size={"height": transform.size, "width": transform.size},
        image_mean=list(transform.mean),
        image_std=list(transform.std),
        resample=transform.resample,
    )


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"ONNX needs {' and '.join(missing)}: pip install 'hf-tgpt[export]'.")


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters tell of their own deprecations, of torchvision and of advice for other models."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
