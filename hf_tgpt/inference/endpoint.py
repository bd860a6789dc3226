"""The custom handler of an adapter's repository for the Hub's Inference Endpoints."""

from __future__ import annotations

import inspect
import os
from typing import Any

from PIL import Image as PILImage

from .answers import Answer
from .loading import load_classifier
from .untrusted import check_picture, from_base64

# From requests of the zero-shot task.
_SYNONYMS = {"candidate_labels": "class_names"}


class EndpointHandler:
    """The adapter in a folder, called the way the Hub does: `handler({"inputs": ..., "parameters": ...})`.

    `inputs` is a picture or a list of them: a PIL image, which the toolkit makes from a request of type image/*, the
    bytes of a file, or base64, with or without the head of a data URI. `parameters` are those of a `Classifier`'s call:
    top_k, class_names (or candidate_labels), scores, coverage and reject. Nothing is fetched, and no path is opened.

    Raises ValueError for anything else, naming it.

    Example:
        >>> handler = EndpointHandler("runs/my-run")
        >>> with open("cat.jpg", "rb") as file:
        ...     handler({"inputs": file.read(), "parameters": {"top_k": 1}})  # [{"label": "cat", "score": 0.9}]
    """

    def __init__(self, path: str | os.PathLike[str] = ""):
        self.classifier = load_classifier(os.path.abspath(path))
        self._known = list(inspect.signature(self.classifier.question).parameters)

    def __call__(self, data: dict[str, Any]) -> Answer | list[Answer]:
        """The answer to a picture, [{"label", "score"}, ...], or a list of answers."""
        if "inputs" not in data:
            raise ValueError("`inputs` is missing; send a picture there, in base64.")
        inputs, parameters = data["inputs"], data.get("parameters") or {}
        asked = {_SYNONYMS.get(name, name): value for name, value in parameters.items()}
        if unknown := sorted(asked.keys() - set(self._known)):
            raise ValueError(f"`parameters` has {unknown[0]!r}; known are {', '.join(self._known)}.")
        pictures = (
            [_picture(f"inputs[{i}]", each) for i, each in enumerate(inputs)] if isinstance(inputs, list) else None
        )
        answers = self.classifier(_picture("inputs", inputs) if pictures is None else pictures, **asked)
        return answers  # type: ignore[return-value]  # only an iterator gets an iterator


def _picture(name: str, given: Any) -> bytes | PILImage.Image:
    """A picture that the classifier may read."""
    if isinstance(given, PILImage.Image):
        return given
    try:
        content = bytes(given) if isinstance(given, bytes | bytearray | memoryview) else from_base64(given)
        check_picture(content)
    except ValueError as error:
        raise ValueError(f"`{name}` cannot be read: {error}") from error
    return content
