"""Classifiers on the frozen image features, fitted in seconds to features that are computed once for each view.

A method defines how it is fitted (`start`, and `epochs` if it is trained in steps), how it classifies, and which of its
config's fields are searched (`grid`). Fitting, searching, exporting and the class list are implemented here.

Letters as in `encoders/base.py`, and v views of each of n pictures, c classes.
"""

import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..encoders import DualEncoder
from ..encoders.walk import encode_image
from ..texts.class_texts import ClassTexts
from ..texts.kept import Kept, kept
from ..texts.zero_shot_head import mean_features, template_tokens, zero_shot_head
from ..utils.fields import above, checked, documented
from ..utils.names import check_templates
from .config import PromptConfig
from .fitting import Features, Steps, by_steps
from .head_search import search
from .learner import PromptLearner, classification_loss

_ROWS = 4096  # classified at a time


@checked
class FeatureHeadConfig(PromptConfig):
    """Base of the configs of methods that are fitted to frozen image features."""

    kind: ClassVar = "feature-head"
    trains: ClassVar = False
    learns_prompts: ClassVar = False
    templates: list[str] = documented(
        ["a photo of a {}."],
        "Sentences with {} for the class name, averaged after encoding, for zero-shot classification.",
        check_templates,
    )
    tokenizer_name_or_path: str | None = documented(
        None, "Tokenizer of the sentences; a Hub id or folder. Default: the base model's own."
    )
    logit_scale: float | None = documented(
        None, "Factor from cosines to logits; the releases fix 100. Default: the base model's own.", above(0)
    )
    search: bool = documented(
        True,
        "Search the method's hyperparameters on validation pictures or, without any, by cross-validation on the "
        "training pictures. Off: the given values are used.",
    )

    @property
    def takes_new_classes(self) -> bool:
        return False


