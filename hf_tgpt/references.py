"""What prompt methods are compared with, in the same harness: zero-shot CLIP, a linear probe and PEFT's own LoRA.

None of these is an adapter of this package. Each is a module that answers model(pixel_values, labels) and has
`class_names` as an adapted model does, so that training, evaluation and tables treat all methods alike.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import ImageClassifierOutput

from .base_model import name_in_files
from .card import replace_empty_card
from .classes import load_tokenizer, tokenize
from .config import check_class_names, check_templates, check_weights_file, documented
from .learner import Kept, classification_loss, kept
from .reading import read_json
from .towers import dimensions, encode_image, encode_tokens, logit_scale, text_parameters, unit

NOTE = "reference.json"
_PROBE = "linear_probe.safetensors"


@dataclass
class ZeroShotConfig:
    """Configuration of zero-shot CLIP, which learns nothing."""

    templates: list[str] | dict[str, list[str]] = documented(
        ["a photo of a {}."],
        "Sentences with {} for the class name, averaged after encoding. In Python also {class: [sentences about it]}.",
    )
    tokenizer_name_or_path: str | None = documented(None, "Tokenizer of the sentences. Default: the base model's own.")

    def __post_init__(self) -> None:
        if not isinstance(self.templates, dict):
            check_templates(self.templates)


@dataclass
class LoRAConfig(ZeroShotConfig):
    """Configuration of PEFT's LoRA on both towers of CLIP, after CLIP-LoRA."""

    r: int = documented(2, "Rank of the updates. Default: CLIP-LoRA's (Zanella and Ben Ayed, CVPR workshops 2024).")
    # Departs from the release, which scales by lora_alpha / sqrt(r).
    lora_alpha: int = documented(1, "The updates are scaled by lora_alpha / r, as PEFT does.")
    lora_dropout: float = documented(0.25, "Dropout of what goes into the updates, in training. Default: CLIP-LoRA's.")
    target_modules: list[str] = documented(["q_proj", "k_proj", "v_proj"], "Linear layers of the towers to update.")


@dataclass
class LinearProbeConfig:
    """Configuration of a linear probe, which has nothing to choose."""


