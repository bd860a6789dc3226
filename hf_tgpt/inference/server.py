"""The server of `hf-tgpt serve`: adapters by name over HTTP; pictures of all requests share the models' batches."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import jinja2
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from ..utils.version import __version__
from .answers import Answer, Question, row_of
from .batching import Batcher
from .classifier import Classifier
from .counters import KIND, Counters
from .requests import Limits, Options, Picture, Refused, read_request
from .untrusted import check_picture

_TEMPLATE = Path(__file__).with_name("server.html.jinja")
_BODIES_AT_A_TIME = 8  # requests of the largest size that are in memory at a time
_PICTURES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_BODIES = {
    "multipart/form-data": {"schema": {"type": "object", "properties": {"images": _PICTURES}}},
    "application/json": {"schema": {"type": "object", "required": ["images"]}},
    "image/*": {"schema": {"type": "string", "format": "binary"}},
}
_ERRORS = {
    400: "malformed",
    413: "too large",
    415: "unsupported type of content",
    422: "an unavailable option, or no readable picture",
    500: "server error",
    503: "busy; try again after the number of seconds in Retry-After",
}


class Service:
    """Classifiers by name, and what their requests share: batches, threads that decode, limits and counters."""

    def __init__(
        self, classifiers: Mapping[str, Classifier], limits: Limits, max_batch: int = 32, max_wait: float = 0.005
    ):
        self.classifiers, self.limits, self.counters = dict(classifiers), limits, Counters()
        self.batcher = Batcher(self._classify, max_batch, max_wait)
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="pictures")
        self._in_use = 0  # the queue's occupied places
        self._held = 0  # bytes of bodies that are not decoded yet

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """Runs the batcher while the server runs."""
        async with self.batcher:
            yield
        self._threads.shutdown()

    async def answer(self, request: Request) -> dict[str, Any]:
        """The content of the answer to a request. Raises Refused."""
        with self._places(1):  # before the body is read, so that waiting bodies are limited too
            try:
                return await asyncio.wait_for(self._answer(request), self.limits.timeout)
            except asyncio.TimeoutError:
                raise Refused(
                    503,
                    f"The answer took more than {self.limits.timeout:g} seconds; try again, or send fewer pictures.",
                ) from None

    async def _answer(self, request: Request) -> dict[str, Any]:
        with ExitStack() as places:
            with self._memory() as hold:
                pictures, options = await read_request(request, self.limits, hold)
                places.enter_context(self._places(len(pictures) - 1))
                name = self._model(options)
                question = await self._in_thread(self._question, name, options)
                pixels = await asyncio.gather(*(self._in_thread(self._pixels, name, picture) for picture in pictures))
            readable = [(question, values) for values in pixels if values is not None]
            answers = iter(await self.batcher((name, *question.names), readable) if readable else [])
        asked = {"coverage"} if question.coverage is not None else set()
        found: list[Answer | None] = [None if values is None else next(answers) for values in pixels]
        rows = [
            row_of(picture.name, answer, picture.problem, asked)
            for picture, answer in zip(pictures, found, strict=True)
        ]
        for outcome, count in (("answered", len(readable)), ("unreadable", len(pictures) - len(readable))):
            self.counters.pictures.labels(name, outcome).inc(count)
        if not readable:
            named = "; ".join(f"{picture.name}: {picture.problem}" for picture in pictures[:3])
            raise Refused(422, f"`images` has no picture that can be read ({named})", "images", results=rows)
        return {"model": name, "results": rows}

    def _model(self, options: Options) -> str:
        known = ", ".join(self.classifiers)
        if options.model is None and len(self.classifiers) > 1:
            raise Refused(422, f"`model` is not given and several are served; name one of {known}.", "model")
        name = next(iter(self.classifiers)) if options.model is None else options.model
        if name not in self.classifiers:
            raise Refused(422, f"`model`={name!r} is not served; name one of {known}.", "model")
        return name

    def _question(self, name: str, options: Options) -> Question:
        classifier, asked = self.classifiers[name], options.model_dump(exclude={"model"})
        most = max(self.limits.class_names, len(classifier.class_names))
        if len(options.class_names or []) > most:
            raise Refused(
                422, f"`class_names` has {len(options.class_names or [])} names; send at most {most}.", "class_names"
            )
        try:
            return classifier.question(**asked)
        except ValueError as error:
            named = re.match(r"`(\w+)`", str(error))
            raise Refused(422, str(error), named[1] if named else "class_names") from error

    def _pixels(self, name: str, picture: Picture) -> torch.Tensor | None:
        """A picture's pixel values; None, with the problem set on the picture, if it cannot be read."""
        if picture.data is None:
            return None
        try:
            check_picture(picture.data, self.limits.pixels)
            return self.classifiers[name].pixel_values(picture.data)
        except ValueError as error:
            picture.problem = str(error).removeprefix("cannot read image in memory: ")
            return None
        finally:
            picture.data = None

    def _classify(self, key: Any, items: list[tuple[Question, torch.Tensor]]) -> Sequence[Answer]:
        self.counters.batch.observe(len(items))
        questions, pixels = zip(*items, strict=True)
        return self.classifiers[key[0]].answers_to(questions, torch.stack(pixels))

    async def _in_thread(self, call: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    @contextmanager
    def _memory(self) -> Iterator[Callable[[int], None]]:
        """A function that counts bytes until the end of the block, and raises Refused if all requests have too many."""
        held = 0

        def hold(count: int) -> None:
            nonlocal held
            held += count
            self._held += count
            if self._held > _BODIES_AT_A_TIME * self.limits.body:
                raise Refused(503, "Too many large requests are being read; try again in a second.")

        try:
            yield hold
        finally:
            self._held -= held

    @contextmanager
    def _places(self, count: int) -> Iterator[None]:
        """Takes places in the queue, one for each picture. Raises Refused while there are too few."""
        if self._in_use + count > self.limits.queue:
            raise Refused(503, "`queue`: too many pictures are waiting; try again in a second.")
        self._in_use += count
        self.counters.queue.set(self._in_use)
        try:
            yield
        finally:
            self._in_use -= count
            self.counters.queue.set(self._in_use)


def make_app(service: Service) -> FastAPI:
    """The service's HTTP interface. Its pages make no requests to other servers."""
    # FastAPI's own pages load their scripts from elsewhere.
    app = FastAPI(title="hf-tgpt serve", version=__version__, lifespan=service.running, docs_url=None, redoc_url=None)
    named = Options.model_json_schema()["properties"].items()
    parameters = [
        {"name": name, "in": "query", "description": schema.pop("description"), "schema": schema}
        for name, schema in named
    ]
    described: dict[str, Any] = {"parameters": parameters, "requestBody": {"required": True, "content": _BODIES}}
    responses: dict[int | str, dict[str, Any]] = {status: {"description": text} for status, text in _ERRORS.items()}

    @app.post("/predict", openapi_extra=described, responses=responses, summary="The classes of pictures")
    async def predict(request: Request) -> JSONResponse:
        """Pictures are files in a form, `images` in JSON as base64 or data URIs, or the body itself.

        In JSON and in forms, options may also stand beside the pictures. A picture that cannot be read has an `error`
        in place of an answer.
        """
        start, status = time.perf_counter(), 500
        try:
            answer = await service.answer(request)
            status = 200
            return JSONResponse(answer)
        except Refused as refused:
            status = refused.status
            raise
        finally:
            service.counters.requests.labels(str(status)).inc()
            service.counters.seconds.observe(time.perf_counter() - start)

    @app.get("/health", summary="Whether the server is ready")
    async def health() -> dict[str, Any]:
        """The models are loaded before the server answers anything."""
        return {"status": "ready", "models": list(service.classifiers)}

    @app.get("/models", summary="What is served")
    async def models() -> dict[str, Any]:
        """Each model's method and classes, and whether it takes other classes and is calibrated."""
        return {"models": [_facts(name, classifier) for name, classifier in service.classifiers.items()]}

    @app.get("/metrics", summary="Counts for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(service.counters.text(), media_type=KIND)

    @app.get("/docs", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
        models = [_facts(name, classifier) for name, classifier in service.classifiers.items()]
        return HTMLResponse(page.render(api=app.openapi(), models=models, address=request.base_url))

    @app.exception_handler(Refused)
    async def refuse(request: Request, refused: Refused) -> JSONResponse:
        headers = {"Retry-After": "1"} if refused.status == 503 else None
        return JSONResponse(refused.content, refused.status, headers)

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(
            {"error": f"{request.url.path}: {error.detail}; see /docs.", "field": None}, error.status_code
        )

    @app.exception_handler(500)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "The server failed; its log says why.", "field": None}, 500)

    return app


def serve(app: FastAPI, listener: socket.socket, timeout: float) -> None:
    """Serves at the listener's address until SIGINT or SIGTERM, then finishes the pending requests and returns."""
    wait = int(timeout) + 1
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=wait
    )
    # uvicorn ends by raising the signal again, for earlier handlers.
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)


def warm_up(classifiers: Mapping[str, Classifier]) -> None:
    """Runs each classifier once, so that the first request does not wait for one-time work."""
    for classifier in classifiers.values():
        size = classifier.transform.size
        classifier.answers_to([classifier.question()], torch.zeros(1, 3, size, size))


def _facts(name: str, classifier: Classifier) -> dict[str, Any]:
    return {
        "name": name,
        "method": classifier.model.learner.config.method.lower(),
        "class_names": classifier.class_names,
        "takes_new_classes": classifier.takes_new_classes,
        "calibrated": classifier.calibration_for(classifier.class_names) is not None,
    }
