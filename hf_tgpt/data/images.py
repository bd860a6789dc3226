"""From a stored image to the pixel values of a CLIP vision tower, with randomness only from a given generator."""

from __future__ import annotations

import functools
import io
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

_CROP_TRIES = 10
_ELONGATION = 100
# The kinds of files of the family of HEIC, as they stand behind the fifth byte.
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
HEIC_REMEDY = 'pip install "hf-tgpt[heic]"'


@functools.cache
def reads_heic() -> bool:
    """Whether HEIC, the format of iPhone pictures, can be read: pillow-heif is installed and registered with Pillow."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def decode_image(
    record: PILImage.Image | str | os.PathLike[str] | dict[str, Any], name_hint: str | None = None
) -> PILImage.Image:
    """An image as RGB, upright by its EXIF orientation, transparency on white, 16 bits scaled to 8.

    `record` is a PIL image, a path, or the {"bytes", "path"} that `datasets.Image(decode=False)` gives. Raises
    ValueError for what cannot be read, naming the path, else `name_hint`.

    Example:
        >>> hf_tgpt.data.decode_image("cat.jpg").mode
        'RGB'
    """
    source: object = record
    name = name_hint or "image in memory"
    if isinstance(record, dict):
        data, path = record.get("bytes"), record.get("path")
        source, name = (io.BytesIO(data) if data is not None else path), path or name
    elif isinstance(record, str | os.PathLike):
        name = os.fspath(record)
    if not isinstance(source, PILImage.Image | str | os.PathLike | io.BytesIO):
        raise ValueError(
            f"cannot read {name}: {type(source).__name__} is not an image; pass a PIL image, a path or {{bytes, path}}."
        )
    if isinstance(source, str | os.PathLike) and os.path.exists(source) and not os.path.isfile(source):
        # Opening a pipe waits for a writer.
        raise ValueError(f"cannot read {name}: it is a folder, a pipe or a device; name a file.")
    reads_heic()
    try:
        if isinstance(source, PILImage.Image):
            return _to_rgb(source)
        with PILImage.open(source) as image:
            return _to_rgb(image)
    except Exception as error:  # damaged files make Pillow raise nearly anything: OSError, SyntaxError, IndexError
        if not reads_heic() and _is_heic(source):
            raise ValueError(f"cannot read {name}: it is a HEIC picture; {HEIC_REMEDY} to read such.") from error
        raise ValueError(f"cannot read {name}: {_reason(error)}; replace or remove this image.") from error


def _is_heic(source: Any) -> bool:
    if isinstance(source, io.BytesIO):
        return source.getvalue()[4:8] == b"ftyp" and source.getvalue()[8:12] in _HEIC_BRANDS
    return isinstance(source, str | os.PathLike) and os.path.isfile(source) and _is_heic(io.BytesIO(_head(source)))


def _head(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        return file.read(12)


def _reason(error: Exception) -> str:
    """Why a picture could not be read, without addresses in memory, and without the path, which is named separately."""
    return "it is not a picture of a known kind" if isinstance(error, UnidentifiedImageError) else str(error)


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    if 0 in image.size:
        raise ValueError("it has no pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_eight_bits(image: PILImage.Image) -> PILImage.Image:
    """Scales wide pixels instead of clipping them as Pillow's own conversion would.

    Integers are taken as 8 bits if all fit, else as 16, and floats as 0..1 or else 0..255; values outside
    are stretched from their own range.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    ranges = (1.0, 255.0) if image.mode == "F" else (255.0, 65535.0)
    low, high = 0.0, next((high for high in ranges if values.max() <= high), ranges[-1])
    if values.min() < low or values.max() > high:
        low, high = values.min(), values.max()
    scaled = (values - low) / max(high - low, np.finfo(np.float64).tiny) * 255
    return PILImage.fromarray(np.round(scaled).astype(np.uint8))


