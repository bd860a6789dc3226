"""The base of all methods' configs."""

import copy
import dataclasses
import json
import os
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel
from typing_extensions import Self

from ..utils.fields import at_least, checked, documented
from ..utils.names import check_class_names, name_here, name_in_files
from ..utils.version import __version__
from .folder import check_weights_file

PEFT_FIELDS = {field.name for field in dataclasses.fields(PeftConfig)}
# A model with an adapter has a class with this prefix before the name of the model's own class.
PROMPTED = "Prompted"


class PromptMethod(str):
    """A PEFT type beside PEFT's own enum.

    Equal to its bare name, so PEFT's mappings find it however it was read back, and otherwise like a member of PEFT's
    enum: `.value` is the name, and in text the enum's name precedes it, which PEFT cuts off.
    """

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PromptMethod.{self.value}"

    __format__ = str.__format__


@checked
class PromptConfig(PeftConfig):
    """Base class of the methods' configs; the fields have help texts. Every field is checked whenever it is set."""

    # Set by `register`: PEFT's name of the method, and the module that does the work, a `PromptLearner`.
    method: ClassVar[str]
    learner_class: ClassVar[Any]
    # The call that loads it in the card's example, and the tag that it is published under.
    loader: ClassVar[str] = "hf_tgpt.load_adapter"
    kind: ClassVar[str] = "prompt-learning"
    # Whether it is trained by gradient steps; a method that is not may still be fitted.
    trains: ClassVar[bool] = True
    # Whether it puts prompts into the layers of the towers.
    learns_prompts: ClassVar[bool] = True
    # Whether it uses each data set's own templates, as zero-shot does.
    follows_data: ClassVar[bool] = False
    # Fields that are read in every forward, so they may change on a trained adapter.
    changeable: ClassVar[tuple[str, ...]] = ()
    # PEFT attaches tuners to named modules; ours is the slot that `PromptTuner` adds to the model.
    target_modules: ClassVar[tuple[str, ...]] = ("prompts",)
    # Where it was last read from or written to. A ClassVar only so that it is not a field, which would be saved.
    folder: ClassVar[str | None] = None

    class_names: list[str] = documented(None, "Class names in the order of their labels. Required.", check_class_names)
    base_model_dimensions: dict[str, int] | None = documented(
        None, "Filled in when the adapter is attached: the dimensions of the base model. Checked on loading."
    )
    base_model_fingerprint: list[float] | None = documented(
        None, "Filled in when the adapter is attached: some weights of the base model. Compared on loading."
    )
    trained_on: dict[str, Any] | None = documented(
        None, "Filled in by `hf-tgpt train`: data, classes, shots and seed of the training. Shown on the model card."
    )
    fitted: dict[str, Any] | None = documented(
        None, "Filled in by `hf_tgpt.fit`: the number of pictures, and the values found by the search and its data."
    )
    hf_tgpt_version: str | None = documented(None, "Filled in when the adapter is saved: the package's version.")

    def __post_init__(self) -> None:
        self.require("task_type", self.task_type is None, "PEFT's task types are for language models; leave it out.")
        base: Any = self.base_model_name_or_path
        base = os.fspath(base) if isinstance(base, os.PathLike) else base
        self.require("base_model_name_or_path", isinstance(base, str | None), "choose a value of type str.")
        self.require("revision", isinstance(self.revision, str | None), "name a branch, tag or commit.")
        super().__post_init__()
        self.peft_type = PromptMethod(self.method)
        self.base_model_name_or_path: str | None = name_here(base)

    @property
    def takes_new_classes(self) -> bool:
        """Whether an adapter of this method also classifies by names that it was not trained on."""
        return True

    @property
    def citation(self) -> str:
        """The paper, as BibTeX."""
        return self.learner_class.citation

    def require(self, name: str, valid: bool, remedy: str) -> None:
        """Raises a ValueError that names the field, its value and the remedy unless `valid`."""
        if not valid:
            raise ValueError(f"`{name}`={getattr(self, name)!r}: {remedy}")

    def build(self, model: PreTrainedModel) -> Any:
        """The method on a base model, ready for training."""
        return get_peft_model(model, self)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes adapter_config.json."""
        # While the adapter is active, the model's class is one of ours; loading needs the plain one.
        if (mapping := kwargs.get("auto_mapping_dict")) is not None:
            kwargs["auto_mapping_dict"] = mapping | {
                "base_model_class": mapping["base_model_class"].removeprefix(PROMPTED)
            }
        self.hf_tgpt_version, here = __version__, self.base_model_name_or_path
        self.base_model_name_or_path = name_in_files(here)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.base_model_name_or_path = here
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


@checked
class TextPromptConfig(PromptConfig):
    """Base class of the configs of methods that learn text tokens."""

    tokenizer_name_or_path: str | None = documented(
        None, "Tokenizer of the class sentences; a Hub id or folder. Default: the base model's own."
    )
    initial_text: str | None = documented(
        "a photo of a",
        "The class sentence is '{initial_text} {name}.', or this text if it contains {} for the name; "
        "its words before the name initialise the learned tokens (CTX_INIT of the releases). None: as many 'X' as "
        "learned tokens, initialised at random. Default: as released.",
    )
    text_chunk_size: int | None = documented(
        None,
        "Number of class sentences whose activations are kept at a time. More are computed in chunks, and again in the "
        "backward pass: the same results with less memory. The number of classes is fastest. Default: "
        "sentences with 1,024 tokens of their own, about 250; on a GPU as many as fit into an eighth of its memory.",
        at_least(1, "choose 1 or more."),
    )


def change_config(model: PeftModel, fields: dict[str, str]) -> dict[str, str]:
    """Sets fields of the active adapter's config, written as JSON or as bare words, such as {"wise_ft": "0.5"}.

    Returns the previous values in the same form. Raises ValueError for a model without such a config, a field that may
    not change, or an invalid value; then nothing is changed. Other models made with the same config do not change.
    """
    if not isinstance(model, PeftModel) or getattr(model, "learner", None) is None:
        raise ValueError("`fields`: only an active adapter of a prompt method has a config to change.")
    config = model.learner.config
    changed = copy.copy(config)
    for name, text in fields.items():
        if name not in config.changeable:
            known = ", ".join(config.changeable) or "none"
            raise ValueError(
                f"`fields`: {name!r} is not a field of {type(config).__name__} that may change after "
                f"training; these may: {known}."
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        setattr(changed, name, value)
    changed.__post_init__()  # checks that involve several fields
    model.learner.config = model.peft_config[model.active_adapter] = changed
    return {name: json.dumps(getattr(config, name)) for name in fields}
