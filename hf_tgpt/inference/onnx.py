"""Exports a trained classifier to ONNX, with its class list frozen, for programs without this package."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..data.images import Collator, FewShotImages
from ..encoders import encoder_of
from ..utils.files import write_json
from ..utils.names import check_class_names
from ..utils.version import __version__
from .classifier import Classifier
from .turns import exporting

# protobuf is limited to 2 GB; beyond that, weights go to a file beside the model.
_ONE_FILE = 1_900_000_000


def export_onnx(
    classifier: Classifier, path: str | os.PathLike[str], class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Writes `path`, which computes `logits` (b, c) from `pixel_values` (b, 3, size, size), for any batch size b.

    Class texts that do not depend on the image are frozen into a matrix, so the text tower is left out. A JSON file of
    the same name beside it, whose content is returned, has the labels in the order of the logits and the preprocessing
    of pictures. `class_names` is as in `Classifier.__call__`. The logits of a calibrated adapter are divided by its
    temperature, so their softmax gives the classifier's scores; the JSON file has its thresholds.

    The weights of towers in float16 stay so; pixel values and logits are float32.

    Raises ValueError for a `path` without .onnx, for a missing exporter, for towers in bfloat16, which ONNX Runtime
    does not compute on every device, and for an adapter with operations that ONNX does not support, naming them.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"{str(path)!r}: give the file a name that ends with .onnx.")
    _require("onnx", "onnxscript")
    if encoder_of(classifier.model.get_base_model()).dtype == torch.bfloat16:
        raise ValueError(
            "`dtype`='bf16': ONNX Runtime has no convolution in bfloat16 on a CPU; choose 'fp16' or 'fp32'."
        )
    names = list(classifier.class_names if class_names is None else class_names)
    check_class_names(names)
    model, size = copy.deepcopy(classifier.model), classifier.transform.size  # the original stays in use
    texts = None if names == model.class_names else model.texts_for(names)
    encoder = encoder_of(model.get_base_model())
    module = _Tempered(model.learner.standalone(encoder, texts), classifier.temperature(names))
    # Fused attention is traced with both a mask and is_causal, which its ONNX operator refuses.
    encoder.use_eager_attention()
    with exporting(), _quiet(), torch.no_grad():
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
    write_json(path.with_suffix(".json"), facts)
    return facts


class _Tempered(torch.nn.Module):
    """A classifier whose logits are divided by a temperature."""

    def __init__(self, model: torch.nn.Module, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(b, 3, h, w) -> logits (b, c)."""
        logits = self.model(pixel_values)
        return logits if self.temperature == 1 else logits / self.temperature


def quantize_onnx(path: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Writes an ONNX model with int8 weights in its linear layers, whose inputs are quantised dynamically."""
    _require("onnx", "onnxruntime")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    # The quantiser transposes the weights of each Gemm in place, so no other node may read them, nor may
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
    """The accuracy of an exported model on labelled images, with onnxruntime on the CPU."""
    _require("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    hits = []
    for batch in DataLoader(images, batch_size, collate_fn=Collator()):
        (logits,) = session.run(None, {"pixel_values": batch["pixel_values"].numpy()})
        hits.append(logits.argmax(-1) == batch["labels"].numpy())
    return float(np.concatenate(hits).mean())


def describe(classifier: Classifier, names: list[str]) -> dict[str, Any]:
    """What a program needs beside the model: labels, and the preprocessing of pictures."""
    transform, calibration = classifier.transform, classifier.calibration_for(names)
    return {
        "labels": names,
        "method": classifier.model.learner.config.method,
        "input": {"name": "pixel_values", "shape": ["batch", 3, transform.size, transform.size], "type": "float32"},
        "output": {"name": "logits", "shape": ["batch", len(names)], "type": "float32"},
        **({} if calibration is None else {"calibration": calibration.facts(names)}),
        "preprocessing": {
            "1_colour": "RGB, upright by EXIF, transparency on white",
            **(
                {"2_resize_to_square": transform.shorter_side or transform.size}
                if transform.squeeze
                else {"2_resize_shorter_side": transform.shorter_side or transform.size}
            ),
            "resample": transform.resample.name.lower(),
            "3_crop_centre": transform.size,
            "4_scale": 1 / 255,
            "5_subtract_mean": list(transform.mean),
            "6_divide_by_std": list(transform.std),
        },
        "hf_tgpt": __version__,
    }


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"ONNX needs {' and '.join(missing)}: pip install 'hf-tgpt[export]'.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings of the exporters about their own deprecations, torchvision and other models."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
