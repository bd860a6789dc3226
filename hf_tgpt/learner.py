"""What every prompt learner does: the module that holds one adapter's weights and computes with them.

A method subclasses `PromptLearner` (class list baked in) or `OpenPromptLearner` (class names may change at any time).
A learner never owns the CLIP it works on; it is handed over in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPOutput, image_text_contrastive_loss

from .chunks import chunks, in_chunks
from .classes import PLACEHOLDER, class_tokens, load_tokenizer
from .config import PromptConfig
from .packing import Packing, common_length, pack
from .parallel import in_shares
from .towers import chunk_tokens, dimensions, logit_scale, text_parameters, trim, unit


class PromptLearner(nn.Module):
    """Base of all methods. `forward` classifies; a method may also answer CLIP's own call."""

    # The paper, as BibTeX; printed on the model card.
    citation: ClassVar[str]
    # Whether training profits from one description per picture (`caption_ids`).
    uses_captions: bool = False
    # Whether its loss is a mean over tokens, so that `forward` takes `tokens_per_image`.
    counts_tokens: ClassVar[bool] = False
    # The release's tensor names -> ours. Names that are missing here are left out on conversion.
    original_names: ClassVar[dict[str, str]] = {}

    def __init__(self, config: PromptConfig, clip: CLIPModel):
        super().__init__()
        self.config = config

    @property
    def takes_new_classes(self) -> bool:
        """Whether it classifies by text, and so takes class names that it was not trained on."""
        return False

    @property
    def vision_is_frozen(self) -> bool:
        """Whether the vision tower works without learned prompts, so that what it says of a picture may be kept."""
        return False

    def forward(
        self, clip: CLIPModel, pixel_values: torch.Tensor | None, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """pixel_values (b, 3, h, w), labels (b,) -> ImageClassifierOutput with logits (b, c).

        Where `vision_is_frozen`, `image_states` may stand in place of the pictures.
        """
        raise NotImplementedError

    def tokens_per_image(
        self, clip: CLIPModel, labels: torch.Tensor, caption_ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """What `forward` is to know of the whole batch, labels (b,), where it gets a part of it; mostly nothing.

        With it the mean of equal parts' losses is the whole batch's loss, also where the loss is a mean over tokens.
        The mean of several batches' values is the value of all of them together.
        """
        return {}

    def compare(
        self, clip: CLIPModel, input_ids: torch.Tensor, pixel_values: torch.Tensor, return_loss: bool = False
    ) -> CLIPOutput:
        """CLIP's own call: input_ids (s, t), pixel_values (b, 3, h, w) -> CLIPOutput."""
        raise ValueError(self._closed())

    def read_texts(self, clip: CLIPModel, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A user's texts, ids (s, t) -> trimmed ids and EOS positions (s,). Raises ValueError if they cannot serve."""
        raise ValueError(self._closed())

    def text_features(
        self, clip: CLIPModel, input_ids: torch.Tensor, eos: torch.Tensor, packing: Packing | None = None
    ) -> torch.Tensor:
        """T with this adapter's prompts: ids (s, t), EOS positions (s,) -> (s, d), not normalised.

        `packing` is `self.pack` of these sentences, which is made where it is not given.
        """
        raise ValueError(self._closed())

    def image_features(self, clip: CLIPModel, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """V with this adapter's prompts: (b, 3, h, w) -> (b, d), not normalised."""
        raise ValueError(self._closed())

    def image_states(self, clip: CLIPModel, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """What the vision tower says of pictures before this adapter has any part in it: (b, 3, h, w) -> (b, d).

        Where the tower has no learned prompts this never changes, so `hf_tgpt.features` can keep it, and
        `model(image_states=...)` takes it in place of the pictures. A method may need more than the image features.
        """
        return self.image_features(clip, pixel_values, **kwargs)

    def check_vision_is_frozen(self) -> None:
        """Raises ValueError where the vision tower has learned prompts, so that its output cannot be kept."""
        if not self.vision_is_frozen:
            raise ValueError(
                f"{self.config.method} as configured learns prompts in the vision tower, whose output therefore "
                "changes with every step and cannot be kept. Train on the pictures, or without visual prompts."
            )

    def set_class_names(self, clip: CLIPModel, class_names: list[str]) -> None:
        raise ValueError(self._closed())

    def tokenizer(self, clip: CLIPModel) -> PreTrainedTokenizerBase:
        """The tokenizer that the config names, or the base model's."""
        return load_tokenizer(clip, self.config.tokenizer_name_or_path, self.config.revision)

    def _closed(self) -> str:
        return (
            f"{self.config.method} has its {len(self.config.class_names)} classes baked into its trained weights: it "
            "answers model(pixel_values) only, takes no texts and no other class names. Train a new adapter for other "
            "classes, use an open method such as MAPLE, or call CLIP itself inside `with model.disable_adapter():`."
        )


class OpenPromptLearner(PromptLearner):
    """A learner that classifies by class sentences. A method gives `text_features` and `image_features`."""

    @property
    def takes_new_classes(self) -> bool:
        return True

    def __init__(self, config: PromptConfig, clip: CLIPModel):
        super().__init__(config, clip)
        self._cache: Kept | None = None
        self._chunks: tuple[tuple, list[tuple[slice, Packing | None]]] | None = None
        self.set_class_names(clip, config.class_names)

    def set_class_names(self, clip: CLIPModel, class_names: list[str]) -> None:
        """Other classes from now on, without training. Raises ValueError for empty, duplicate or too long names."""
        n, context = self.config.prompt_length, dimensions(clip)["context_length"]
        room = context - 4  # BOS, one token of a name, full stop, EOS
        if n > room:
            raise ValueError(f"`prompt_length`={n}: the text tower's context of {context} leaves room for {room}.")
        with torch.inference_mode(False):
            ids, eos = class_tokens(
                self.tokenizer(clip), class_names, self.config.initial_text, self.config.prompt_length, clip
            )
        self.class_ids = nn.Buffer(ids, persistent=False)  # (c, t)
        self.class_eos = nn.Buffer(eos, persistent=False)  # (c,)
        self.config.class_names = list(class_names)
        self._cache = self._chunks = None

    def forward(
        self,
        clip: CLIPModel,
        pixel_values: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        image_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """pixel_values (b, 3, h, w), labels (b,) -> ImageClassifierOutput with logits (b, c)."""
        if image_states is None:
            assert pixel_values is not None  # PromptedCLIPModel sees to it that there is one of the two
            image_states = self.image_features(clip, pixel_values, **kwargs)
        image_features = unit(image_states)  # (b, d)
        class_features = self.class_features(clip)  # (c, d)
        logits = logit_scale(clip) * image_features @ class_features.T  # (b, c)
        return ImageClassifierOutput(loss=classification_loss(logits, labels), logits=logits)

    @torch.compiler.disable  # the cache reads version counters, which a compiled graph has none of
    def class_features(self, clip: CLIPModel) -> torch.Tensor:
        """The classes' unit features (c, d), computed once and kept while what they rest on stays.

        That is in evaluation, and in training too where only vision prompts are trained.

        Every change that torch counts is seen: training, loading, casts, moves, another adapter, other class names. A
        write through `.data` is not counted; call train() or eval() after one.
        """
        rests_on = [*self.text_weights(), *text_parameters(clip)]
        trained = any(p.requires_grad for p in rests_on)
        if self.training and (trained or clip.config.text_config.attention_dropout > 0):
            return in_shares(lambda share: self._encode_classes(clip, share), len(self.class_ids))
        if trained and torch.is_grad_enabled():
            return self._encode_classes(clip)
        self._cache = kept(self._cache, rests_on, lambda: self._encode_classes(clip))
        return self._cache[1]

    def _encode_classes(self, clip: CLIPModel, share: slice = slice(None)) -> torch.Tensor:
        weights = [*self.text_weights(), *text_parameters(clip)]
        return unit(in_chunks(lambda chunk: self.class_chunk(clip, *chunk), self.class_chunks(clip, share), weights))

    def text_weights(self) -> Iterable[nn.Parameter]:
        """The weights that class features rest on. To override where some belong to the images alone."""
        return self.parameters()

    def class_chunk(self, clip: CLIPModel, part: slice, packing: Packing | None) -> torch.Tensor:
        """T of a slice of the classes, (part, d), not normalised. To override where prompts differ by class."""
        return self.text_features(clip, self.class_ids[part], self.class_eos[part], packing)

    def class_chunks(self, clip: CLIPModel, share: slice) -> list[tuple[slice, Packing | None]]:
        """The classes of a share in chunks, each with its packing; worked out once."""
        key = self.config.text_chunk_size, share
        if self._chunks is None or self._chunks[0] != key:
            with torch.inference_mode(False):
                ids, eos = self.class_ids, self.class_eos
                numbers = range(len(ids))[share]
                found = chunks(eos[share], self.shared_length(ids, eos), key[0], chunk_tokens(clip))
                parts = [slice(numbers[part].start, numbers[part].stop) for part in found]
                self._chunks = key, [(part, self.pack(clip, ids[part], eos[part])) for part in parts]
        return self._chunks[1]

    def pack(self, clip: CLIPModel, input_ids: torch.Tensor, eos: torch.Tensor) -> Packing | None:
        """Sentences, ids (s, t), EOS positions (s,) -> how they share rows; None if they do not even begin alike."""
        shared = self.shared_length(input_ids, eos)
        return pack(eos, shared, dimensions(clip)["context_length"]) if shared else None

    def shared_length(self, input_ids: torch.Tensor, eos: torch.Tensor) -> int:
        """How many leading tokens all sentences have in common once prompts are in. To override if not after BOS."""
        words = input_ids.clone()
        words[:, 1 : 1 + self.config.prompt_length] = 0
        return common_length(words, eos)

    def train(self, mode: bool = True) -> Self:
        self._cache = None
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # .to(), .half(), .cuda(): weights may move within the same Parameter objects.
        self._cache = self._chunks = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None, "_chunks": None}

    def read_texts(self, clip: CLIPModel, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, eos = trim(clip, input_ids)
        n, shortest = self.config.prompt_length, int(eos.min())
        if n and shortest <= n:
            like = f"{self.config.initial_text or ' '.join([PLACEHOLDER] * n)} cat."
            raise ValueError(
                f"`input_ids` holds a text of {shortest - 1} tokens beside BOS and EOS, but the first {n} are learned; "
                f"pass class sentences like {like!r}."
            )
        return ids, eos

    def compare(
        self,
        clip: CLIPModel,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        return_loss: bool = False,
        **kwargs: Any,
    ) -> CLIPOutput:
        """CLIP's own call with the prompts in place: input_ids (s, t), pixel_values (b, 3, h, w) -> CLIPOutput.

        The texts are to be class sentences: their tokens after BOS are where the prompts go.
        """
        text_features = self.text_features(clip, *self.read_texts(clip, input_ids))  # (s, d)
        image_features = self.image_features(clip, pixel_values, **kwargs)  # (b, d)
        text_embeds, image_embeds = unit(text_features), unit(image_features)
        logits = logit_scale(clip) * image_embeds @ text_embeds.T  # (b, s)
        return clip_output(
            logits,
            image_embeds,
            text_embeds,
            return_loss,
            text_model_output=BaseModelOutputWithPooling(pooler_output=text_features),
            vision_model_output=BaseModelOutputWithPooling(pooler_output=image_features),
        )


def clip_output(
    logits: torch.Tensor, image_embeds: torch.Tensor, text_embeds: torch.Tensor, return_loss: bool, **parts: Any
) -> CLIPOutput:
    """The answer to CLIP's own call, from logits (b, s) and unit features."""
    return CLIPOutput(
        loss=image_text_contrastive_loss(logits.T) if return_loss else None,
        logits_per_image=logits,
        logits_per_text=logits.T,
        text_embeds=text_embeds,
        image_embeds=image_embeds,
        **parts,
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


Kept = tuple[list | None, torch.Tensor]


def kept(before: Kept | None, rests_on: list[nn.Parameter], compute: Callable[[], torch.Tensor]) -> Kept:
    """(state, value): the value from `before` while all that it rests on is as it was, else computed, without gradient.

    Seen is every change that torch counts, to weights, their place, dtype and autocast.
    """
    if any(p.is_inference() for p in rests_on):  # such tensors do not count their changes
        return None, compute()
    device = rests_on[0].device.type
    precision = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    state = [(p, p.data_ptr(), p._version, p.dtype, precision) for p in rests_on]
    if before is not None and before[0] is not None and _same(before[0], state):
        return before
    with torch.inference_mode(False), torch.no_grad():
        return state, compute()


def _same(old: list, new: list) -> bool:
    return len(old) == len(new) and all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(old, new, strict=True))
