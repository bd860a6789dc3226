"""Untrusted pictures: bytes and base64 that are checked before they are decoded."""

from __future__ import annotations

import base64
import binascii
import functools
import io
import re

from PIL import Image as PILImage

from ..data.images import reads_heic

PIXELS = 50_000_000
# Pillow's other formats start programs such as Ghostscript, or are for printing and medicine.
_KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "MPO", "PPM")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)


def from_base64(text: object) -> bytes:
    """The bytes of a picture in base64, with or without the head of a data URI. Raises ValueError for anything else.

    Example:
        >>> from_base64("data:image/png;base64,iVBORw0KGgo=")[1:4]
        b'PNG'
    """
    if not isinstance(text, str):
        raise ValueError("it is not a string; send base64.")
    head, comma, rest = text.partition(",") if text[:5].lower() == "data:" else ("", "", text)
    if comma and not head.lower().endswith(";base64"):
        raise ValueError("it is a data URI without base64; send data:image/jpeg;base64,...")
    if _ADDRESS.match(rest):
        raise ValueError("it is an address, and nothing is fetched; send the picture itself.")
    try:
        return base64.b64decode("".join(rest.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("it is not base64; send the bytes of a picture file in base64.") from None


def check_picture(data: bytes, pixels: int = PIXELS) -> None:
    """Raises ValueError for bytes that are not a picture in a web format, or have too many pixels.

    It reads only the file's header.

    Example:
        >>> with open("cat.jpg", "rb") as file:
        ...     check_picture(file.read())
    """
    try:
        with PILImage.open(io.BytesIO(data), formats=_formats()) as image:
            width, height = image.size
    except PILImage.DecompressionBombError:
        raise ValueError(f"it has more pixels than the {pixels:,} that are taken; make it smaller.") from None
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise ValueError("it is damaged or not a picture of a known kind; send a JPEG, PNG or WebP file.") from error
    if width * height > pixels:
        raise ValueError(f"it has {width} x {height} pixels; make it smaller, of at most {pixels:,}.")


@functools.cache
def _formats() -> list[str]:
    reads_heic()
    PILImage.init()
    return [kind for kind in _KINDS if kind in PILImage.OPEN]
