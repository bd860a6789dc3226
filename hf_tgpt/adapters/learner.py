"""What every method does: the module that holds one adapter's weights and computes with them, and the hooks it has.

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


@dataclass(frozen=True)
class Stage:
    """A part of a training, with weights, optimizer and schedule of its own.

    `share` of the steps, `trains` the name of a learner's weight in it (None: all), and `changes` to the fields of the
    training's config that an optimizer, its schedule and a step are made of, such as {"learning_rate": 1e-3}.
    """

    share: float = 1.0
    trains: Callable[[str], bool] | None = None
    changes: dict[str, Any] = field(default_factory=dict)


class PromptLearner(nn.Module):
    """Base of all methods. `forward` classifies; a method may also answer the model's own call.

    PEFT trains and saves every nn.Parameter of it; a tensor that is to be saved and not trained is an nn.Buffer.
    """

    # The paper, as BibTeX; printed on the model card.
    citation: ClassVar[str]
    # Whether training profits from one description per picture (`caption_ids`).
    uses_captions: bool = False
    # What `image_states` gives, in words; methods that say the same share what is stored.
    states_are: ClassVar[str] = "image features"
    # Whether its loss is a mean over tokens, so that `forward` takes `tokens_per_image`.
    counts_tokens: ClassVar[bool] = False
    # Whether what the last epoch leaves is the result, such as an average of all, whichever epoch validates best.
    last_epoch_is_result: ClassVar[bool] = False
    # The release's tensor names -> ours. Names that are missing here are left out on conversion.
    original_names: ClassVar[dict[str, str]] = {}
    # What `forward` gives. Its entries beside loss and logits are not predictions.
    output_class: ClassVar[type[ModelOutput]] = ImageClassifierOutput

    def __init__(self, config: PromptConfig, encoder: DualEncoder):
        super().__init__()
        self.config = config
        # Changes with all that changes an answer without torch's notice (see `texts.kept`).
        self._generation = object()

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

        `class_texts` are the classes, the adapter's own unless given. Where `vision_is_frozen`, `image_states` may
        stand in place of the pictures.
        """
        raise NotImplementedError

    # Classes and texts, of methods that classify by text --------------------------------------------------------------

    def texts_for(self, encoder: DualEncoder, class_names: Sequence[str]) -> ClassTexts:
        """Any list of classes, as `forward` takes it. Raises ValueError for bad names, or where classes are fixed."""
        raise ValueError(self._closed())

    def set_class_names(self, encoder: DualEncoder, class_names: Sequence[str]) -> None:
        """Makes other classes the adapter's own, which are then saved. Raises ValueError where that cannot be."""
        raise ValueError(self._closed())

    def compare(
        self, encoder: DualEncoder, input_ids: torch.Tensor, pixel_values: torch.Tensor, return_loss: bool = False
    ) -> ModelOutput:
        """The model's own call: input_ids (s, t), pixel_values (b, 3, h, w) -> the model's own output."""
        raise ValueError(self._closed())

    def read_texts(self, encoder: DualEncoder, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A user's texts, ids (s, t) -> trimmed ids and ends (s,). Raises ValueError if they cannot serve."""
        raise ValueError(self._closed())

    def text_features(
        self, encoder: DualEncoder, input_ids: torch.Tensor, ends: torch.Tensor, packing: Packing | None = None
    ) -> torch.Tensor:
        """T with this adapter's prompts: ids (s, t), ends (s,) -> (s, d), not normalised.

        `packing` is `self.pack` of these sentences, which is made where it is not given.
        """
        raise ValueError(self._closed())

    def image_features(self, encoder: DualEncoder, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """V with this adapter's prompts: (b, 3, h, w) -> (b, d), not normalised."""
        raise ValueError(self._closed())

    # Training ---------------------------------------------------------------------------------------------------------

    def image_states(self, encoder: DualEncoder, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The image tower's output before this adapter has any part in it: (b, 3, h, w) -> (b, d).

        Where the tower has no learned prompts this never changes, so `training.features` can store it, and
        `model(image_states=...)` takes it in place of the pictures. A method may need more than the image features.
        """
        return self.image_features(encoder, pixel_values, **kwargs)

    def check_vision_is_frozen(self) -> None:
        """Raises ValueError where the image tower has learned prompts, so that its output cannot be stored."""
        if not self.vision_is_frozen:
            raise ValueError(
                f"{self.config.method} as configured learns prompts in the vision tower, whose output therefore "
                "changes with every step and cannot be kept. Train on the pictures, or without visual prompts."
            )

    def tokens_per_image(
        self, encoder: DualEncoder, labels: torch.Tensor, caption_ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """What `forward` is to know of the whole batch, labels (b,), where it gets a part of it; mostly nothing.

        With it the mean of equal parts' losses is the whole batch's loss, also where the loss is a mean over tokens.
        The mean of several batches' values is the value of all of them together.
        """
        return {}

    def frozen_image_features(self, encoder: DualEncoder, pixel_values: torch.Tensor) -> torch.Tensor:
        """The base model's own unit features of pictures, without prompts or gradient: (b, 3, h, w) -> (b, d)."""
        with torch.no_grad():
            return unit(encode_image(encoder, pixel_values))

    def fit(
        self, encoder: DualEncoder, data: Features, validation: Features | None, steps: Steps
    ) -> list[dict[str, float]]:
        """A hook before the first step: the features of all training images and, if there are any, of those that are
        held out. Returns rows of the history of a method that is trained here and not step by step.

        Called where a method overrides it, which needs `vision_is_frozen`; in every process with the same images.
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
        """Tensors beside the weights that training changes: a resumed run finds them as they were, and the best epoch
        keeps its own. They are filled in place.
        """
        return {}

    # What other programs ask ------------------------------------------------------------------------------------------

    @property
    def texts_per_image(self) -> bool:
        """Whether each picture has class texts of its own, so that memory grows with pictures times classes."""
        return False

    def linear_head(
        self, encoder: DualEncoder, class_texts: ClassTexts | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The classifier as a linear layer on unit image features: weight (c, d), bias (c,); None where it is none."""
        return None

    def standalone(self, encoder: DualEncoder, class_texts: ClassTexts | None = None) -> nn.Module:
        """A module that makes logits (b, c) of pixel values alone, with its classes frozen, for exporters.

        Raises ValueError for a configuration that cannot be one.
        """
        head = self.linear_head(encoder, class_texts)
        return WholeModel(self, encoder) if head is None else LinearClassifier(self.image_states, encoder, *head)

    def word_scores(
        self, encoder: DualEncoder, class_names: Sequence[str], pixel_values: torch.Tensor | None = None
    ) -> tuple[dict[str, torch.Tensor], bool]:
        """How near each learned token is to each word, {set of tokens: (n, v)}, and whether larger is nearer.

        Raises ValueError for a method without text prompts, and without the picture that they depend on.
        """
        prompts: Any = getattr(self, "text_prompts", ())
        if isinstance(prompts, nn.ParameterList):
            prompts = prompts[0] if len(prompts) else ()
        if not len(prompts):
            raise ValueError(f"{self.config.method} as configured learns no tokens of the text; look at its attention.")
        vocabulary, prompts = encoder.words().float(), prompts.float()
        if prompts.ndim == 3:  # class-specific
            return {name: torch.cdist(own, vocabulary) for name, own in zip(class_names, prompts, strict=True)}, False
        return {"text": torch.cdist(prompts, vocabulary)}, False

    def query_attention(self, encoder: DualEncoder, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What queries that read the picture look at, {queries: (b, n, p)}; empty for a method without."""
        return {}

    def class_shares(self, encoder: DualEncoder, pixel_values: torch.Tensor) -> torch.Tensor | None:
        """The classes' shares in a picture's visual prompt, (b, c); None where it is not made of class texts."""
        return None

    @classmethod
    def fields_of_weights(cls, weights: dict[str, torch.Tensor], class_names: Sequence[str]) -> dict[str, Any]:
        """The fields of a config that a release's weights tell, by this learner's names of them.

        Raises ValueError where the weights belong to another number of classes.
        """
        return {}

    def tokenizer(self, encoder: DualEncoder) -> PreTrainedTokenizerBase:
        """The tokenizer that the config names, or the base model's."""
        return load_tokenizer(encoder, getattr(self.config, "tokenizer_name_or_path", None), self.config.revision)

    def forget(self) -> None:
        """Recomputes kept features: something changed them that torch does not count."""
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
            "answers model(pixel_values) only, takes no texts and no other class names. Train a new adapter for other "
            "classes, use an open method such as MAPLE, or call CLIP itself inside `with model.disable_adapter():`."
        )


def check_rows(weight: torch.Tensor, class_names: Sequence[str]) -> None:
    """Raises ValueError unless a release's weight has a row for each class."""
    if len(weight) != len(class_names):
        raise ValueError(
            f"`class_names` has {len(class_names)} names but the checkpoint was trained on {len(weight)} classes; give "
            "them all, in the order of its labels."
        )


def classification_loss(logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
    """Cross entropy of logits (b, c) and labels (b,), None without labels. Raises ValueError for an unknown label."""
    if labels is None:
        return None
    # On a GPU the look would stall every step; there the training loop has checked the data set's labels beforehand.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = labels[(labels < 0) | (labels >= logits.shape[1])]
        if len(outside):
            raise ValueError(
                f"`labels` holds {int(outside[0])} but there are {logits.shape[1]} classes, 0 to {logits.shape[1] - 1}."
            )
    return F.cross_entropy(logits, labels.long())
