"""The arguments of training and evaluation, parsed from the command line and from recipes into dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import type_validator
from transformers import HfArgumentParser

from ..adapters.config import PromptConfig
from ..data import BENCHMARKS, find_benchmark, read_class_descriptions
from ..data.fewshot import CLASSES
from ..methods import available_methods, config_class, method_name
from ..training.config import TrainingConfig
from ..training.recipes import DEFAULT_METHOD, NOTES, RECIPES, RECIPES_FOLDER, TOY_METHOD, read_recipe
from ..utils.compat import spelled
from ..utils.names import TOY
from .options import DTYPE, DTYPES, JSON, CommandParser, underscored
from .words import in_options, speak_of

# The base model for pictures unless --model names another; the toy CLIP was not trained on photographs.
DEFAULT_MODEL = "openai/clip-vit-base-patch16"
# Arguments that may change when a run is resumed.
_NOT_SETTINGS = {
    "config", "recipes", "output_dir", "resume", "log_with", "push_to_hub", "private", "json", "cache_dir",
    "num_workers", "save_every", "keep_checkpoints", "strict", "allow_fewer", "report",
}  # fmt: skip
# Options of gradient descent, which methods fitted in closed form do not use.
_OF_STEPS = (
    "optimizer", "learning_rate", "weight_decay", "adam_epsilon", "batch_size", "gradient_accumulation_steps", "epochs",
    "max_steps", "warmup_steps", "warmup_epochs", "warmup_learning_rate", "max_grad_norm", "non_finite",
    "evaluate_every", "save_every", "keep_checkpoints",
)  # fmt: skip


def _option(default: Any, help: str, **options: Any) -> Any:
    return field(default=default, metadata={"help": help, **options})


@dataclass
class DataArguments:
    """The base model and the images."""

    model: str | None = _option(
        None,
        "a CLIP or another dual encoder: a Hub id or folder; a folder with only config files gives random weights "
        f"(default: {DEFAULT_MODEL}; for the toy world {TOY}, the toy CLIP of this package)",
    )
    dataset: str = _option(
        "toyworld:codes",
        "toyworld:TASK[/DOMAIN]; a folder of pictures; a .csv, .tsv, .jsonl, .parquet or .tar file; a Hub id; or "
        f"a known data set, NAME or NAME:FOLDER, one of {', '.join(BENCHMARKS)}",
    )
    classes: str = _option("all", "base and new: the first and the second half of the classes", choices=list(CLASSES))
    image_column: str | None = _option(None, "the image column of a file or Hub data set (default: found by its type)")
    label_column: str | None = _option(None, "the label column of a file or Hub data set (default: found by its type)")
    caption_column: str | None = _option(
        None, "the caption column of a file or Hub data set (default: found by its type)"
    )
    splits: str | None = _option(None, "one of CoOp's split files (split_zhou_*.json) for the pictures in the folder")
    draw: str | None = _option(
        None, "a published few-shot draw (JSON), which selects the training and validation images"
    )
    class_names_file: str | None = _option(
        None, "a file of other class names: one per line, NAME or NAME IN THE DATA<tab>NAME, or .json"
    )
    class_descriptions: str | None = _option(
        None, "a .json file {class: [sentences]} (as in CuPL) for zero-shot CLIP, instead of templates"
    )

    @property
    def source(self) -> dict[str, Any]:
        """The arguments of `load_splits` except the seed."""
        names = ("image_column", "label_column", "caption_column", "splits", "draw", "class_names_file")
        return {"source": self.dataset} | {name: getattr(self, name) for name in names}

    def zero_shot_templates(self, class_names: list[str], templates: list[str] | None = None) -> dict[str, Any]:
        """Templates for zero-shot: the class descriptions, else `templates`, else the known data set's, if any."""
        if self.class_descriptions:
            return {"templates": read_class_descriptions(self.class_descriptions, class_names)}
        benchmark, _ = find_benchmark(self.dataset)
        if benchmark is not None:
            templates = templates or benchmark.templates
        return {"templates": templates} if templates else {}


