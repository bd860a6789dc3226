"""Pictures of every odd kind become pixel values or are refused by name, in time and without eating memory."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from test_fuzz import limits

from hf_tgpt.data import ImageTransform, decode_image
from hf_tgpt.data.readers.folders import is_picture

EVALUATION = ImageTransform(224, (0.5,) * 3, (0.5,) * 3, train=False)
TRAINING = ImageTransform(224, (0.5,) * 3, (0.5,) * 3, train=True)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def grey_ramp(dtype, step):
    return Image.fromarray((np.arange(2000).reshape(40, 50) * step).astype(dtype))


def png_of_zeros(width, height):
    """A black PNG, which packs a thousand to one, written without ever holding its pixels."""
    packer, row = zlib.compressobj(9), bytes(1 + -(-width // 8))
    data = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def with_orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return dict(exif=exif)


FINE = {
    "one pixel.png": noise(1, 1),
    "30000 x 1.png": noise(30_000, 1),
    "1 x 30000.png": noise(1, 30_000),
    "30000 x 200.jpg": noise(30_000, 200),
    "two colours.png": noise(9, 7).convert("1"),
    "palette.gif": noise(9, 7).convert("P"),
    "grey and alpha.png": noise(9, 7).convert("LA"),
    "cmyk.jpg": noise(9, 7).convert("CMYK"),
    "lab.tiff": noise(9, 7).convert("LAB"),
    "ycbcr.jpg": noise(9, 7).convert("YCbCr"),
    "16 bit.png": grey_ramp(np.uint16, 32),
    "32 bit.tiff": grey_ramp(np.int32, 1_000_000),
    "floats.tiff": grey_ramp(np.float32, 0.5),
}
REFUSED = {
    "empty.png": b"",
    "text.jpg": b"no picture",
    "html.png": b"<!doctype html><title>404</title>",
    "header alone.png": png_of_zeros(8, 8)[:33],
    "no width.png": png_of_zeros(0, 8),
    "bomb.png": png_of_zeros(30_000, 30_000),
    "bomb of no data.png": png_of_zeros(2**31 - 1, 1)[:60],
}


@pytest.mark.parametrize("name", FINE)
def test_an_odd_picture_becomes_pixel_values(name, tmp_path):
    FINE[name].save(tmp_path / name)
    with limits():
        image = decode_image(tmp_path / name)
        for transform in (EVALUATION, TRAINING):
            pixels = transform(image, np.random.default_rng(0))
            assert pixels.shape == (3, 224, 224)
            assert torch.isfinite(pixels).all()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_refused_by_name(name, tmp_path):
    (tmp_path / name).write_bytes(REFUSED[name])
    with limits(), pytest.raises(ValueError, match=f"cannot read .*{name}: .*; replace or remove this image"):
        decode_image(tmp_path / name)


def test_a_picture_in_memory_without_pixels_is_refused():
    with pytest.raises(ValueError, match="cannot read row 3: it has no pixels"):
        decode_image(Image.new("RGB", (0, 5)), name_hint="row 3")


@pytest.mark.parametrize("format", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_frame_is_read(format, tmp_path):
    frames = [Image.new("RGB", (8, 8), (250, 0, 0)), *(Image.new("RGB", (8, 8), (0, 0, i)) for i in range(99))]
    frames[0].save(tmp_path / f"a.{format}", save_all=True, append_images=frames[1:])
    assert decode_image(tmp_path / f"a.{format}").getpixel((0, 0)) == pytest.approx((250, 0, 0), abs=3)


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_of_exif_and_those_it_does_not_know(orientation, tmp_path):
    noise(8, 6).save(tmp_path / "a.jpg", **with_orientation(orientation))
    assert decode_image(tmp_path / "a.jpg").size == ((6, 8) if 5 <= orientation <= 8 else (8, 6))


def test_the_middle_of_a_strip_is_what_the_whole_strip_would_give():
    """Up to where the resampling starts, a strip that is cut first looks the same."""
    strip = noise(150, 1).resize((300, 2), Image.Resampling.NEAREST)
    transform = ImageTransform(8, (0.0,) * 3, (1.0,) * 3, train=False)
    whole = strip.resize((1200, 8), transform.resample).crop((596, 0, 604, 8))
    expected = torch.from_numpy(np.asarray(whole, dtype=np.float32) / 255).permute(2, 0, 1)
    torch.testing.assert_close(transform(strip), expected, atol=0.01, rtol=0)


def test_an_iphones_pictures_are_read_by_an_extra_which_is_named_where_it_is_missing(tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    file = tmp_path / "IMG_0001.HEIC"
    Image.new("RGB", (64, 48), (200, 40, 40)).save(file, format="HEIF")
    red, green, _ = decode_image(file).getpixel((30, 20))
    assert red > 150 > 80 > green
    assert is_picture(file)
    monkeypatch.setattr("hf_tgpt.data.images.reads_heic", lambda: False)
    monkeypatch.setattr("hf_tgpt.data.readers.folders.reads_heic", lambda: False)
    monkeypatch.setattr(Image, "open", lambda *_: (_ for _ in ()).throw(UnidentifiedImageError("no such kind")))
    for source in (file, {"bytes": file.read_bytes(), "path": None}):
        with pytest.raises(ValueError, match=r'it is a HEIC picture; pip install "hf-tgpt\[heic\]" to read such'):
            decode_image(source)
    assert not is_picture(file)
