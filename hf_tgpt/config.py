"""What all prompt methods' configs share."""

from __future__ import annotations

import builtins
import dataclasses
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .base_model import name_here, name_in_files
from .card import replace_empty_card
from .reading import read_json
from .version import __version__

if TYPE_CHECKING:
    from .learner import PromptLearner


def documented(default: Any, help: str) -> Any:
    """A config field with its help. A list as default is copied for each config."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


PEFT_FIELDS = {field.name for field in dataclasses.fields(PeftConfig)}


class PromptMethod(str):
    """A PEFT type beside PEFT's own enum.

    Equal to its bare name, so it is found in PEFT's mappings however it was read back, and with the `.value` that
    PEFT and transformers ask of an enum member.
    """

    @property
    def value(self) -> str:
        return str(self)


@dataclass
class PromptConfig(PeftConfig):
    """Base of the methods' configs; see the fields' help."""

    # Set by `register`; PEFT's name of the method, and the module that does the work.
    method: ClassVar[str]
    if TYPE_CHECKING:  # the command line evaluates the other annotations, and the learners import this module
        learner_class: ClassVar[type[PromptLearner]]
    # The call that the card's example loads it by.
    loader: ClassVar[str] = "hf_tgpt.load_adapter"
    kind: ClassVar[str] = "prompt-learning"
    # Fields that are read in every forward, so that they may change on a trained adapter.
    changeable: ClassVar[tuple[str, ...]] = ()
    # PEFT attaches tuners to named modules; ours is the slot that `PromptTuner` adds to the model.
    target_modules: ClassVar[tuple[str, ...]] = ("prompts",)
    # Where it was last read from or written to. A ClassVar only lest it become a field, which would be saved.
    folder: ClassVar[str | None] = None

    class_names: list[str] = documented(None, "The names of the classes in the order of their labels. Required.")
    tokenizer_name_or_path: str | None = documented(
        None, "Tokenizer of the class sentences; a Hub id or folder. Default: the base model's own."
    )
    initial_text: str | None = documented(
        "a photo of a",
        "The class sentence is '{initial_text} {name}.'; learned tokens start from its words (CTX_INIT of the "
        "releases). None: as many 'X' as learned tokens, and a random start. Default: as released.",
    )
    text_chunk_size: int | None = documented(
        None,
        "Class sentences whose activations are held at a time. More are computed chunk by chunk, and in training once "
        "again in the backward pass: the same numbers in less memory. As many as there are classes is fastest. "
        "Default: as many as have 1,024 tokens of their own, about 250; on a GPU what an eighth of its memory holds.",
    )
    base_model_dimensions: dict[str, int] | None = documented(
        None, "Filled in when the adapter is attached: the CLIP it fits. Checked when it is loaded."
    )
    base_model_fingerprint: list[float] | None = documented(
        None, "Filled in when the adapter is attached: some weights of that CLIP. Compared when it is loaded."
    )
    trained_on: dict[str, Any] | None = documented(
        None, "Filled in by `hf-tgpt train`: data, classes, shots and seed of the training. Told on the model card."
    )
    hf_tgpt_version: str | None = documented(None, "Filled in when the adapter is saved: the package's version.")

    def __post_init__(self) -> None:
        self.require("task_type", self.task_type is None, "PEFT's task types are for language models; leave it out.")
        for name in ("base_model_name_or_path", "tokenizer_name_or_path"):
            if isinstance(path := getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(path))
        self.require("revision", isinstance(self.revision, str | None), "name a branch, tag or commit.")
        super().__post_init__()
        self.peft_type = PromptMethod(self.method)
        self.base_model_name_or_path: str | None = name_here(self.base_model_name_or_path)
        check_class_names(self.class_names)
        self.class_names = list(self.class_names)
        hints = typing.get_type_hints(type(self))
        own = {field.name for field in dataclasses.fields(self)} - PEFT_FIELDS
        for name in sorted(own | {"base_model_name_or_path"}):
            kind = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
            self.require(name, _fits(getattr(self, name), hints[name]), f"choose a value of type {kind}.")
        self.require("text_chunk_size", self.text_chunk_size is None or self.text_chunk_size >= 1, "hold 1 or more.")

    @property
    def citation(self) -> str:
        """The paper, as BibTeX."""
        return self.learner_class.citation

    def require(self, name: str, valid: bool, remedy: str) -> None:
        """Raises a ValueError that names the field, its value and the remedy unless `valid`."""
        if not valid:
            raise ValueError(f"`{name}`={getattr(self, name)!r}: {remedy}")

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes adapter_config.json, and our model card where PEFT left its empty one."""
        # While the adapter is on, the model is of a class of ours; what an adapter wants loaded is a plain CLIPModel.
        if kwargs.get("auto_mapping_dict") is not None:
            library = "transformers.models.clip.modeling_clip"
            kwargs["auto_mapping_dict"] = {"base_model_class": "CLIPModel", "parent_library": library}
        self.hf_tgpt_version, here = __version__, self.base_model_name_or_path
        self.base_model_name_or_path = name_in_files(here)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.base_model_name_or_path = here
        replace_empty_card(save_directory, self)
        self.folder = os.fspath(save_directory)  # type: ignore[misc]  # of this config alone, see there

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> Self:
        """Reads adapter_config.json. Raises ValueError where a local adapter folder is incomplete or damaged."""
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        if os.path.isdir(folder):
            check_weights_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        except (TypeError, AttributeError) as error:  # a value of another type than the field's
            raise ValueError(
                f"The adapter_config.json of {os.fspath(pretrained_model_name_or_path)!r} is damaged ({error}); save "
                "or download the adapter again."
            ) from error
        config.folder = folder if os.path.isdir(folder) else None
        return config


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; PEFT and dataclasses do not look."""
    inner = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Union | types.UnionType:
            return any(_fits(value, kind) for kind in inner)
        case builtins.list:
            return isinstance(value, list | tuple) and all(_fits(item, inner[0]) for item in value)
        case builtins.dict:
            return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def read_method(folder: str | os.PathLike[str]) -> Any:
    """The `peft_type` in an adapter's folder. Raises ValueError if its config is missing or damaged."""
    path = os.path.join(folder, CONFIG_NAME)
    if not os.path.isfile(path):
        raise ValueError(f"There is no adapter in {os.fspath(folder)!r}: {CONFIG_NAME} is missing; correct the path.")
    try:
        return read_json(path)["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path!r} is damaged ({error!r}); save or download the adapter again.") from error


