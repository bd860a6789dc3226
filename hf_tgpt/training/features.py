"""The frozen image tower's output for the training images, computed once and stored on disk.

For methods without visual prompts a picture goes through the image tower in the same way at every step.
`cache_features` encodes N augmented views of every picture once; training then reads a mapped file and decodes no
image.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..adapters.fitting import Features
from ..adapters.learner import PromptLearner
from ..adapters.switches import switches_in
from ..adapters.tower_classifier import AdaptedModel
from ..data import FewShotImages
from ..data.read_ahead import pixel_batches
from ..encoders import DualEncoder, encoder_of
from ..encoders.identity import hash_of_weights

DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}  # as safetensors names them
_SECONDS = "seconds"  # in a file's metadata, beside the fingerprint
logger = logging.getLogger(__name__)


class CachedImages(torch.utils.data.Dataset):
    """`FewShotImages` whose rows have `image_states` from a file instead of `pixel_values`.

    Epoch e uses view e modulo the number of views, the same as live images in epoch e while there are enough views. The
    file is mapped into memory, so only requested rows are read, and processes share them.

    `seconds_saved` is what encoding took if the file existed already, else 0.

    Shapes: `image_states` (d,) or (p, d_v), in the file's dtype; `labels` an int, `caption` a string.
    """

    def __init__(self, images: FewShotImages, path: str | os.PathLike[str], seconds_saved: float = 0.0):
        self.dataset = images.dataset.remove_columns("image")
        self.path = Path(path)
        self.seconds_saved = seconds_saved
        self._states: torch.Tensor | None = None
        # Shared memory, so that persistent workers, which hold a copy of this object, see a new epoch too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def states(self) -> torch.Tensor:
        """All rows, (views, images, ...), memory-mapped."""
        if self._states is None:
            with safe_open(self.path, framework="pt") as file:
                self._states = file.get_tensor("states")
        return self._states

    def set_epoch(self, epoch: int) -> None:
        """Chooses the view of this epoch; call it before iterating."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = range(len(self))[index]
        record = self.dataset[row]
        item = {"image_states": self.states[int(self._epoch) % len(self.states), row], "labels": record["label"]}
        if "caption" in record:
            item["caption"] = record["caption"]
        return item

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_states": None}  # every process maps the file itself


def check_can_be_cached(model: AdaptedModel) -> None:
    """Raises ValueError if the model's image states change during training, or if no adapter is active."""
    learner = getattr(model, "learner", None)
    if learner is None:
        raise ValueError("`model` has no active adapter, which determines what to store; enable one with set_adapter.")
    learner.check_vision_is_frozen()
    if any(weight.requires_grad for weight in encoder_of(model.get_base_model()).vision_parameters()):
        raise ValueError(
            f"{learner.config.method} trains weights in the vision tower, whose output therefore changes with every "
            "step and cannot be stored; train on the pictures. (An adapter that only answers: requires_grad_(False).)"
        )


def cache_features(
    model: AdaptedModel,
    images: FewShotImages,
    views: int,
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float16,
    batch_size: int = 64,
    num_workers: int = 0,
) -> CachedImages:
    """The image states of the model's active adapter for the images, from `folder` if they are already stored.

    The output of the adapter's `image_states` is stored: image features (b, d), or TGP-T's tokens (b, p, d_v). It is
    reused if vision weights, transform, images, seed, `views` and `dtype` are the same; the file's name identifies
    them, so runs may share a folder. `num_workers` processes decode the pictures, or threads of this one. The file
    appears whole or not at all. With several processes, call it within `accelerator.main_process_first()`; the first
    makes the file, the others find it.

    Raises ValueError if no adapter is active, if the method learns in the vision tower, for `views` below 1, for an
    unknown `dtype`, for a folder without room, and for an image that cannot be read.
    """
    check_can_be_cached(model)
    learner, encoder = model.learner, encoder_of(model.get_base_model())
    if views < 1:
        raise ValueError(f"`views`={views} but every image needs one; choose 1 or more.")
    if dtype not in DTYPES:
        raise ValueError(f"`dtype`={dtype} cannot be kept; choose one of {', '.join(map(str, DTYPES))}.")

    wanted = _fingerprint(encoder, learner, images, views, dtype)
    path = Path(folder) / f"image_states-{hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]}.safetensors"
    fingerprint, seconds = _read_fingerprint(path)
    if fingerprint != wanted:
        seconds = 0.0
        if fingerprint is not None:
            logger.warning("%s is damaged; it is computed again.", path)
        states = _states_of(encoder, learner, images, views, batch_size, num_workers)
        _write(path, wanted, states, (views, len(images)), dtype)
    return CachedImages(images, path, seconds)