@dataclass
class RunArguments:
    """The options of a training run that are not fields of a config."""

    shots: int = _option(16, "training images per class (default: 16, or all images of a class that has fewer)")
    allow_fewer: bool = _option(False, "accept classes with fewer images than --shots")
    strict: bool = _option(False, "stop if there is any problem with the data, instead of listing it and training")
    descriptions: str | None = _option(
        None,
        "a file that describes the training images, for TGP-T: .jsonl as written by `hf-tgpt describe`, .txt of "
        "image<tab>description<tab>class, or .json of sentences for each class",
    )
    cache_features: int | None = _option(
        None,
        "number of augmented views of each training image to encode once; training then uses these stored features. "
        "For methods without visual prompts (default: encode images in every step)",
    )
    cache_dir: Path | None = _option(None, "the folder of stored features (default: in --output_dir)")
    output_dir: Path | None = _option(None, "a folder that does not contain a run (default: a new one in runs/)")
    resume: bool = _option(False, "continue from the checkpoint in --output_dir")
    mixed_precision: str | None = _option(
        None, "(default: as configured in accelerate)", choices=["no", "bf16", "fp16"]
    )
    dtype: str = _option(DTYPES[0], f"{DTYPE} (default: fp32)", choices=DTYPES)
    report: bool = _option(
        True, "write report.html, on what the adapter gets wrong, and predictions.csv (off: --no_report)"
    )
    log_with: str | None = _option(None, "one of accelerate's trackers, such as tensorboard or wandb (default: none)")
    push_to_hub: str | None = _option(None, "publish the trained adapter in this repository", metavar="USER/NAME")
    private: bool = _option(False, "make that repository private")
    json: bool = _option(False, JSON)


@dataclass
class Arguments:
    """The arguments of one training run."""

    method: str
    recipe: Path | None  # the file
    method_config: dict[str, Any]  # fields of the method's config
    data: DataArguments
    run: RunArguments
    training: TrainingConfig
    method_by_default: bool = False  # not chosen by the user

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that affect the outcome, and so must be the same when a run is resumed."""
        parts = (*(vars(part) for part in (self.data, self.run)), dataclasses.asdict(self.training), self.method_config)
        merged = {name: value for part in parts for name, value in part.items() if name not in _NOT_SETTINGS}
        return {"method": self.method} | merged


def parse_arguments(
    arguments: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
    examples: str = "",
) -> Arguments:
    """Parses `--method` and `--config` first, then all fields of that method's config and of the other dataclasses.

    A recipe is a JSON object of arguments by name; the command line overrides it. An unknown method, field or value
    ends the program with an explanation.
    """
    arguments = underscored(sys.argv[1:] if arguments is None else arguments)
    choice = _choice_parser(prog)
    first, _ = choice.parse_known_args([argument for argument in arguments if argument not in ("-h", "--help")])
    try:
        method, recipe_file, recipe = _chosen(first)
    except ValueError as error:
        speak_of(choice)
        choice.error(in_options(str(error)))
    kinds = _kinds([method], recipe)
    parser = _training_parser(choice, kinds, description, examples)
    _apply_recipe(parser, recipe_file, recipe, kinds)
    data, run, training, of_method, _ = parser.read(arguments)
    try:
        result = Arguments(
            method,
            recipe_file,
            vars(of_method),
            DataArguments(**vars(data)),
            RunArguments(**vars(run)),
            TrainingConfig(**vars(training)),
            method_by_default=first.method is None and first.config is None,
        )
        config_class(method)(class_names=["any", "other"], **result.method_config)  # those about the data come later
    except ValueError as error:
        parser.error(in_options(str(error)))
    result.data.model = base_model_of(result.data.model, result.data.dataset)
    given = {argument.partition("=")[0] for argument in arguments}
    idle = sorted(given & {f"--{name}" for name in (*_OF_STEPS, "descriptions")})
    if result.method_by_default and method == DEFAULT_METHOD and idle:
        parser.error(
            f"{idle[0]} has no effect on {DEFAULT_METHOD}, the default method for your own pictures; "
            f"name the method that it is for, such as --method {TOY_METHOD}."
        )
    if "--shots" not in given and "shots" not in recipe:
        result.run.allow_fewer = True
    for name in ("shots", "cache_features"):
        if (value := getattr(result.run, name)) is not None and value < 1:
            parser.error(f"--{name}={value}: choose 1 or more.")
    benchmark, _ = find_benchmark(result.data.dataset)
    if benchmark is not None and benchmark.only_tested:
        parser.error(
            f"--dataset={result.data.dataset!r} has only a test split; train on another data set "
            "and use `hf-tgpt evaluate`."
        )
    if benchmark is not None and "templates" in result.method_config and not {"--templates"} & given:
        result.method_config["templates"] = recipe.get("templates", benchmark.templates)
    if result.run.resume and result.run.output_dir is None:
        parser.error("--resume needs the run's folder; name it with --output_dir.")
    return result


def parser_of(owner: type, group: str, **options: Any) -> Parser:
    """A parser of one dataclass's fields, in a group of that title, to which a program adds its own options."""
    return Parser([_for_parser(owner, group)], **options)


