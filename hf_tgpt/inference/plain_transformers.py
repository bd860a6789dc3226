"""Exports a trained classifier as a plain vision model of transformers and a class matrix."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..data.images import ImageTransform
from ..encoders import encoder_of
from ..utils.compat import pil_image_processor
from ..utils.names import check_class_names
from .classifier import Classifier

CLASSIFIER = "classifier.safetensors"


def export_transformers(
    classifier: Classifier, folder: str | os.PathLike[str], class_names: Sequence[str] | None = None
) -> str:
    """Writes the image tower as a plain model, its image processor and a class matrix; returns how to use them.

    The matrix is `classifier.safetensors`: `weight` (c, d) and `bias` (c,) of a linear layer on unit image embeddings
    that gives the logits, divided by the temperature if the adapter is calibrated. `README.md` has the snippet that is
    returned. The tower is the family's `vision_class`, for CLIP a CLIPVisionModelWithProjection.

    transformers' CLIPForImageClassification cannot be used: its head takes the mean of the last layer's patch tokens,
    but CLIP's features are the CLS token after a norm and a projection, at unit length, and no linear head turns one
    into the other. SiglipForImageClassification also takes the mean instead of attention pooling.

    Raises ValueError where the image tower has learned prompts or the texts depend on the image.
    """
    names = list(classifier.class_names if class_names is None else class_names)
    check_class_names(names)
    model, learner = classifier.model, classifier.model.learner
    encoder = encoder_of(model.get_base_model())
    texts = None if names == model.class_names else model.texts_for(names)
    why = None
    if not learner.vision_is_frozen:
        why = "learns prompts in the image tower, extra tokens that a plain one does not read"
    elif (head := learner.linear_head(encoder, texts)) is None:
        why = "classifies by more than a linear layer on image features, such as texts that depend on the image"
    if why or head is None:
        raise ValueError(f"{learner.config.method} {why}, so plain transformers cannot hold it; export it to ONNX.")
    weight, bias = (part / classifier.temperature(names) for part in head)
    vision = model.merged_encoder().vision_tower(names)
    folder = Path(folder)
    vision.save_pretrained(folder)
    processor_class = pil_image_processor(encoder.image_processor)
    _processor(processor_class, classifier.transform).save_pretrained(folder)
    save_file({"weight": weight.float().contiguous(), "bias": bias.float().contiguous()}, folder / CLASSIFIER)
    snippet = _SNIPPET.format(
        file=CLASSIFIER,
        vision_class=encoder.vision_class,
        output=encoder.vision_output,
        processor=processor_class.__name__,
    )
    readme = f"# An image classifier for {len(names)} classes\n\nFor plain transformers:\n\n```python\n{snippet}```\n"
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return snippet


_SNIPPET = """\
import sys, torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from transformers import {processor}, {vision_class}

folder, picture = sys.argv[1:]
vision, processor = (kind.from_pretrained(folder) for kind in ({vision_class}, {processor}))
image = ImageOps.exif_transpose(Image.open(picture))
if image.has_transparency_data:
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
with torch.no_grad():
    embeds = vision(**processor(images=image.convert("RGB"), return_tensors="pt")).{output}
features = torch.nn.functional.normalize(embeds.float())
logits = torch.nn.functional.linear(features, **load_file(f"{{folder}}/{file}"))
print(vision.config.id2label[int(logits.argmax())])
"""


def _processor(processor_class: Any, transform: ImageTransform) -> Any:
    side, crop = transform.shorter_side or transform.size, transform.size
    return processor_class(
        size={"height": side, "width": side} if transform.squeeze else {"shortest_edge": side},
        crop_size={"height": crop, "width": crop},
        do_center_crop=not transform.squeeze or side != crop,
        image_mean=list(transform.mean),
        image_std=list(transform.std),
        resample=transform.resample,
    )