class FeatureHead(PromptLearner):
    """Base class of these methods. Before it is fitted, a head classifies like zero-shot, or nearly so."""

    config: Any
    vision_is_frozen = True
    # The fields of the config that are searched, with the values to try. Empty: the number of epochs is searched.
    grid: ClassVar[dict[str, Sequence[float]]] = {}
    # Whether these values affect the training of its weights, so that it is trained again for each choice.
    grid_is_trained_with: ClassVar[bool] = False
    # Whether it uses the class texts as unit vectors w0, or unnormalised, t.
    unit_texts: ClassVar[bool] = True
    # Whether it needs them to classify, and not only to be fitted.
    classifies_by_texts: ClassVar[bool] = True

    def __init__(self, config: FeatureHeadConfig, encoder: DualEncoder):
        super().__init__(config, encoder)
        self._texts: Kept | None = None
        if not config.inference_mode:  # bad names and templates raise here
            for template in config.templates:
                template_tokens(encoder, config.class_names, template, self.tokenizer(encoder))
        self._trying = False  # whether it is being fitted to a part of the pictures, to compare values

    # What a method gives ----------------------------------------------------------------------------------------------

    def start(self, encoder: DualEncoder, data: Features) -> None:
        """Fits a closed form, or sets the weights that training starts from."""

    def epochs(self, encoder: DualEncoder, data: Features, steps: Steps) -> Iterable[dict[str, float]]:
        """Trains, and yields a row of the history after each epoch; nothing for a closed form."""
        return ()

    def classify(self, encoder: DualEncoder, states: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Image features (b, d), not normalised, and class texts (c, d) -> logits (b, c)."""
        raise NotImplementedError

    def penalty(self, texts: torch.Tensor) -> torch.Tensor | None:
        """A penalty that training adds to the cross entropy."""
        return None

    def settle(self, values: dict[str, float]) -> None:
        """Sets the fields of `grid` of a fitted head."""
        for name, value in values.items():
            setattr(self.config, name, value)

    def add_class(self, encoder: DualEncoder, pictures: Features) -> None:
        """Adds a class after the others, whose logits do not change. Overridden if that is possible."""
        raise ValueError(self.fixed())

    def remove_class(self, label: int) -> None:
        """Removes a class. Overridden if that is possible."""
        raise ValueError(self.fixed())

    def fixed(self) -> str:
        """The reason why classes cannot be added or removed."""
        return (
            f"{self.config.method} fits all classes together, so none can be added or removed afterwards; fit a new "
            "adapter, or use GDA or TIP_ADAPTER."
        )

    # Texts and answers ------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # caching reads version counters, which a compiled graph does not have
    def texts(self, encoder: DualEncoder, class_texts: ClassTexts | None = None) -> torch.Tensor:
        """The base model's own features of the classes (c, d), w0 or t, computed once and kept."""
        names, templates = self.config.class_names, self.config.templates

        def compute() -> torch.Tensor:
            encode = zero_shot_head if self.unit_texts else mean_features
            return encode(encoder, names, templates, self.tokenizer(encoder)).float()

        self._texts = after = kept(self._texts, encoder.text_parameters(), compute, self.unrecorded(encoder))
        return after[1]

    def class_features_shape(self, encoder: DualEncoder) -> tuple[int, int] | None:
        size = len(self.config.class_names), encoder.shape()["projection_width"]
        return size if self.classifies_by_texts else None

    def fixed_class_features(self, encoder: DualEncoder) -> torch.Tensor:
        return self.texts(encoder)

    def take_class_features(self, encoder: DualEncoder, features: torch.Tensor) -> None:
        self._texts = kept(None, encoder.text_parameters(), lambda: features, self.unrecorded(encoder))

    def scaled(self, encoder: DualEncoder, cosines: torch.Tensor) -> torch.Tensor:
        """Logits from cosines (b, c): by the config's factor, or as in the base model."""
        own = self.config.logit_scale
        return encoder.scale(cosines) if own is None else own * cosines

    def forward(
        self,
        encoder: DualEncoder,
        pixel_values: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        class_texts: ClassTexts | None = None,
        image_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        if image_states is None:
            assert pixel_values is not None  # PromptedModel sees to it that there is one of the two
            image_states = self.image_states(encoder, pixel_values, **kwargs)
        features = _full(image_states)
        texts = self.texts(encoder, class_texts) if self.classifies_by_texts else features.new_empty(0)
        logits = self.classify(encoder, features, texts).to(features.dtype)
        return ImageClassifierOutput(loss=classification_loss(logits, labels), logits=logits)

    def image_states(self, encoder: DualEncoder, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The image features: (b, 3, h, w) -> (b, d), not normalised."""
        return encode_image(encoder, pixel_values, **kwargs)

    def linear_head(
        self, encoder: DualEncoder, class_texts: ClassTexts | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None

    def as_linear(
        self, encoder: DualEncoder, weight: torch.Tensor, bias: torch.Tensor | float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`scaled(f weight^T) + bias` of unit features f as a linear layer: weight (c, d), bias (c,)."""
        offset = self.scaled(encoder, weight.new_zeros(len(weight)))  # what an encoder adds to every cosine
        return (self.scaled(encoder, weight) - offset[:, None]).detach(), (offset + bias).detach()

    def standalone(self, encoder: DualEncoder, class_texts: ClassTexts | None = None) -> nn.Module:
        if self.linear_head(encoder, class_texts) is not None:
            return super().standalone(encoder, class_texts)
        return _FrozenTexts(self, encoder, self.texts(encoder, class_texts).detach())

    # Fitting ----------------------------------------------------------------------------------------------------------

    def fit(
        self, encoder: DualEncoder, data: Features, validation: Features | None, steps: Steps
    ) -> list[dict[str, float]]:
        """Searches the fields of `grid`, and fits to all training pictures.

        Raises ValueError for features that are not finite and for classes without a training picture.
        """
        for name, features in {"training": data, "validation": validation}.items():
            if features is not None:
                _check(features, self.config.class_names, name)
        before = {name: getattr(self.config, name) for name in (*self.grid, "fitted")}
        state = {name: value.clone() for name, value in self.state_dict().items()}
        self.config.fitted = {"pictures": len(data.labels), "views": len(data.states)}
        values = {name: before[name] for name in self.grid}
        try:
            last: int | None = None
            told: dict[str, Any] = {}
            if self.config.search:
                self._trying = True
                values, last, told = search(self, encoder, data, validation, steps)
                self._trying = False
            rows = self.fit_with(encoder, data, steps, values, {name: before[name] for name in self.grid}, last)
        except BaseException:
            self.make_room({name: tuple(value.shape) for name, value in state.items()})
            self.load_state_dict(state)
            for name, value in before.items():
                setattr(self.config, name, value)
            self._trying = False
            raise
        self.note(**told)
        return rows

    def fit_with(
        self,
        encoder: DualEncoder,
        data: Features,
        steps: Steps,
        values: dict[str, float],
        given: dict[str, float],
        last: int | None = None,
    ) -> list[dict[str, float]]:
        """Fits with these values of the searched fields; training uses `given` if the search comes after it. `last` is
        the last epoch.
        """
        for name, value in (values if self.grid_is_trained_with else given).items():
            setattr(self.config, name, value)
        self.start(encoder, data)
        rows = list(itertools.islice(self.epochs(encoder, data, steps), last))
        if self.grid:
            self.settle(values)
        return rows

    @torch.no_grad()
    def score(self, encoder: DualEncoder, tried: Features) -> tuple[float, float]:
        """The number of correct pictures, each view counting as a fraction, and the sum of their losses."""
        (states, labels), texts = tried.every_view(), self.texts(encoder)
        hits = loss = 0.0
        for part, truth in zip(states.split(_ROWS), labels.split(_ROWS), strict=True):
            logits = self.classify(encoder, _full(part), texts)
            hits += float((logits.argmax(-1) == truth).sum())
            loss += float(F.cross_entropy(logits, truth, reduction="sum"))
        return hits / len(tried.states), loss / len(tried.states)

    def trained(self, encoder: DualEncoder, data: Features, steps: Steps) -> Iterable[dict[str, float]]:
        """`epochs` of a method whose weights are trained on the cross entropy and its own penalty."""
        texts, weights = self.texts(encoder), list(self.parameters())
        if not all(weight.requires_grad for weight in weights):
            raise ValueError("`model` has no weights to train; load an adapter with is_trainable=True to fit it again.")

        def loss_and_logits(states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.classify(encoder, _full(states), texts)
            loss, penalty = F.cross_entropy(logits, labels), self.penalty(texts)
            return loss if penalty is None else loss + penalty, logits

        return by_steps(weights, loss_and_logits, data, steps)

    def note(self, **facts: Any) -> None:
        """Adds facts to the config's record of the fit."""
        self.config.fitted = (self.config.fitted or {}) | facts

    def noted(self, name: str, default: Any) -> Any:
        """A fact about the fit; on loading it gives the sizes of tensors that depend on the training pictures."""
        return (self.config.fitted or {}).get(name, default)

    def say(self, note: str) -> None:
        """Records a note on the fit for the results and the card, and issues it as a warning."""
        if not self._trying:
            self.note(note=note)
            warnings.warn(note, stacklevel=2)


class _FrozenTexts(nn.Module):
    """A head that is not a linear layer, with fixed class texts."""

    def __init__(self, learner: FeatureHead, encoder: DualEncoder, texts: torch.Tensor):
        super().__init__()
        self.model, self.encoder, self.learner, self.texts = encoder.model, encoder, learner, nn.Buffer(texts)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(b, 3, h, w) -> logits (b, c)."""
        states = _full(self.learner.image_states(self.encoder, pixel_values))
        return self.learner.classify(self.encoder, states, self.texts).to(states.dtype)


def _full(states: torch.Tensor) -> torch.Tensor:
    """Computes in float32 at least, whatever the base model's precision."""
    return states if states.dtype == torch.float64 else states.float()


def _check(data: Features, class_names: list[str], kind: str) -> None:
    """Raises ValueError for features that are not finite, and for classes without a training picture."""
    wrong = (~data.states.isfinite()).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"`pictures`: the features of {kind} picture {wrong[0]} ({len(wrong)} of {len(data.labels)}) are not "
            "finite; check that picture and the base model's precision."
        )
    counts = data.labels.bincount(minlength=len(class_names)).tolist()
    missing = [name for name, count in zip(class_names, counts, strict=False) if not count]
    if missing and kind == "training":
        raise ValueError(
            f"`pictures` has none of {', '.join(map(repr, missing[:5]))} ({len(missing)} of {len(class_names)} "
            "classes); add at least one picture of each, or leave these classes out of `class_names`."
        )