def parser_of_all_methods() -> Parser:
    """A parser of the options of every method at once, for completion in a shell."""
    choice = _choice_parser(None)
    next(action for action in choice._actions if action.dest == "method").choices = list(available_methods())
    return _training_parser(choice, _kinds(list(available_methods())))


def _choice_parser(prog: str | None) -> Parser:
    """Adds the options that choose a method and its recipe."""
    choice = Parser(prog=prog, add_help=False)
    choice.add_argument("--method", help=f"one of {', '.join(available_methods())} (default: the recipe's, or "
                        f"{DEFAULT_METHOD}; on the toy world {TOY_METHOD})")  # fmt: skip
    choice.add_argument("--config", type=Path, help="a recipe, a JSON file of arguments, or the name of one of "
                        "hf_tgpt/recipes (default: METHOD.json or toy_METHOD.json there)")  # fmt: skip
    choice.add_argument("--recipes", choices=list(RECIPES), help="the papers' recipes, or those for a toy CLIP "
                        "(default: toy with the toy CLIP, else the papers')")  # fmt: skip
    choice.add_argument("--model", help=argparse.SUPPRESS)
    choice.add_argument("--dataset", default=DataArguments.dataset, help=argparse.SUPPRESS)
    return choice


def _kinds(methods: Sequence[str], recipe: dict[str, Any] | None = None) -> list[type]:
    """The dataclasses whose fields are the options of a training with these methods."""
    return [
        _for_parser(DataArguments, "base model and images"),
        _for_parser(RunArguments, "run"),
        _for_parser(TrainingConfig, "training", recipe),
        *(
            _for_parser(config_class(method), f"{config_class(method).__name__} ({method})", recipe, _not_by_hand())
            for method in methods
        ),
    ]


def _training_parser(
    choice: Parser, kinds: Sequence[type], description: str | None = None, examples: str = ""
) -> Parser:
    options = dict(prog=choice.prog, description=description, usage="%(prog)s [options]", examples=examples)
    parser = Parser(kinds, parents=[choice], conflict_handler="resolve", **options)
    parser.lead_with("dataset", "method", "model", "shots", "output_dir")
    return parser


