"""The recipes in hf_tgpt/recipes: JSON files of training's arguments, by method."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..methods import method_name
from ..utils.files import read_json
from .config import TrainingConfig

# The default methods: on the toy world, which demonstrates the package, and on the user's own pictures. GDA led the
# comparison on real pictures (README), and takes one pass over them and no GPU.
TOY_METHOD, DEFAULT_METHOD = "tgpt", "gda"
RECIPES_FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = {"papers": "{}.json", "toy": "toy_{}.json"}
# What a recipe file may hold besides arguments.
NOTES = ("source", "note")


def read_recipe(path: Path, method: str | None = None, default: str = DEFAULT_METHOD) -> dict[str, Any]:
    """A recipe's arguments, including `method`, which is `default` if the recipe names none.

    Raises ValueError if it cannot be read or is another method's.
    """
    try:
        recipe = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"`config`={str(path)!r} is not a readable JSON file ({error}).") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"`config`={str(path)!r} must hold a JSON object of arguments.")
    named = recipe.get("method", method or default)
    if not isinstance(named, str):
        raise ValueError(f"`config`={str(path)!r} has `method` {named!r}, which is not a name.")
    recipe["method"] = method_name(named)
    if method is not None and recipe["method"] != method_name(method):
        raise ValueError(f"`config`={str(path)!r} is a recipe for a method other than `method`={method!r}.")
    return recipe


def training_of(method: str) -> TrainingConfig:
    """How a method's paper trains it; the defaults if there is no recipe.

    Example:
        >>> config = training_of("zs_lp")
    """
    path = RECIPES_FOLDER / RECIPES["papers"].format(method_name(method))
    recipe = read_recipe(path) if path.is_file() else {}
    names = {own.name for own in dataclasses.fields(TrainingConfig)}
    return TrainingConfig(**{name: value for name, value in recipe.items() if name in names})