class Reference(nn.Module):
    """Base of the three. Raises ValueError for empty or double class names."""

    config_class: ClassVar[type[ZeroShotConfig] | type[LinearProbeConfig]]
    uses_captions: ClassVar[bool] = False
    takes_new_classes: ClassVar[bool]
    learns_nothing: ClassVar[bool] = False

    def __init__(self, clip: CLIPModel, class_names: list[str], config: Any):
        super().__init__()
        check_class_names(class_names)
        self.clip, self.class_names, self.settings = clip.requires_grad_(False), list(class_names), config

    @property
    def base(self) -> CLIPModel:
        return self.clip

    def set_class_names(self, class_names: list[str]) -> None:
        """Gives it other classes, without training. Raises ValueError where that cannot be."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        _write_note(self, folder)

    def load_weights(self, folder: str | os.PathLike[str]) -> None:
        """Those that `save_pretrained` wrote beside the note; there may be none."""


class ZeroShot(Reference):
    """A CLIP that classifies by class sentences, averaged over templates after encoding. The class list is open."""

    config_class: ClassVar[type[ZeroShotConfig]] = ZeroShotConfig
    settings: ZeroShotConfig
    takes_new_classes = True
    learns_nothing = True
    _head: Kept | None = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self._head = None
        return super()._apply(fn, recurse)

    def set_class_names(self, class_names: list[str]) -> None:
        """Raises ValueError for empty or double names; one that is too long is named at the first forward."""
        check_class_names(class_names)
        self.class_names = list(class_names)
        self._head = None

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """pixel_values (b, 3, h, w), labels (b,) -> ImageClassifierOutput with logits (b, c)."""
        image_features = unit(encode_image(self.base, pixel_values))  # (b, d)
        logits = logit_scale(self.base) * image_features @ self.class_features().T  # (b, c)
        return ImageClassifierOutput(loss=classification_loss(logits, labels), logits=logits)

    def class_features(self) -> torch.Tensor:
        """(c, d), in evaluation kept while the text tower stays as it is."""

        def head() -> torch.Tensor:
            tokenizer = load_tokenizer(self.base, self.settings.tokenizer_name_or_path)
            return zero_shot_head(self.base, self.class_names, self.settings.templates, tokenizer)

        if self.training or torch.is_grad_enabled():
            return head()
        self._head = kept(self._head, list(text_parameters(self.base)), head)
        return self._head[1]

    def train(self, mode: bool = True) -> Self:
        self._head = None
        return super().train(mode)


class LoRA(ZeroShot):
    """CLIP with PEFT's LoRA in both towers, trained on the cross entropy of zero-shot classification."""

    config_class: ClassVar[type[ZeroShotConfig]] = LoRAConfig
    learns_nothing = False
    # For its model card.
    method = "LORA"
    loader = "hf_tgpt.load_trained"
    kind = "lora"
    citation = """@inproceedings{hu2022lora,
  title = {LoRA: Low-Rank Adaptation of Large Language Models},
  author = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean and
            Wang, Lu and Chen, Weizhu},
  booktitle = {International Conference on Learning Representations},
  year = {2022}
}

@inproceedings{zanella2024low,
  title = {Low-Rank Few-Shot Adaptation of Vision-Language Models},
  author = {Zanella, Maxime and Ben Ayed, Ismail},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition Workshops},
  year = {2024}
}"""

    def __init__(self, clip: CLIPModel, class_names: list[str], config: LoRAConfig):
        super().__init__(clip, class_names, config)
        fields = {field.name for field in dataclasses.fields(LoraConfig)} & set(vars(config))
        self.clip = get_peft_model(clip, LoraConfig(**{name: getattr(config, name) for name in fields}))

    @property
    def base(self) -> CLIPModel:
        return self.clip.get_base_model() if isinstance(self.clip, PeftModel) else self.clip

    @property
    def base_model_name_or_path(self) -> str:
        return self.base.name_or_path

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """PEFT's own files, which PeftModel.from_pretrained reads, and ours."""
        self.clip.save_pretrained(folder, save_embedding_layers=False)  # or it would ask the Hub about the vocabulary
        super().save_pretrained(folder)
        replace_empty_card(folder, self)

    def load_weights(self, folder: str | os.PathLike[str]) -> None:
        check_weights_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))  # PEFT would take a pickle in its place
        self.clip.load_adapter(folder, "default", torch_device=str(self.clip.device))