@dataclass(frozen=True)
class ImageTransform:
    """An RGB image to (3, size, size) normalised pixel values, augmented if `train`.

    Training crops a random part of the image and flips it at random; evaluation resizes the shorter side, or with
    `squeeze` both sides, and crops the centre, and equals the image processor that it was built from. It holds no
    state: all randomness comes from the generator in the call, so that a resumed run gets the same pictures as an
    uninterrupted one.

    Source: random resized crop and flip as in CoOp (Zhou et al., IJCV 2022, section 4.1).

    Shapes and units: `size` and `shorter_side` (default: `size`) in pixels, `scale` in shares of the image's area,
    `ratio` as width / height, `mean` and `std` per channel of pixels in 0..1.

    Example:
        >>> transform = hf_tgpt.data.ImageTransform(224, mean=(0.5,) * 3, std=(0.5,) * 3, train=False)
        >>> tuple(transform(hf_tgpt.data.decode_image("cat.jpg")).shape)
        (3, 224, 224)
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train: bool
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5
    shorter_side: int | None = None
    resample: PILImage.Resampling = PILImage.Resampling.BICUBIC
    squeeze: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"`size`={self.size} but an image needs at least one pixel; choose 1 or more.")
        if self.shorter_side is not None and self.shorter_side < self.size:
            raise ValueError(
                f"`shorter_side`={self.shorter_side} but the crop has `size`={self.size}; choose {self.size} or more."
            )

    @classmethod
    def from_processor(
        cls, image_processor: BaseImageProcessor, train: bool, crop_scale: float = 0.08
    ) -> ImageTransform:
        """Takes sizes, mean, std and resampling filter from CLIP's image processor, or another model's like it.

        `crop_scale` is the smallest share of an image's area that a random crop of training shows.

        Raises ValueError if the resulting pictures are not square, and for steps that are not supported here.
        """
        size = image_processor.size
        square = {"height": size.get("height") or 0, "width": size.get("height") or 0}
        crops = getattr(image_processor, "do_center_crop", None)
        squeeze = dict(size) == square and not (crops and image_processor.crop_size["height"] > size["height"])
        offset = getattr(image_processor, "rescale_offset", False)  # of EfficientNet's: values minus 1, not in 0..1
        for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            needless = squeeze if step == "do_center_crop" else offset if step == "do_normalize" else False
            if not needless and not getattr(image_processor, step, None):
                raise ValueError(
                    f"`{step}`=False but CLIP's preprocessing has this step; use a processor that takes it."
                )
        crop = image_processor.crop_size if crops else size
        if crop["height"] != crop["width"]:
            raise ValueError(
                f"`crop_size`={crop['height']}x{crop['width']} is not square; use a processor with a square crop."
            )
        if not squeeze and not size.get("shortest_edge"):
            raise ValueError(
                f"`size`={dict(size)} names no shortest_edge; use a processor that keeps the aspect ratio."
            )
        mean, std = _in_unit_range(image_processor, offset)
        return cls(
            size=crop["height"],
            mean=mean,
            std=std,
            train=train,
            scale=(crop_scale, 1.0),
            shorter_side=size["height"] if squeeze else size["shortest_edge"],
            resample=PILImage.Resampling(image_processor.resample),
            squeeze=squeeze,
        )

    def __call__(self, image: PILImage.Image, rng: np.random.Generator | None = None) -> torch.Tensor:
        """`image` (RGB, any size) to float32 (3, size, size); `rng` is needed if `train` and unused otherwise."""
        if image.mode != "RGB":
            raise ValueError(f"`image` has mode {image.mode}, not RGB; pass it through decode_image first.")
        if not self.train and self.squeeze:
            side = self.shorter_side or self.size
            cropped = _centre(image.resize((side, side), self.resample), self.size)
        elif not self.train:
            cropped = self._centre_crop(image)
        elif rng is None:
            raise ValueError("`rng`=None but training crops and flips at random; pass a numpy Generator.")
        else:
            cropped = self._random_crop(image, rng)
        pixels = np.asarray(cropped, dtype=np.float32) / 255  # (size, size, 3)
        pixels = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # (3, size, size)

    def _random_crop(self, image: PILImage.Image, rng: np.random.Generator) -> PILImage.Image:
        left, top, width, height = self._random_box(*image.size, rng)
        box = (left, top, left + width, top + height)
        cropped = image.resize((self.size, self.size), self.resample, box=box)
        return ImageOps.mirror(cropped) if rng.random() < self.flip_probability else cropped

    def _random_box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Left, top, width and height of a box of random area and shape, in pixels of the image."""
        for _ in range(_CROP_TRIES):
            area = width * height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 1 <= w <= width and 1 <= h <= height:
                return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
        # Too elongated for any attempt to fit: the largest centred box of an allowed shape.
        w = max(1, min(width, round(height * self.ratio[1])))
        h = max(1, min(height, round(width / self.ratio[0])))
        return (width - w) // 2, (height - h) // 2, w, h

    def _centre_crop(self, image: PILImage.Image) -> PILImage.Image:
        short = min(image.size)
        if max(image.size) > _ELONGATION * short:
            # Departs from the image processor, which enlarges a strip of 30,000 x 1 pixels to gigabytes for its centre.
            width, height = (min(side, _ELONGATION * short) for side in image.size)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        # Rounded down, as the image processor does: one pixel more would move the crop.
        width, height = (int(side * (self.shorter_side or self.size) / short) for side in image.size)
        return _centre(image.resize((width, height), self.resample), self.size)


