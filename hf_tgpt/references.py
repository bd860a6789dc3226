"""What prompt methods are compared with, in the same harness: zero-shot CLIP, a linear probe and PEFT's own LoRA.

None of these is an adapter of this package. Each is a module that classifies pixel_values like an adapted model does,
so that training, evaluation and tables treat all methods alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel
from transformers.modeling_outputs import ImageClassifierOutput

from .classes import load_tokenizer, tokenize
from .config import check_class_names, documented
from .learner import classification_loss
from .towers import dimensions, encode_image, logit_scale, unit

_TEMPLATES = ["a photo of a {}."]
_TEMPLATES_HELP = "Sentences with {} for the class name, averaged after encoding."


@dataclass
class ZeroShotConfig:
    """Plain CLIP. Nothing is trained."""

    templates: list[str] = documented(_TEMPLATES, _TEMPLATES_HELP)


@dataclass
class LinearProbeConfig:
    """A linear classifier on CLIP's frozen unit image features."""


@dataclass
class LoRAConfig:
    """PEFT's LoRA on both towers, trained on the same loss as the prompts. Defaults: CLIP-LoRA's (Zanella and Ben Ayed,
    CVPR 2024 workshops)."""

    r: int = documented(2, "Rank of the updates.")
    lora_alpha: int = documented(1, "Their scale, times r.")
    lora_dropout: float = documented(0.25, "Dropout before them, in training.")
    target_modules: list[str] = documented(["q_proj", "k_proj", "v_proj"], "Linear layers of the towers to update.")
    templates: list[str] = documented(_TEMPLATES, _TEMPLATES_HELP)


REFERENCES = {"zero-shot": ZeroShotConfig, "linear-probe": LinearProbeConfig, "lora": LoRAConfig}


class SentenceClassifier(nn.Module):
    """A CLIP, adapted or not, that classifies by class sentences. The class list is open."""

    uses_captions = False

    def __init__(self, clip: CLIPModel | PeftModel, class_names: list[str], templates: list[str]):
        super().__init__()
        self.clip, self.templates = clip, templates
        self.set_class_names(class_names)

    def set_class_names(self, class_names: list[str]) -> None:
        check_class_names(class_names)
        base = self.clip.get_base_model() if isinstance(self.clip, PeftModel) else self.clip
        self.class_names, self._cache, self._sentences = list(class_names), None, []
        for template in self.templates:
            texts = [template.replace("{}", name) for name in class_names]
            self._sentences.append(tokenize(load_tokenizer(base), texts, base, class_names)[0])

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """pixel_values (b, 3, h, w), labels (b,) -> output with logits (b, c)."""
        image_features = unit(self.clip.get_image_features(pixel_values).pooler_output)  # (b, d)
        logits = logit_scale(self.clip) * image_features @ self.class_features().T  # (b, c)
        return ImageClassifierOutput(loss=classification_loss(logits, labels), logits=logits)

    def class_features(self) -> torch.Tensor:
        """(c, d), computed once for an evaluation."""
        if self._cache is not None and not torch.is_grad_enabled():
            return self._cache
        device = pixel_device(self.clip)
        features = [unit(self.clip.get_text_features(ids.to(device)).pooler_output) for ids in self._sentences]
        features = unit(torch.stack(features).mean(0))
        if not self.training and not torch.is_grad_enabled():
            self._cache = features
        return features

    def train(self, mode: bool = True):
        self._cache = None
        return super().train(mode)


class LinearProbe(nn.Module):
    """One linear layer on CLIP's frozen unit image features. The class list is closed."""

    uses_captions = False

    def __init__(self, clip: CLIPModel, class_names: list[str]):
        super().__init__()
        check_class_names(class_names)
        self.clip, self.class_names = clip.requires_grad_(False), list(class_names)
        self.head = nn.Linear(dimensions(clip)["projection_width"], len(class_names), device=clip.device)

    def set_class_names(self, class_names: list[str]) -> None:
        raise ValueError("A linear probe knows the classes it was trained on, and no others; train another one.")

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """pixel_values (b, 3, h, w), labels (b,) -> output with logits (b, c)."""
        logits = self.head(unit(encode_image(self.clip, pixel_values)))
        return ImageClassifierOutput(loss=classification_loss(logits, labels), logits=logits)


def make_reference(method: str, clip: CLIPModel, class_names: list[str], **fields) -> nn.Module:
    """The module of a method in REFERENCES, with the fields of its config."""
    config = REFERENCES[method](**fields)
    if method == "zero-shot":
        return SentenceClassifier(clip.requires_grad_(False), class_names, config.templates)
    if method == "linear-probe":
        return LinearProbe(clip, class_names)
    names = ("r", "lora_alpha", "lora_dropout", "target_modules")
    lora = LoraConfig(**{name: getattr(config, name) for name in names})
    return SentenceClassifier(get_peft_model(clip, lora), class_names, config.templates)


def save_reference(model: nn.Module, folder: str | Path) -> None:
    """LoRA as PEFT saves it, a probe's layer as safetensors; class names and templates beside them."""
    folder = Path(folder)
    content = {"class_names": model.class_names, "templates": getattr(model, "templates", None)}
    (folder / "classes.json").write_text(json.dumps(content, indent=2) + "\n")
    if isinstance(model, LinearProbe):
        save_file(model.head.state_dict(), folder / "linear_probe.safetensors")
    elif isinstance(model.clip, PeftModel):
        model.clip.save_pretrained(folder)


def load_reference(clip: CLIPModel, folder: str | Path) -> nn.Module:
    """What `save_reference` wrote, on a fresh CLIP, for evaluation."""
    folder = Path(folder)
    content = json.loads((folder / "classes.json").read_text())
    if (folder / "linear_probe.safetensors").exists():
        model = LinearProbe(clip, content["class_names"])
        model.head.load_state_dict(load_file(folder / "linear_probe.safetensors"))
        return model.eval()
    if (folder / "adapter_config.json").exists():
        clip = PeftModel.from_pretrained(clip, folder)
    return SentenceClassifier(clip, content["class_names"], content["templates"]).eval()


def pixel_device(clip: nn.Module) -> torch.device:
    return next(clip.parameters()).device