def read_config(folder: str | os.PathLike[str]) -> PeftConfig:
    """The config in an adapter's folder, ours or PEFT's. Raises ValueError if it is missing or damaged."""
    method = read_method(folder)
    try:
        return PeftConfig.from_pretrained(os.fspath(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The config of {method!r} in {os.fspath(folder)!r} cannot be used ({error}); save or download it again."
        ) from error


def check_class_names(class_names: Sequence[str] | None) -> None:
    """Raises ValueError unless these are distinct, non-empty names."""
    if isinstance(class_names, str) or class_names is None or len(class_names) == 0:
        raise ValueError(
            f"`class_names`={class_names!r}: pass a list with the name of every class in the order of the labels, "
            'for example class_names=["cat", "dog"].'
        )
    for label, name in enumerate(class_names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"`class_names[{label}]`={name!r} is not a name; give every class a word or more.")
    seen: dict[str, int] = {}
    for label, name in enumerate(class_names):
        text = " ".join(name.lower().split())  # CLIP's tokenizer sees no case and no spaces
        if text in seen:
            raise ValueError(
                f"`class_names` holds {name!r} twice, as labels {seen[text]} and {label}; two classes of one name "
                "cannot be told apart by text, rename one."
            )
        seen[text] = label


def check_templates(templates: list[str] | None) -> None:
    """Raises ValueError unless these are sentences with a place for a class name."""
    if not templates or isinstance(templates, str) or not all("{}" in template for template in templates):
        raise ValueError(
            f"`templates`={templates!r}: give a list of sentences, each with {{}} where the class name goes."
        )


def check_weights_file(path: str) -> None:
    """Raises ValueError unless `path` is a readable safetensors file."""
    folder = os.path.dirname(path)
    if not os.path.isfile(path) and os.path.isfile(os.path.join(folder, WEIGHTS_NAME)):
        raise ValueError(
            f"The adapter folder {folder!r} holds its weights as {WEIGHTS_NAME}, a pickle, which may run code when it "
            f"is read; ask for {os.path.basename(path)}, which is what save_pretrained writes."
        )
    if not os.path.isfile(path):
        raise ValueError(
            f"The adapter folder {folder!r} has no {os.path.basename(path)}: it was not written to the end; save the "
            "adapter again. (PeftConfig.from_pretrained reads a config that is alone on purpose.)"
        )
    try:
        with safe_open(path, framework="pt") as weights:
            weights.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path!r} is damaged ({error}); save or download the adapter again.") from error
