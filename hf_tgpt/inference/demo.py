"""The web page of `hf-tgpt demo`: a picture's classes beside those of zero-shot CLIP, and the model's attention."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import logging
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from PIL import Image as PILImage

from ..methods.zero_shot import ZeroShotConfig, zero_shot_beside
from .classifier import Classifier
from .confusions import PredictedAs
from .examples import Examples
from .explain import attention_pictures
from .pictures import address, load_image, small_address

if TYPE_CHECKING:
    import gradio

SHOWN = 10  # classes
MOST = 1000  # names in an edited list: each needs a pass through the text tower
COVERAGE = 0.9  # of the sets of classes
_TEMPLATE = Path(__file__).with_name("demo.html.jinja")


@dataclass(frozen=True)
class Score:
    """A class, and its probabilities with the adapter and with zero-shot CLIP among the same classes."""

    label: str
    adapted: float
    zero_shot: float


@dataclass(frozen=True)
class Trusted:
    """The result of the adapter's calibration for a picture.

    `nearest` is the nearest class if the picture shows none of them, else None. Otherwise `labels` include the right
    class for the share `coverage` of pictures; the calibration used `count` pictures.
    """

    nearest: str | None
    labels: list[str]
    coverage: float
    count: int


class Demonstration:
    """A classifier beside zero-shot CLIP on the same base model, without the adapter.

    Zero-shot CLIP uses the `templates` of the classifier's config if there are any, else the plainest one. Beside an
    answer are the nearest `examples` and, from `predictions`, how often answers of that class were right in a test.
    """

    def __init__(
        self,
        classifier: Classifier,
        examples: Examples | None = None,
        predictions: Mapping[str, PredictedAs] | None = None,
    ):
        config, names = classifier.model.learner.config, classifier.class_names
        self.method = config.method.lower()
        self.templates = getattr(config, "templates", ZeroShotConfig(class_names=names).templates)
        zero_shot = zero_shot_beside(classifier.model, names, templates=self.templates)
        self.adapted, self.zero_shot = classifier, Classifier(zero_shot, classifier.transform)
        self.examples, self.predictions = examples, predictions or {}

    def answer(self, picture: dict[str, Any] | None, classes: str) -> str:
        """The page's HTML for an uploaded picture, {"path", "orig_name"}, and classes, one per line.

        Problems with either are shown there, too.
        """
        if picture is None:
            return _html()
        try:
            names = self._class_names(classes)
            image = _read(picture)
            scores, pictures = self.compare(image, names), attention_pictures(self.adapted, image)
            trusted = self.trusted(image, names)
        except ValueError as error:
            return _html(problem=str(error))
        addresses = {title: address(map) for title, map in pictures.items()}
        best = scores[0].label
        facts: dict[str, Any] = dict(method=f"adapter ({self.method})", count=len(names), sentence=self._sentence())
        facts |= {"trusted": trusted, "wanted": COVERAGE, "calibrated": self.adapted.calibration is not None}
        if set(names) == set(self.adapted.class_names) and not (trusted and trusted.nearest):
            facts["predicted"] = self.predictions.get(best)  # only from a test among the same classes
        if self.examples is not None:
            nearest = self.examples.nearest(image, best)
            facts["examples"] = [(small_address(each.picture), each.label, each.cosine) for each in nearest]
            facts["described"] = self.examples.described
        return _html(scores=scores, pictures=addresses, best=best, **facts)

    def compare(self, image: PILImage.Image, class_names: list[str]) -> list[Score]:
        """The adapter's ten most likely classes, most likely first, and zero-shot CLIP's first if it is not among them.

        Raises ValueError for bad class names.
        """
        ((_, adapted),) = self.adapted.stream([image], None, class_names=class_names)
        ((_, zero_shot),) = self.zero_shot.stream([image], None, class_names=class_names)
        beside = {part["label"]: part["score"] for part in zero_shot}
        return [
            Score(label, part["score"], beside[label])
            for place, part in enumerate(adapted)
            if (label := part["label"]) is not None and (place < SHOWN or label == zero_shot[0]["label"])
        ]

    def trusted(self, image: PILImage.Image, class_names: list[str]) -> Trusted | None:
        """The calibration's result for the picture; None if it is not for these classes.

        If it has too few pictures for a coverage of 0.9, the coverage is the largest possible one.
        """
        calibration = self.adapted.calibration_for(class_names)
        if calibration is None or not calibration.is_for(class_names):
            return None
        coverage = min(COVERAGE, math.floor(100 * calibration.largest_coverage) / 100)
        reject = calibration.reject_below is not None
        ((_, answer),) = self.adapted.stream([image], class_names=class_names, coverage=coverage, reject=reject)
        labels = [part["label"] for part in answer if part["label"] is not None]
        return Trusted(answer[0].get("nearest"), labels, coverage, calibration.count)

    def _class_names(self, classes: str) -> list[str]:
        names = [line.strip() for line in classes.splitlines() if line.strip()]
        most = max(MOST, len(self.adapted.class_names))
        if not names:
            raise ValueError("The class list is empty; write a class on each line.")
        if len(names) > most:
            raise ValueError(
                f"The list has {len(names)} classes and this page takes {most}; shorten it, or classify with "
                "`hf-tgpt predict --class_names_file`, which takes any number."
            )
        return names

    def _sentence(self) -> str:
        if isinstance(self.templates, dict):
            return "sentences about it"
        others = f" and {len(self.templates) - 1} more" if len(self.templates) > 1 else ""
        return f"“{self.templates[0]}”{others}"


def make_page(demonstration: Demonstration, title: str) -> gradio.Blocks:
    """The page, which makes no requests to other servers and keeps a dropped picture for an hour."""
    import gradio as gr

    classifier = demonstration.adapted
    with gr.Blocks(analytics_enabled=False, title=title, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {title}\nThe adapter beside zero-shot CLIP, the same model without it.")
        with gr.Row():
            with gr.Column(min_width=300):
                picture = gr.Image(
                    label="Picture", type="filepath", sources=["upload", "clipboard"], height=320, buttons=[],
                )  # fmt: skip
                edited = "Any classes, one per line" if classifier.takes_new_classes else "Classes, fixed in training"
                classes = gr.Textbox(
                    "\n".join(classifier.class_names),
                    label=edited, lines=6, max_lines=12, interactive=classifier.takes_new_classes,
                )  # fmt: skip
                button = gr.Button("Classify", variant="primary")
            with gr.Column(min_width=300):
                shown = gr.HTML(_html())
        # Without gradio's preprocessing, which opens the file and shows its own error if it is not a picture.
        gr.on(
            [picture.change, button.click], demonstration.answer, [picture, classes], shown,
            preprocess=False, concurrency_limit=1, trigger_mode="always_last", api_name="classify",
        )  # fmt: skip
        page.queue(api_open=False)  # otherwise requests could bypass the queue and all run at once
    return page


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address. Raises ValueError if it cannot, naming the port."""
    if not 0 <= port <= 65535:
        raise ValueError(f"`port`={port}: choose 1 to 65535, or 0 for any free port.")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"`port`={port} is in use on {host}; choose another.") from error
        raise ValueError(f"cannot listen on `host`={host!r}, `port`={port} ({error}); choose another.") from error


