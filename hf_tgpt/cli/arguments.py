"""The command line of the programs, made from the dataclasses that it fills."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapters.config import PEFT_FIELDS
from ..data import BENCHMARKS, find_benchmark, read_class_descriptions
from ..data.fewshot import CLASSES
from ..hub.loading import method_configs
from ..utils.files import read_json
from ..adapters.registry import methods
from ..training.config import TrainingConfig

# Filled from the data and the base model, not by hand.
_NOT_ARGUMENTS = PEFT_FIELDS | {
    "class_names",
    "base_model_dimensions",
    "base_model_fingerprint",
    "trained_on",
    "hf_tgpt_version",
}
# What a recipe file may hold besides arguments.
_RECIPE_NOTES = ("source", "note")
DEFAULT_METHOD = "tgpt"
RECIPES_FOLDER = Path(__file__).parent / "recipes"
RECIPES = {"papers": "{}.json", "toy": "toy_{}.json"}
_COLUMNS = ("image", "label", "caption")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What every program says about the base model and the images; `data_arguments` reads it."""
    add = parser.add_argument
    add("--model", help="a CLIP: a Hub id or folder; a folder with only config files starts at random")
    add(
        "--dataset",
        default="toyworld:codes",
        help="toyworld:TASK[/DOMAIN]; a folder of pictures; a .csv, .tsv, .jsonl, .parquet or .tar file; a Hub id; or "
        f"a known data set, NAME or NAME:FOLDER, one of {', '.join(BENCHMARKS)} (default: %(default)s)",
    )
    add(
        "--classes",
        choices=CLASSES,
        default="all",
        help="base and new are the first and the second half of the classes (default: %(default)s)",
    )
    for column in _COLUMNS:
        add(f"--{column}_column", help=f"the {column} column of a file or Hub data set (default: found by its type)")
    add("--splits", help="a split file of CoOp's (split_zhou_*.json) for the pictures of the folder")
    add("--draw", help="a published few-shot draw (JSON) that the training and validation images are cut to")
    add("--class_names_file", help="other class names: a line each, NAME or NAME IN THE DATA<tab>NAME, or a .json file")
    add(
        "--class_descriptions",
        help="a .json file {class: [sentences]} (as CuPL's) for zero-shot CLIP, in place of templates",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What a training says beside that and beside the fields of its configs."""
    add = parser.add_argument
    add("--shots", type=int, default=16, help="training images per class (default: %(default)s)")
    add("--allow_fewer", action="store_true", help="accept classes with fewer images than shots")
    add(
        "--descriptions",
        help="of the training images, for TGP-T: .jsonl as `hf-tgpt describe` writes, .txt of "
        "image<tab>description<tab>class, or .json of sentences for each class",
    )
    add(
        "--cache_features",
        type=int,
        help="keep what the vision tower says of so many augmented views of each training image and train on that "
        "alone, for methods without visual prompts (default: live images)",
    )
    add("--cache_dir", type=Path, help="where they are kept, and looked for first (default: in --output_dir)")
    add("--output_dir", type=Path, help="a folder without a run in it (default: a new one in runs/)")
    add("--resume", action="store_true", help="go on from the checkpoint in --output_dir")
    add("--mixed_precision", choices=["no", "bf16", "fp16"], help="(default: as accelerate is set up)")
    add("--log_with", help="a tracker of accelerate's, such as tensorboard or wandb (default: none)")
    add("--push_to_hub", metavar="USER/NAME", help="publish the adapter there when it is trained")
    add("--private", action="store_true", default=None, help="make that repository private")
    add_json_argument(parser)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the results as JSON and nothing else on stdout")


def data_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `load_splits` but for the seed."""
    names = (*(f"{column}_column" for column in _COLUMNS), "splits", "draw", "class_names_file")
    return {"source": args.dataset} | {name: getattr(args, name) for name in names}


def zero_shot_templates(
    args: argparse.Namespace, class_names: list[str], templates: list[str] | None = None
) -> dict[str, Any]:
    """Zero-shot's config: the class descriptions, else `templates`, else those of a known data set or the plainest."""
    if args.class_descriptions:
        return {"templates": read_class_descriptions(args.class_descriptions, class_names)}
    benchmark, _ = find_benchmark(args.dataset)
    if benchmark is not None:
        templates = templates or benchmark.templates
    return {"templates": templates} if templates else {}


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses `--method` and `--config` first, then all fields of that method's config and of `TrainingConfig`.

    A recipe is a JSON object of arguments by name; what is given on the command line overrides it. Returns the
    namespace with `method_config` (fields for the config class), `training_config` (a TrainingConfig) and `settings`
    (all that decides a run's outcome, which a resumed run must share). Ends the
    program with an explanation for an unknown method, field or value.
    """
    names = ", ".join(method_configs())
    parser.add_argument("--method", help=f"one of {names} (default: the recipe's, or {DEFAULT_METHOD})")
    parser.add_argument(
        "--config",
        type=Path,
        help="a recipe, a JSON file of arguments, or the name of one of hf_tgpt/recipes (default: METHOD.json or "
        "toy_METHOD.json there)",
    )
    parser.add_argument(
        "--recipes",
        choices=list(RECIPES),
        help="which of the two: the papers' or those for a toy of a CLIP (default: the papers' with --model, else toy)",
    )
    parser.add_argument(
        "-h", "--help", action="help", help="show this help, with the fields of the method given, and exit"
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    first, _ = parser.parse_known_args([argument for argument in arguments if argument not in ("-h", "--help")])
    try:
        _check_method(first.method or DEFAULT_METHOD)
        kind = first.recipes or ("toy" if first.model is None else "papers")
        recipe_path = _recipe_file(first.config or Path(RECIPES[kind].format(first.method or DEFAULT_METHOD)))
        recipe = read_recipe(recipe_path, first.method)
    except ValueError as error:
        parser.error(str(error))
    method = recipe["method"]
    config = method_configs()[method]
    method_group = parser.add_argument_group(f"{config.__name__} ({method})")
    training_group = parser.add_argument_group("training")
    method_fields = [field for field in dataclasses.fields(config) if field.name not in _NOT_ARGUMENTS]
    for group, owner, fields in (
        (method_group, config, method_fields),
        (training_group, TrainingConfig, dataclasses.fields(TrainingConfig)),
    ):
        hints = typing.get_type_hints(owner)
        for field in fields:
            _add_field(group, field, hints[field.name], recipe)
    known = {action.dest for action in parser._actions}
    unknown = sorted(set(recipe) - known - set(_RECIPE_NOTES))
    if unknown:
        parser.error(f"{recipe_path}: `{unknown[0]}` is no argument of {method}; see --help.")
    benchmark, _ = find_benchmark(first.dataset)
    if benchmark is not None and benchmark.only_tested:
        parser.error(f"`dataset`={first.dataset!r} has a test split only; train on another and use `hf-tgpt evaluate`.")
    if benchmark is not None and "templates" in known:
        parser.set_defaults(templates=benchmark.templates)
    for action in parser._actions:
        if action.dest in recipe and not _fits(recipe[action.dest], action):
            parser.error(f"{recipe_path}: `{action.dest}`={recipe[action.dest]!r} is not what --{action.dest} takes.")
    parser.set_defaults(**{name: value for name, value in recipe.items() if name not in _RECIPE_NOTES})
    result = parser.parse_args(arguments)
    if getattr(result, "push_to_hub", None) and method not in methods():
        parser.error(f"`push_to_hub`: {method} is a reference; what can be published is one of {', '.join(methods())}.")
    if getattr(result, "resume", False) and result.output_dir is None:
        parser.error("`resume` needs the run's folder; name it by --output_dir.")
    result.config = recipe_path
    result.method_config = {field.name: getattr(result, field.name) for field in method_fields}
    try:
        result.training_config = TrainingConfig(
            **{field.name: getattr(result, field.name) for field in dataclasses.fields(TrainingConfig)}
        )
    except ValueError as error:
        parser.error(str(error))
    apart = {
        "config",
        "recipes",
        "output_dir",
        "resume",
        "log_with",
        "push_to_hub",
        "private",
        "json",
        "cache_dir",
        "num_workers",
        "save_every",
        "keep_checkpoints",
        "method_config",
        "training_config",
    }
    result.settings = {name: value for name, value in vars(result).items() if name not in apart}
    return result


def read_recipe(path: Path, method: str | None = None) -> dict:
    """A recipe's arguments, `method` among them. Raises ValueError if it cannot be read or is another method's."""
    try:
        recipe = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"`config`={str(path)!r} is no readable JSON file ({error}).") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"`config`={str(path)!r} must hold a JSON object of arguments.")
    found = recipe.setdefault("method", method or DEFAULT_METHOD)
    if not isinstance(found, str):
        raise ValueError(f"`config`={str(path)!r} names as `method` {found!r}, which is no name.")
    if found != (method or found):
        raise ValueError(f"`config`={str(path)!r} is a recipe of another method than `method`={method!r}.")
    _check_method(found)
    return recipe


def _recipe_file(path: Path) -> Path:
    """The file, or where there is none, that of this name among the package's recipes."""
    ours = RECIPES_FOLDER / path.name
    return ours if not path.exists() and path.name == str(path) and ours.is_file() else path


def _check_method(method: str) -> None:
    if method not in method_configs():
        raise ValueError(f"`method`={method!r} is unknown; choose one of {', '.join(method_configs())}.")


def _add_field(
    group: argparse._ArgumentGroup, field: dataclasses.Field[Any], hint: Any, recipe: dict[str, Any]
) -> None:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    default = recipe.get(field.name, default)
    options = {"default": default, "help": field.metadata["help"].replace("%", "%%")}
    if default is not None:
        origin = ", by the recipe" if field.name in recipe else ""
        options["help"] += f" (here: {default}{origin})".replace("%", "%%")
    kind = typing.get_args(hint)[0] if _is_optional(hint) else hint
    if typing.get_origin(kind) is list:
        options |= {"nargs": "+", "type": typing.get_args(kind)[0]}
    elif _is_optional(hint):
        options["type"] = functools.partial(_none_or, kind)
    else:
        options["type"] = kind
    if kind is bool:
        options.pop("type")
        group.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **options)
        return
    group.add_argument(f"--{field.name}", metavar=getattr(kind, "__name__", "value").upper(), **options)


def _none_or(kind: type, text: str) -> Any:
    return None if text.lower() == "none" else kind(text)


def _fits(value: Any, action: argparse.Action) -> bool:
    """Whether a recipe's value, which may also be written as on the command line, is of the type of an argument."""
    if action.nargs == 0:  # a switch
        return isinstance(value, bool)
    if action.nargs == "+" and value is not None:
        return isinstance(value, list) and all(type(item) is action.type for item in value)
    kind = action.type.args[0] if isinstance(action.type, functools.partial) else action.type
    kinds: dict[Any, tuple[type, ...]] = {int: (int, str), float: (int, float, str)}
    return value is None or (isinstance(value, kinds.get(kind, (str,))) and not isinstance(value, bool))


def _is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