def _centre(image: PILImage.Image, size: int) -> PILImage.Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _in_unit_range(image_processor: BaseImageProcessor, offset: bool) -> tuple[Any, Any]:
    """A processor's mean and std per channel for pixels in 0..1, whatever range it scales them to."""
    unit = 255 * image_processor.rescale_factor  # the value it gives for 1
    normalizes = image_processor.do_normalize
    mean, std = (image_processor.image_mean, image_processor.image_std) if normalizes else ([0.0] * 3, [1.0] * 3)
    # EfficientNet's divides by the standard deviation once more for classification.
    again = image_processor.image_std if getattr(image_processor, "include_top", False) else [1.0] * 3
    return (
        tuple((value + bool(offset)) / unit for value in mean),
        tuple(value * twice / unit for value, twice in zip(std, again, strict=True)),
    )


class FewShotImages(torch.utils.data.Dataset):
    """The rows of a dataset as {"pixel_values", "labels"[, "caption"]}, decoded and transformed on access.

    The dataset has the columns `image`, `label` and, optionally, `caption`. The augmentation of a picture depends on
    (`seed`, epoch, row) and on nothing else: neither on the number of workers nor on where a run was resumed.

    Shapes: `pixel_values` (3, size, size) float32; `labels` an int, `caption` a string.

    Raises ValueError for a missing column and, on access to a row, for an image that cannot be read.

    Example:
        >>> transform = hf_tgpt.data.ImageTransform(224, mean=(0.5,) * 3, std=(0.5,) * 3, train=True)
        >>> images = hf_tgpt.data.FewShotImages(hf_tgpt.data.load_splits("pictures")["train"], transform)
        >>> tuple(images[0]["pixel_values"].shape), images[0]["labels"]
        ((3, 224, 224), 0)
    """

    def __init__(self, dataset: Dataset, transform: ImageTransform, seed: int = 0) -> None:
        missing = [column for column in ("image", "label") if column not in dataset.column_names]
        if missing:
            raise ValueError(
                f"`dataset` lacks the column {missing[0]!r}; available: {', '.join(dataset.column_names)}; rename one."
            )
        columns = [column for column in ("image", "label", "caption") if column in dataset.column_names]
        # Undecoded, so that decode_image can name the file that it cannot read.
        self.dataset = dataset.with_format(None).select_columns(columns).cast_column("image", Image(decode=False))
        self.transform = transform
        self.seed = seed
        # Shared memory, so that persistent workers, which hold a copy of this object, see a new epoch too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the augmentations of this epoch; call it before iterating."""
        self._epoch.fill_(epoch)

    def check(self) -> None:
        """Decodes every image once; raises ValueError naming the first that cannot be read."""
        for row, record in enumerate(self.dataset):
            decode_image(record["image"], name_hint=f"row {row}")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = range(len(self))[index]  # a negative index means the same picture as its positive one
        record = self.dataset[row]
        rng = np.random.default_rng([self.seed, int(self._epoch), row])
        image = decode_image(record["image"], name_hint=f"row {row}")
        item = {"pixel_values": self.transform(image, rng), "labels": record["label"]}
        if "caption" in record:
            item["caption"] = record["caption"]
        return item


class Collator:
    """Makes a batch of images and labels and, given a tokenizer, of captions, padded and cut to `max_length` tokens.

    A row's image is its `pixel_values` or, from `hf_tgpt.training.features`, its `image_states`.

    Example:
        >>> collate = hf_tgpt.data.Collator()
        >>> tuple(collate([images[0], images[1]])["pixel_values"].shape)
        (2, 3, 32, 32)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int | None = None):
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        image = "image_states" if "image_states" in rows[0] else "pixel_values"
        batch = {
            image: torch.stack([row[image] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }
        if self.tokenizer is not None:
            captions = [row["caption"] for row in rows]
            options = dict(padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
            batch["caption_ids"] = self.tokenizer(captions, **options).input_ids
        return batch