# How dataclasses become options --------------------------------------------------------------------------------------


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds the default to each help text that does not mention it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = any(action.default is value for value in (None, False, argparse.SUPPRESS)) or action.default == []
        if silent or "(default:" in (action.help or ""):
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(CommandParser, HfArgumentParser):
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **({"formatter_class": _Help} | options))
        for action in self._actions:  # HfArgumentParser adds each option with hyphens, too
            underscores = [option for option in action.option_strings if "-" not in option.lstrip("-")]
            action.option_strings = underscores or action.option_strings
        for own in (own for kind in self.dataclass_types for own in dataclasses.fields(kind)):
            if own.type is bool and own.default is not True:  # if the default is True, HfArgumentParser adds it itself
                self.add_argument(f"--no_{own.name}", action="store_false", dest=own.name, help=argparse.SUPPRESS)

    def read(self, arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
        """The dataclasses filled from the arguments (None: the process's), followed by all other arguments.

        Ends the program for an unknown argument.
        """
        speak_of(self)
        *parts, unknown = self.parse_args_into_dataclasses(
            underscored(sys.argv[1:] if arguments is None else arguments),
            look_for_args_file=False,  # a file that happens to be named like the program
            return_remaining_strings=True,
        )
        self.refuse_unknown(unknown, _owners())
        return tuple(parts)


def _chosen(first: argparse.Namespace) -> tuple[str, Path | None, dict[str, Any]]:
    """The method, the file of its recipe and what is in it; a method without a recipe has an empty one."""
    default = TOY_METHOD if first.dataset.startswith("toyworld") else DEFAULT_METHOD
    method = method_name(first.method or default)
    kind = first.recipes or ("toy" if base_model_of(first.model, first.dataset) is None else "papers")
    if first.config is None:  # one of ours, not a file of such a name in the working folder
        files = [RECIPES_FOLDER / RECIPES[source].format(method) for source in (kind, "papers")]  # few toys need others
    else:
        name = first.config.name.removesuffix(".json")
        ours = [RECIPES_FOLDER / f"{spelling}.json" for spelling in (name, name.replace("-", "_"))]
        files = [first.config, *(ours if str(first.config) == first.config.name else [])]
    path = next((file for file in files if file.is_file()), first.config)
    if path is None:
        return method, None, {}
    recipe = read_recipe(path, first.method, default)
    return recipe.pop("method"), path, recipe


def base_model_of(model: str | None, dataset: str) -> str | None:
    """The model that --model and --dataset select; None is the toy CLIP."""
    if model is None and not dataset.startswith("toyworld"):
        return DEFAULT_MODEL
    return None if model == TOY else model


def _owners() -> dict[str, list[str]]:
    """The methods that have each config field."""
    owners: dict[str, list[str]] = {}
    for method, kind in available_methods().items():
        for own in dataclasses.fields(kind):
            if own.name not in _not_by_hand():
                owners.setdefault(own.name, []).append(method)
    return owners


def _not_by_hand() -> set[str]:
    """Fields of a config that are filled from the data and the base model."""
    return {field.name for field in dataclasses.fields(PromptConfig)}


def _for_parser(owner: type, group: str, recipe: dict[str, Any] | None = None, without: set[str] | None = None) -> type:
    """A copy of a dataclass for HfArgumentParser, which changes the field types of its dataclasses."""
    hints, recipe, copies = typing.get_type_hints(owner), recipe or {}, []
    for own in dataclasses.fields(owner):
        if own.name in (without or ()):
            continue
        metadata = {name: value for name, value in own.metadata.items() if name in ("help", "choices", "metavar")}
        metadata["help"] = metadata["help"].replace("%", "%%")
        if own.name in recipe:
            metadata["help"] += " (default: %(default)s, from the recipe)"
        default: Any = {"default": own.default, "default_factory": own.default_factory}
        copies.append((own.name, _kind(hints[own.name]), field(metadata=metadata, **default)))
    made = dataclasses.make_dataclass(owner.__name__, copies)
    made._argument_group_name = group  # type: ignore[attr-defined]
    made._hints = hints  # type: ignore[attr-defined]
    return made


def _kind(hint: Any) -> Any:
    """The type for HfArgumentParser: for a union the list, and for an optional type one that also reads "none"."""
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    lists = [kind for kind in kinds if typing.get_origin(kind) is list]
    if lists or hint is bool:
        return lists[0] if lists else bool
    if type(None) in kinds:
        return functools.update_wrapper(functools.partial(_none_or, kinds[0]), kinds[0], updated=())
    return hint


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _none_or(kind: type, text: str) -> Any:
    return None if text.lower() == "none" else kind(text)


def _apply_recipe(parser: argparse.ArgumentParser, file: Path | None, recipe: dict[str, Any], kinds: list) -> None:
    """Makes a recipe's values the parser's defaults, after checking their names and types."""
    hints = {name: hint for kind in kinds for name, hint in kind._hints.items()}
    known = {name for kind in kinds for name in kind.__dataclass_fields__}
    for name, value in recipe.items():
        if name in NOTES:
            continue
        if name not in known:
            parser.error(f"{file}: `{name}` is not an argument of this method; see --help.")
        if not _fits(name, value, hints[name]):
            parser.error(f"{file}: `{name}`={value!r} is not a valid value of --{name}.")
    parser.set_defaults(**{name: value for name, value in recipe.items() if name not in NOTES})


def _fits(name: str, value: Any, hint: Any) -> bool:
    """Whether a recipe's value, which may also be written as on the command line, has a field's type."""
    kinds = {typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if _is_union(hint) else (hint,))}
    if isinstance(value, str) and kinds & {int, float, Path}:
        return True  # the parser reads it
    if type(value) is int and float in kinds:
        return True
    try:
        type_validator(name, value, spelled(hint))
    except TypeError:
        return False
    return True