def zero_shot_head(
    clip: CLIPModel,
    class_names: list[str],
    templates: list[str] | dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> torch.Tensor:
    """Unit text features of the classes, averaged over sentences after encoding -> (c, d).

    `templates` are sentences with {} for the class name, or {class name: [sentences about it]}, as
    `hf_tgpt.data.read_class_descriptions` reads; the latter are cut where they are longer than the context.

    Source: Radford et al., ICML 2021, section 3.1.4; per class: CuPL (Pratt et al., ICCV 2023, section 3).

    Raises ValueError for a class without sentences.
    """
    tokenizer = tokenizer or load_tokenizer(clip)
    if isinstance(templates, dict):
        return _head_of_descriptions(clip, class_names, templates, tokenizer)
    features = []
    for template in templates:
        sentences = [template.replace("{}", name) for name in class_names]
        features.append(unit(encode_tokens(clip, *tokenize(tokenizer, sentences, clip, class_names))))
    return unit(torch.stack(features).mean(0))


def _head_of_descriptions(
    clip: CLIPModel, class_names: list[str], descriptions: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    silent = [name for name in class_names if not descriptions.get(name)]
    if silent:
        raise ValueError(f"`templates` has no sentences for {', '.join(map(repr, silent[:5]))}; add at least one each.")
    rows = []
    for name in class_names:
        ids, eos = tokenize(tokenizer, descriptions[name], clip, [name] * len(descriptions[name]), truncate=True)
        rows.append(unit(encode_tokens(clip, ids, eos)).mean(0))
    return unit(torch.stack(rows))


class LinearProbe(Reference):
    """One linear layer on CLIP's frozen unit image features. The class list is closed."""

    config_class: ClassVar[type[LinearProbeConfig]] = LinearProbeConfig
    settings: LinearProbeConfig
    takes_new_classes = False

    def __init__(self, clip: CLIPModel, class_names: list[str], config: LinearProbeConfig):
        super().__init__(clip, class_names, config)
        self.head = nn.Linear(dimensions(clip)["projection_width"], len(class_names), device=clip.device)

    def set_class_names(self, class_names: list[str]) -> None:
        raise ValueError("A linear probe knows the classes it was trained on and no others; train another one.")

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_states: torch.Tensor | None = None,
    ) -> ImageClassifierOutput:
        """pixel_values (b, 3, h, w) or what `image_states` gave of them, labels (b,) -> output with logits (b, c)."""
        if image_states is None:
            if pixel_values is None:
                raise ValueError("`pixel_values` is missing; pass pictures (b, 3, h, w).")
            image_states = self.image_states(self.clip, pixel_values)
        # CLIP's own scale, for unit features are too short to learn from at the rates that prompts are trained at.
        logits = self.head(logit_scale(self.clip) * unit(image_states))  # (b, c)
        return ImageClassifierOutput(loss=classification_loss(logits, labels), logits=logits)

    @torch.no_grad()
    def image_states(self, clip: CLIPModel, pixel_values: torch.Tensor) -> torch.Tensor:
        """What `hf_tgpt.features` may keep: (b, 3, h, w) -> (b, d)."""
        return encode_image(clip, pixel_values)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        super().save_pretrained(folder)
        save_file(self.head.state_dict(), Path(folder) / _PROBE)

    def load_weights(self, folder: str | os.PathLike[str]) -> None:
        self.head.load_state_dict(load_file(Path(folder) / _PROBE))


REFERENCES: dict[str, type[Reference]] = {"zero-shot": ZeroShot, "linear-probe": LinearProbe, "lora": LoRA}


def clip_of(model: PeftModel | Reference) -> CLIPModel:
    """The CLIP in an adapted model or a reference."""
    return model.get_base_model() if isinstance(model, PeftModel) else model.base


def load_reference(clip: CLIPModel, folder: str | os.PathLike[str]) -> Reference:
    """What `save_pretrained` wrote, on a fresh CLIP, in evaluation mode. Raises ValueError if it cannot be read."""
    note = read_note(folder)
    kind = REFERENCES[note["method"]]
    try:
        model = kind(clip, note["class_names"], kind.config_class(**note["config"]))
        model.load_weights(folder)
    except Exception as error:  # a config or weights of nonsense make PEFT, torch and safetensors raise nearly anything
        raise ValueError(
            f"The config or the weights in {str(folder)!r} cannot be used ({error}); train the reference again."
        ) from error
    return model.to(clip.device).eval()


def read_note(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`method`, `base_model`, `class_names` and `config` of a saved reference."""
    path = Path(folder) / NOTE
    try:
        note = read_json(path)
        missing = {"method", "base_model", "class_names", "config"} - note.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if note["method"] not in REFERENCES:
            raise ValueError(f"`method`={note['method']!r}; known here: {', '.join(REFERENCES)}")
        if not isinstance(note["base_model"], str | None) or not isinstance(note["config"], dict):
            raise ValueError("`base_model` is no name or `config` no object")
        check_class_names(note["class_names"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}); train the reference again.") from error
    return note


def _write_note(model: Reference, folder: str | os.PathLike[str]) -> None:
    method = next(name for name, kind in REFERENCES.items() if kind is type(model))
    content = {
        "method": method,
        "base_model": name_in_files(model.base.name_or_path),
        "class_names": model.class_names,
        "config": dataclasses.asdict(model.settings),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / NOTE).write_text(json.dumps(content, indent=2) + "\n")