def serve(page: gradio.Blocks, listener: socket.socket) -> None:
    """Answers at the listener's address until SIGINT or SIGTERM, then deletes the dropped pictures."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    # The theme's own font has no Latin letters in the semibold file that gradio brings.
    font = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))
    theme = gr.themes.Default(font=[font, "system-ui", "sans-serif"])
    # Not page.launch(), which checks over HTTP whether it runs, and so fails behind a proxy.
    app = gr.mount_gradio_app(
        FastAPI(), page, "/", footer_links=[], run_history=False, max_file_size="50mb", ssr_mode=False, pwa=False,
        mcp_server=False, enable_monitoring=False, theme=theme,
    )  # fmt: skip
    page.has_launched = True  # without launch(), gradio would accept any file on this machine as a dropped one

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Connections of open pages end by cancellation, which uvicorn would report as errors.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C, which uvicorn raises again after it has stopped
        server.run(sockets=[listener])


def require_gradio() -> None:
    """Raises ValueError without gradio, saying how to install it."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('The page needs gradio: pip install "hf-tgpt[demo]".')


def _read(picture: dict[str, Any]) -> PILImage.Image:
    try:
        return load_image({"path": picture["path"]})
    except ValueError as error:
        name = picture.get("orig_name") or "This file"
        raise ValueError(f"{name} cannot be read as a picture; drop another one.") from error


def _html(**facts: Any) -> str:
    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(facts)