@torch.no_grad()
def _states_of(
    encoder: DualEncoder,
    learner: PromptLearner,
    images: FewShotImages,
    views: int,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Iterator[torch.Tensor]:
    """Yields image states, batch by batch and view by view."""
    model, training = encoder.model, encoder.model.training
    model.eval()
    try:
        for view in range(views):
            images.set_epoch(view)
            batches = pixel_batches(images, batch_size, num_workers)
            description, count = f"image features {view + 1}/{views}", math.ceil(len(images) / batch_size)
            for pixels in tqdm(batches, desc=description, total=count, leave=False, disable=None):
                yield learner.image_states(encoder, pixels.to(model.device))
    finally:
        model.train(training)


def encode_views(model: AdaptedModel, images: FewShotImages | CachedImages) -> Features:
    """The active adapter's `image_states` for all images: all views of stored features, or the first epoch's of
    pictures.
    """
    learner, encoder = model.learner, encoder_of(model.get_base_model())
    learner.check_vision_is_frozen()
    labels = torch.tensor(images.dataset["label"], device=encoder.model.device)
    if isinstance(images, CachedImages):
        return Features(images.states.to(encoder.model.device, encoder.dtype), labels)
    return Features(encode_pictures(encoder, learner, images, 1), labels)


def encode_pictures(
    encoder: DualEncoder, learner: PromptLearner, images: FewShotImages, views: int, num_workers: int = 0
) -> torch.Tensor:
    """`image_states` of this many views of all images: (views, n, ...)."""
    states = torch.cat(list(_states_of(encoder, learner, images, views, num_workers=num_workers)))
    return states.unflatten(0, (views, len(images)))


@torch.no_grad()
def encode_loader(model: AdaptedModel, loader: DataLoader, accelerator: Accelerator) -> Features:
    """The same for the images of a loader prepared by the accelerator: one view, all images in every process."""
    learner, encoder = model.learner, encoder_of(model.get_base_model())
    parts = []
    for batch in loader:
        states = batch.get("image_states")
        states = learner.image_states(encoder, batch["pixel_values"]) if states is None else states
        parts.append(accelerator.gather_for_metrics((states, batch["labels"])))
    return Features(torch.cat([states for states, _ in parts])[None], torch.cat([labels for _, labels in parts]))


def _write(
    path: Path,
    fingerprint: dict[str, str],
    batches: Iterator[torch.Tensor],
    leading: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    """A safetensors file with one tensor (views, images, ...), written batch by batch and renamed when it is whole.

    By hand because safetensors itself needs the whole tensor in memory; the format is a length, a JSON header and data.
    Not numpy's open_memmap: if the disk is full, writing to a mapping kills the process instead of raising.
    """
    start = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            first = next(batches)
            shape = [*leading, *first.shape[1:]]
            size = dtype.itemsize * torch.Size(shape).numel()
            free = shutil.disk_usage(path.parent).free
            if size > free:
                raise ValueError(
                    f"`views`={leading[0]} of {leading[1]} images take {size / 1e9:.1f} GB in {path.parent}, which has "
                    f"{free / 1e9:.1f} GB free; keep fewer views or choose another folder."
                )
            tensor = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [0, size]}

            def header(seconds: float) -> bytes:
                metadata = fingerprint | {_SECONDS: f"{seconds:012.3f}"}
                text = json.dumps({"__metadata__": metadata, "states": tensor}).encode()
                text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
                return len(text).to_bytes(8, "little") + text

            file.write(header(0))
            for states in itertools.chain([first], batches):
                stored = states.to("cpu", dtype)
                if not stored.isfinite().all():
                    raise ValueError(
                        f"`dtype`={dtype} cannot hold image states up to {states.abs().max().item():.3g}; choose "
                        "torch.float32."
                    )
                file.write(stored.contiguous().view(torch.uint8).numpy().data)
            file.seek(0)
            file.write(header(time.perf_counter() - start))  # as long as the one before
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# Whether a stored file is up to date ----------------------------------------------------------------------------------


def _read_fingerprint(path: Path) -> tuple[dict[str, str] | None, float]:
    """A file's fingerprint (empty if damaged) and the seconds it took to compute; None if there is no file."""
    if not path.is_file():
        return None, 0.0
    try:
        with safe_open(path, framework="pt") as file:
            file.get_slice("states")
            metadata = file.metadata() or {}
        return metadata, float(metadata.pop(_SECONDS, 0))  # which files of earlier versions do not have
    except (SafetensorError, OSError):
        return {}, 0.0


def _fingerprint(
    encoder: DualEncoder, learner: PromptLearner, images: FewShotImages, views: int, dtype: torch.dtype
) -> dict[str, str]:
    """Everything that image states depend on, in words or as a hash."""
    return {
        "method's view": learner.states_are,
        "model": hash_of_weights(encoder.vision_settings(), encoder.vision_parameters()),
        "transform": repr(images.transform),
        "data": _hash_of_images(images),
        "seed": str(images.seed),
        "views": str(views),
        "dtype": str(dtype),
        **({"switches": repr(switches)} if (switches := switches_in(encoder.model)) else {}),
    }


def _hash_of_images(images: FewShotImages) -> str:
    """A hash of the stored images in order; for a file, of its path, size and time of change. Labels may change."""
    digest = hashlib.sha256()
    for image in images.dataset.select_columns("image")["image"]:
        if image["bytes"] is not None:
            digest.update(hashlib.sha256(image["bytes"]).digest())
        else:
            status = os.stat(image["path"])
            digest.update(f"{image['path']} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
