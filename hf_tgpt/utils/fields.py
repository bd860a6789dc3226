"""Dataclasses whose fields have a help text and are checked whenever they are set.

The check is `huggingface_hub.dataclasses.strict`; here its errors become ValueErrors in this package's words, and a
field keeps its value if a new one is refused.
"""

import dataclasses
import inspect
import math
import os
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from huggingface_hub.errors import StrictDataclassFieldValidationError
from typing_extensions import dataclass_transform

from .compat import strict
from .notebook import html_table

Check = Callable[[Any], None]
_Class = TypeVar("_Class")


def documented(default: Any, help: str, *checks: Check) -> Any:
    """A field with its help. A default list is copied for each object; a check raises ValueError with the remedy."""
    metadata = {"help": help, "validator": list(checks)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def at_least(least: float, remedy: str = "") -> Check:
    """A check for numbers from `least` upwards; None is allowed wherever the type allows it."""

    def check(value: float | None) -> None:
        if value is not None and not value >= least:
            raise ValueError(remedy or f"choose {least} or more.")

    return check


def at_most(most: float) -> Check:
    """A check for numbers up to `most`."""

    def check(value: float | None) -> None:
        if value is not None and not value <= most:
            raise ValueError(f"choose {most} or less.")

    return check


def above(bound: float) -> Check:
    """A check for numbers above `bound`."""

    def check(value: float | None) -> None:
        if value is not None and not value > bound:
            raise ValueError(f"choose a number above {bound}.")

    return check


def below(bound: float, remedy: str = "") -> Check:
    """A check for numbers below `bound`."""

    def check(value: float | None) -> None:
        if value is not None and not value < bound:
            raise ValueError(remedy or f"choose a number below {bound}.")

    return check


def between(least: float, most: float) -> Check:
    """A check for numbers from `least` to `most`."""

    def check(value: float | None) -> None:
        if value is not None and not least <= value <= most:
            raise ValueError(f"choose {least} to {most}.")

    return check


def one_of(*choices: str) -> Check:
    """A check for one of several words."""

    def check(value: str | None) -> None:
        if value is not None and value not in choices:
            raise ValueError(f"choose one of {', '.join(choices)}.")

    return check


_MOST = 5  # elements of a list that are shown
# Fields that a config sets itself.
_NOTES = {"peft_type", "peft_version", "hf_tgpt_version", "base_model_dimensions", "base_model_fingerprint"}


def _changed(config: Any) -> dict[str, str]:
    """The fields that differ from their defaults, as a user would type them; long lists are shortened."""
    shown = {}
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.name in _NOTES or value == default:
            continue
        text = repr(value)
        if isinstance(value, list) and len(value) > _MOST:
            text = f"[{', '.join(map(repr, value[:_MOST]))}, ... {len(value)} in all]"
        shown[field.name] = text
    return shown


def _repr(config: Any) -> str:
    fields = ", ".join(f"{name}={text}" for name, text in _changed(config).items())
    return f"{type(config).__name__}({fields})"


def _repr_html(config: Any) -> str:
    return html_table(type(config).__name__, _changed(config))


@dataclass_transform()  # without specifiers: "documented" takes its default by position
def checked(cls: type[_Class]) -> type[_Class]:
    """`@dataclass`, with every field checked when it is set: first its type, then its own checks.

    Raises ValueError that names the field, the value and the remedy. Fields need real types: no
    `from __future__ import annotations` in the file.
    """
    made: Any = strict(dataclasses.dataclass(cls, repr=False))
    set_checked = made.__setattr__
    fields = {field.name: field for field in dataclasses.fields(made)}

    def set_field(self: Any, name: str, value: Any) -> None:
        field = fields.get(name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}`={value!r}: choose a finite number.")
        try:
            set_checked(self, name, value if field is None else _converted(value, field.type))
        except StrictDataclassFieldValidationError as error:
            assert field is not None  # only fields are checked
            remedy = _remedy(field, value, error)
            raise ValueError(remedy if remedy.startswith("`") else f"`{name}`={value!r}: {remedy}") from None

    made.__setattr__ = set_field
    made.__repr__, made._repr_html_ = _repr, _repr_html
    helps = [f"    {name}: {field.metadata['help']}" for name, field in fields.items() if "validator" in field.metadata]
    made.__doc__ = "\n".join([inspect.getdoc(made) or "", "", "Args:", *helps])  # what help() shows
    return made


def _remedy(field: dataclasses.Field, value: Any, error: Exception) -> str:
    """The message of the field's own check for a value, or of a wrong type."""
    if isinstance(error.__cause__, TypeError):
        for check in field.metadata.get("validator", ()):
            try:
                check(value)
            except ValueError as reason:
                return str(reason)
            except TypeError:  # the check expects a value of the right type
                continue
        kind = field.type.__name__ if isinstance(field.type, type) and not typing.get_args(field.type) else field.type
        return f"choose a value of type {kind}."
    return str(error.__cause__)


def _converted(value: Any, kind: Any) -> Any:
    """Converts what Python users and JSON write for a field: a whole number for a float, any sequence or array for a
    list, a NumPy number, a path for a name.
    """
    kinds = {typing.get_origin(part) or part for part in (*typing.get_args(kind), kind)}
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) is int and float in kinds and int not in kinds:
        return float(value)
    if isinstance(value, os.PathLike) and str in kinds:
        return os.fspath(value)
    if list in kinds and isinstance(value, Iterable) and not isinstance(value, str | bytes | list | Mapping):
        return value.tolist() if hasattr(value, "tolist") else list(value)
    return value
