"""Requests to `hf-tgpt serve`: pictures and options, their limits, and errors with status and remedy."""

from __future__ import annotations

import difflib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from .untrusted import PIXELS, from_base64


@dataclass(frozen=True)
class Limits:
    """A server's limits: bytes, pictures, seconds and class names per request, pixels per picture, queue length."""

    body: int = 32 * 2**20
    pictures: int = 64
    pixels: int = PIXELS
    queue: int = 256
    timeout: float = 30.0
    class_names: int = 1000


class Refused(Exception):
    """A refused request: its HTTP status, the reason with the remedy, and the field to change."""

    def __init__(self, status: int, message: str, field: str | None = None, **more: Any):
        super().__init__(message)
        self.status, self.content = status, {"error": message, "field": field} | more


class Options(BaseModel):
    """The options of a request, as in `Classifier.__call__`; the descriptions appear on the API's page."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = Field(None, description="Name of the adapter; needed if several are served.")
    top_k: int | None = Field(5, ge=1, description="Classes per picture; null: all.")
    class_names: list[str] | None = Field(None, description="Other classes for open methods; otherwise a subset.")
    scores: Literal["softmax", "sigmoid"] = Field("softmax", description="sigmoid: for SigLIP, each class by itself.")
    coverage: float | None = Field(None, gt=0, lt=1, description="Share of answers with the right class, such as 0.9.")
    reject: bool = Field(False, description="Whether pictures of none of the classes get no label.")


@dataclass
class Picture:
    """A picture of a request and its name in errors; if `data` is None, `problem` has the reason."""

    name: str
    data: bytes | None
    problem: str = ""


async def read_request(request: Request, limits: Limits, hold: Callable[[int], None]) -> tuple[list[Picture], Options]:
    """The pictures and options of a request: a form with files, JSON, or one picture as the body.

    `hold` is called with the number of bytes of each part of the body, and may refuse it. Raises Refused for a request
    that is malformed or too large.
    """
    request = Request(request.scope, _limited(request, limits.body, hold))
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    given: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        _add(given, name, value)
    if kind == "multipart/form-data":
        pictures = await _from_form(request, given, limits)
    elif kind == "application/json":
        pictures = _from_json(await request.body(), given)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        body = await request.body()
        pictures = [Picture("the body", body)] if body else []
    else:
        raise Refused(
            415,
            f"`Content-Type` is {kind!r}; send multipart/form-data, application/json, image/* or "
            "application/octet-stream.",
            "Content-Type",
        )
    options = _options(given)
    if not pictures:
        raise Refused(400, "`images` has no picture; send one or more.", "images")
    if len(pictures) > limits.pictures:
        raise Refused(413, f"`images` has {len(pictures)} pictures; send at most {limits.pictures}.", "images")
    return pictures, options


def _limited(request: Request, most: int, hold: Callable[[int], None]) -> Any:
    """Receives a request's parts, and refuses it after this many bytes."""
    refused = Refused(413, f"The request is larger than {most:,} bytes; send fewer or smaller pictures.", "body")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise refused
    parts: AsyncIterator[bytes] = request.stream()
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        part = await anext(parts, b"")
        read += len(part)
        if read > most:
            raise refused
        hold(len(part))
        return {"type": "http.request", "body": part, "more_body": bool(part)}

    return receive


async def _from_form(request: Request, given: dict[str, Any], limits: Limits) -> list[Picture]:
    pictures: list[Picture] = []
    most = limits.class_names + len(Options.model_fields)
    try:
        # One more than the limit, so that our error, which has a remedy, comes first.
        async with request.form(max_files=limits.pictures + 1, max_fields=most) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    pictures.append(Picture(value.filename or name, await value.read()))
                elif name == "images":
                    pictures.append(_from_text(f"images[{len(pictures)}]", value))
                else:
                    _add(given, name, value)
    except HTTPException as error:
        if "Too many files" in str(error.detail):
            raise Refused(413, f"`images` has too many pictures; send at most {limits.pictures}.", "images") from error
        raise Refused(400, f"The form cannot be read ({error.detail}); correct it.", "body") from error
    return pictures


def _from_json(body: bytes, given: dict[str, Any]) -> list[Picture]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body is not JSON ({error}); correct it.", "body") from error
    if not isinstance(content, dict):
        raise Refused(400, 'The body is JSON but not an object; send {"images": [...]}.', "body")
    images = content.pop("images", [])
    given.update(content)
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list):
        raise Refused(422, "`images` is not a list; send strings of base64 in one.", "images")
    return [_from_text(f"images[{place}]", text) for place, text in enumerate(images)]


def _from_text(name: str, text: Any) -> Picture:
    try:
        return Picture(name, from_base64(text))
    except ValueError as error:
        return Picture(name, None, str(error))


def _add(given: dict[str, Any], name: str, value: Any) -> None:
    """Adds an option of a query or form, in which a list is a repeated name."""
    if name == "class_names":
        given.setdefault(name, []).append(value)
    elif name in given:
        raise Refused(422, f"`{name}` is there twice; send it once.", name)
    else:
        given[name] = value


def _options(given: dict[str, Any]) -> Options:
    names = given.get("class_names")
    if isinstance(names, list) and len(names) == 1 and "," in str(names[0]):
        how = "repeat it for each: class_names=ant&class_names=dog, or send a list in JSON"
        raise Refused(422, f"`class_names`={names[0]!r} is a single name; {how}.", "class_names")
    try:
        return Options(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, {*Options.model_fields, "images"} - {name}, n=1)
            remedy = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(Options.model_fields)}."
            raise Refused(422, f"`{name}` is unknown; {remedy}", name) from error
        what = Options.model_fields[name].description
        raise Refused(422, f"`{name}`={given[name]!r}: {first['msg'].lower()}. ({what})", name) from error
