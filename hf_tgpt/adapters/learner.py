"""The base of every method: the module that contains one adapter's weights and computes with them, and its hooks.

A method subclasses `PromptLearner` (class list fixed in training) or `OpenPromptLearner` (any class names). A learner
never owns the model it works on; an encoder, the interface of prompts to the model, is passed in every call.

Letters as in `encoders/base.py`, and c classes, n prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import ModelOutput
from typing_extensions import Self

from ..encoders import DualEncoder
from ..encoders.packing import Packing
from ..encoders.walk import encode_image, unit
from ..texts.class_texts import ClassTexts
from ..texts.sentences import load_tokenizer
from .config import PromptConfig
from .fitting import Features, Steps
from .standalone import LinearClassifier, WholeModel
from .switches import switches_in


@dataclass(frozen=True)
class Stage:
    """A part of a training, with its own weights, optimizer and schedule.

    `share` is its share of the steps, `trains` tells by name whether it trains a weight of the learner (None: all), and
    `changes` are other values for fields of the training config, such as {"learning_rate": 1e-3}.
    """

    share: float = 1.0
    trains: Callable[[str], bool] | None = None
    changes: dict[str, Any] = field(default_factory=dict)


class PromptLearner(nn.Module):
    """Base class of all methods. `forward` classifies; a method may also implement the model's own call.

    PEFT trains and saves every nn.Parameter; a tensor that is saved but not trained must be an nn.Buffer.
    """

    # The paper, as BibTeX; printed on the model card.
    citation: ClassVar[str]
    # Whether training uses one description per picture (`caption_ids`).
    uses_captions: bool = False
    # A description of `image_states`; methods with the same one share stored states.
    states_are: ClassVar[str] = "image features"
    # Whether its loss is a mean over tokens, so that `forward` takes `tokens_per_image`.
    counts_tokens: ClassVar[bool] = False
    # Whether the last epoch is the result, such as an average of all, and not the one with the best validation.
    last_epoch_is_result: ClassVar[bool] = False
    # The release's tensor names -> ours. Conversion skips names that are missing here.
    original_names: ClassVar[dict[str, str]] = {}
    # The output of `forward`. Its entries beside loss and logits are not predictions.
    output_class: ClassVar[type[ModelOutput]] = ImageClassifierOutput

    def __init__(self, config: PromptConfig, encoder: DualEncoder):
        super().__init__()
        self.config = config
        # Counts the changes of answers that torch does not record (see `texts.kept`).
        self._generation = object()
        # Whether some weights were left NaN, since those of a saved adapter are about to be loaded, by whatever loader.
        self.awaits_weights = False

    @torch.compiler.disable  # called once, and it reads values of tensors
    def check_weights(self) -> None:
        """Raises ValueError if no weights have been loaded into a learner that awaits them."""
        if any(weight.isnan().any() for weight in self.parameters()):
            raise ValueError(
                f"`inference_mode`=True in the config of {self.config.method}, as in a saved one, but no weights were "
                "loaded. Load the adapter with PeftModel.from_pretrained, or set it to False for a new adapter."
            )
        self.awaits_weights = False

    def extra_repr(self) -> str:
        names = self.config.class_names
        return f"{len(names)} classes: {', '.join(map(repr, names[:5]))}{', ...' * (len(names) > 5)}"

    @property
    def takes_new_classes(self) -> bool:
        """Whether it classifies by text, and so takes class names that it was not trained on."""
        return self.config.takes_new_classes

    @property
    def vision_is_frozen(self) -> bool:
        """Whether the image tower works without learned prompts, so that its output can be stored."""
        return False

    def forward(
        self,
        encoder: DualEncoder,
        pixel_values: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        class_texts: ClassTexts | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """pixel_values (b, 3, h, w), labels (b,) -> ImageClassifierOutput with logits (b, c).

        `class_texts` are the classes, by default the adapter's own. If `vision_is_frozen`, `image_states` can be given
        instead of the pictures.
        """
        raise NotImplementedError

    # Classes and texts, of methods that classify by text --------------------------------------------------------------

    def texts_for(self, encoder: DualEncoder, class_names: Sequence[str]) -> ClassTexts:
        """Any list of classes, as `forward` takes it. Raises ValueError for bad names, or if classes are fixed."""
        raise ValueError(self._closed())

    def set_class_names(self, encoder: DualEncoder, class_names: Sequence[str]) -> None:
        """Replaces the adapter's classes, which are then saved. Raises ValueError if that is impossible."""
        raise ValueError(self._closed())

    def compare(
        self, encoder: DualEncoder, input_ids: torch.Tensor, pixel_values: torch.Tensor, return_loss: bool = False
    ) -> ModelOutput:
        """The model's own call: input_ids (s, t), pixel_values (b, 3, h, w) -> the model's own output."""
        raise ValueError(self._closed())

    def read_texts(self, encoder: DualEncoder, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A user's texts, ids (s, t) -> trimmed ids and ends (s,). Raises ValueError if they cannot be used."""
        raise ValueError(self._closed())

    def text_features(
        self, encoder: DualEncoder, input_ids: torch.Tensor, ends: torch.Tensor, packing: Packing | None = None
    ) -> torch.Tensor:
        """T with this adapter's prompts: ids (s, t), ends (s,) -> (s, d), not normalised.

        `packing` is `self.pack` of these sentences, computed if it is not given.
        """
        raise ValueError(self._closed())

    def image_features(self, encoder: DualEncoder, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """V with this adapter's prompts: (b, 3, h, w) -> (b, d), not normalised."""
        raise ValueError(self._closed())

    # Class features on disk (`class_features`), of methods that classify by texts that no picture changes

    def class_features_shape(self, encoder: DualEncoder) -> tuple[int, int] | None:
        """The shape (c, d) of the features of the adapter's own classes; None if there are none to store."""
        return None

    def fixed_class_features(self, encoder: DualEncoder) -> torch.Tensor:
        """The features of the adapter's own classes, of that shape, encoded or as they are kept."""
        raise NotImplementedError

    def take_class_features(self, encoder: DualEncoder, features: torch.Tensor) -> None:
        """Keeps such features from disk as if they had been encoded now."""
        raise NotImplementedError

    # Training ---------------------------------------------------------------------------------------------------------

    def image_states(self, encoder: DualEncoder, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The image tower's output, which does not depend on this adapter: (b, 3, h, w) -> (b, d).

        If the tower has no learned prompts, its output never changes, so `training.features` can store it, and
        `model(image_states=...)` takes it instead of the pictures. A method may need more than the image features.
        """
        return self.image_features(encoder, pixel_values, **kwargs)

    def check_vision_is_frozen(self) -> None:
        """Raises ValueError if the image tower has learned prompts, so that its output cannot be stored."""
        if not self.vision_is_frozen:
            raise ValueError(
                f"{self.config.method} as configured learns prompts in the vision tower, whose output therefore "
                "changes with every step and cannot be stored. Train on the pictures, or without visual prompts."
            )

    def tokens_per_image(
        self, encoder: DualEncoder, labels: torch.Tensor, caption_ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """What `forward` needs to know about the whole batch, labels (b,), if it receives a part of it; usually
        nothing.

        With it, the mean of the losses of equal parts is the loss of the whole batch, even if the loss is a mean over
        tokens. The value for several batches together is the mean of their values.
        """
        return {}

    def frozen_image_features(self, encoder: DualEncoder, pixel_values: torch.Tensor) -> torch.Tensor:
        """The base model's own unit features of pictures, without prompts or gradient: (b, 3, h, w) -> (b, d)."""
        with torch.no_grad():
            return unit(encode_image(encoder, pixel_values))

    def fit(
        self, encoder: DualEncoder, data: Features, validation: Features | None, steps: Steps
    ) -> list[dict[str, float]]:
        """A hook before the first step, with the features of all training images and of any held-out images. Returns
        rows of the history if the method is trained here and not by the training loop.

        Only called if a method overrides it, which requires `vision_is_frozen`; in every process with the same images.
        """
        return []

    def make_room(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """A hook before weights of these shapes are loaded, for a method whose shapes depend on its training images."""

    def stages(self) -> list[Stage]:
        """The stages of a training, whose shares add up to 1."""
        return [Stage()]

    def begin_stage(self, encoder: DualEncoder, stage: int) -> None:
        """A hook before the first step of a stage, counted from 0."""

    def end_of_epoch(self, epoch: int, epochs: int) -> None:
        """A hook after an epoch, counted from 0, before it is validated and saved."""

    def training_state(self) -> dict[str, torch.Tensor]:
        """Tensors other than weights that training changes. They are restored, in place, when a run is resumed and for
        the best epoch.
        """
        return {}

    def results(self) -> dict[str, dict[str, torch.Tensor]]:
        """What training may end with: weights of this learner by name; the first, unless another is better on
        validation pictures. Empty: the weights as they are.
        """
        return {}

    def ended_with(self, result: str, accuracies: dict[str, float]) -> None:
        """A hook after one of `results` was chosen, with each one's accuracy on the validation pictures, if any."""

    # For other programs -------------------------------------------------------------------------------------------

    @property
    def texts_per_image(self) -> bool:
        """Whether each picture has its own class texts, so memory grows with pictures times classes."""
        return False

    def linear_head(
        self, encoder: DualEncoder, class_texts: ClassTexts | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The classifier as a linear layer on unit image features: weight (c, d), bias (c,); None if it is not one."""
        return None

    def standalone(self, encoder: DualEncoder, class_texts: ClassTexts | None = None) -> nn.Module:
        """A module that computes logits (b, c) from pixel values, with fixed classes, for export.

        Raises ValueError for a configuration that cannot be exported.
        """
        head = self.linear_head(encoder, class_texts)
        return WholeModel(self, encoder) if head is None else LinearClassifier(self.image_states, encoder, *head)

    def word_scores(
        self, encoder: DualEncoder, class_names: Sequence[str], pixel_values: torch.Tensor | None = None
    ) -> tuple[dict[str, torch.Tensor], bool]:
        """How near each learned token is to each word, {set of tokens: (n, v)}, and whether larger is nearer.

        Raises ValueError for a method without text prompts, and for a missing picture if they depend on one.
        """
        prompts: Any = getattr(self, "text_prompts", ())
        if isinstance(prompts, nn.ParameterList):
            prompts = prompts[0] if len(prompts) else ()
        if not len(prompts):
            raise ValueError(f"{self.config.method} as configured learns no text tokens; use its attention.")
        vocabulary, prompts = encoder.words().float(), prompts.float()
        if prompts.ndim == 3:  # class-specific
            return {name: torch.cdist(own, vocabulary) for name, own in zip(class_names, prompts, strict=True)}, False
        return {"text": torch.cdist(prompts, vocabulary)}, False

    def query_attention(self, encoder: DualEncoder, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """The queries' attention to the picture, {queries: (b, n, p)}; empty for a method without queries."""
        return {}

    def class_shares(self, encoder: DualEncoder, pixel_values: torch.Tensor) -> torch.Tensor | None:
        """The weights of classes in a picture's visual prompt, (b, c); None if it is not made from class texts."""
        return None

    @classmethod
    def fields_of_weights(cls, weights: dict[str, torch.Tensor], class_names: Sequence[str]) -> dict[str, Any]:
        """The config's fields that follow from a release's weights, given under this learner's names.

        Raises ValueError if the weights have another number of classes.
        """
        return {}

    def tokenizer(self, encoder: DualEncoder) -> PreTrainedTokenizerBase:
        """The tokenizer that the config names, or the base model's."""
        return load_tokenizer(encoder, getattr(self.config, "tokenizer_name_or_path", None), self.config.revision)

    @torch.compiler.disable  # it looks through modules
    def unrecorded(self, encoder: DualEncoder) -> tuple[Any, ...]:
        """What kept features depend on and torch does not record, for comparison with another time (see `kept`)."""
        templates = getattr(self.config, "templates", ())
        if isinstance(templates, dict):
            sentences: Any = {name: tuple(lines) for name, lines in templates.items()}
        else:
            sentences = tuple(templates)
        return self._generation, switches_in(encoder.model), tuple(self.config.class_names), sentences

    def forget(self) -> None:
        """Discards kept features after a change that torch does not record."""
        self._generation = object()

    def train(self, mode: bool = True) -> Self:
        self.forget()
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # .to(), .half(), .cuda(): weights may move within the same Parameter objects.
        self.forget()
        return super()._apply(fn, recurse)

    def _closed(self) -> str:
        return (
            f"{self.config.method} has its {len(self.config.class_names)} classes baked into its trained weights: it "
            "supports only model(pixel_values), and takes no texts or other class names. Train a new adapter for other "
            "classes, use an open method such as MAPLE, or call CLIP itself inside `with model.disable_adapter():`."
        )


def check_rows(weight: torch.Tensor, class_names: Sequence[str]) -> None:
    """Raises ValueError unless a release's weight has a row for each class."""
    if len(weight) != len(class_names):
        raise ValueError(
            f"`class_names` has {len(class_names)} names but the checkpoint was trained on {len(weight)} classes; give "
            "all of their names, in the order of its labels."
        )


def classification_loss(logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
    """`cross_entropy`, None without labels."""
    return None if labels is None else cross_entropy(logits, labels)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss from logits (b, c) and labels (b,). Raises ValueError for an unknown label."""
    # On a GPU this check would stall every step; the training loop has already checked the data set's labels.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = labels[(labels < 0) | (labels >= logits.shape[1])]
        if len(outside):
            raise ValueError(
                f"`labels` holds {int(outside[0])} but there are {logits.shape[1]} classes, 0 to {logits.shape[1] - 1}."
            )
    return F.cross_entropy(logits, labels.long())
