"""GDA: Gaussian discriminant analysis on frozen image features, added to zero-shot classification; no training.

Source: Wang, Liang, Sheng, He, Wang, Tan: A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation, ICLR 2024,
arXiv 2402.04087, section 3.2.
"""

import math
from typing import ClassVar

import torch
from torch import nn

from ..adapters.feature_head import FeatureHead, FeatureHeadConfig
from ..adapters.fitting import Features
from ..adapters.registry import register
from ..encoders import DualEncoder
from ..encoders.walk import unit
from ..texts.class_texts import ClassTexts
from ..utils.fields import at_least, checked, documented

_NOTHING = 1e-24  # share of a unit feature's squared length: a difference below it is rounding


@checked
class GDAConfig(FeatureHeadConfig):
    """Configuration of GDA.

    Example:
        >>> config = GDAConfig(class_names=["cat", "dog"], alpha=1.0, search=False)
    """

    alpha: float = documented(
        1.0, "Weight of the Gaussian classifier's logits, which are added to zero-shot's.", at_least(0)
    )


class GDA(FeatureHead):
    """Classes as Gaussians with one covariance: weight (c, d), bias (c,); precision (d, d) for classes added later.

    All in float64, since float32 would lose the differences of nearly equal features.
    """

    config: GDAConfig
    citation = """@inproceedings{wang2024hard,
  title = {A Hard-to-Beat Baseline for Training-free {CLIP}-based Adaptation},
  author = {Wang, Zhengbo and Liang, Jian and Sheng, Lijun and He, Ran and Wang, Zilei and Tan, Tieniu},
  booktitle = {International Conference on Learning Representations},
  year = {2024}
}"""
    grid: ClassVar = {"alpha": [10.0**power for power in range(-4, 3)]}

    def __init__(self, config: GDAConfig, encoder: DualEncoder):
        super().__init__(config, encoder)
        width, count, device = encoder.shape()["projection_width"], len(config.class_names), encoder.model.device
        options = {"dtype": torch.float64, "device": device}
        self.weight = nn.Buffer(torch.zeros(count, width, **options))
        self.bias = nn.Buffer(torch.zeros(count, **options))
        self.precision = nn.Buffer(torch.zeros(width, width, **options))

    @torch.no_grad()
    def start(self, encoder: DualEncoder, data: Features) -> None:
        classes, width = len(self.config.class_names), data.states.shape[-1]
        views, labels = len(data.states), data.labels.to(self.weight.device)
        means = self.weight.new_zeros(classes, width).index_add(0, labels, self._sums(data))
        means /= views * labels.bincount(minlength=classes)[:, None]
        scatter = torch.zeros_like(self.precision)  # (N - 1) S
        for view in data.states:
            centred = self._features(view) - means[labels]  # (n, d)
            scatter += centred.T @ centred
        count = views * len(labels)
        if scatter.trace() <= _NOTHING * count:
            # Departs from the release, which divides by zero here: all directions count equally.
            scatter, spread = torch.eye(width).to(scatter) * (count - 1) / width, 1.0
            self.say(
                "GDA has one feature for each class and so no variance within a class, so it reduces to "
                "the nearest class mean; give several pictures of a class, or several views of each."
            )
        else:
            spread = float(scatter.trace()) / (count - 1)  # tr(S)
        precision = width * torch.linalg.inv(scatter + spread * torch.eye(width).to(scatter))
        self.precision = nn.Buffer(((precision + precision.T) / 2).contiguous())  # older safetensors require it
        self.weight = nn.Buffer(means @ self.precision)
        self.bias = nn.Buffer(-(self.weight * means).sum(-1) / 2 - math.log(classes))
        self.note(classes=classes)

    def _features(self, states: torch.Tensor) -> torch.Tensor:
        return unit(states.float()).to(self.precision)

    def _sums(self, data: Features) -> torch.Tensor:
        """Each picture's unit features, added up over its views: (n, d)."""
        total = self._features(data.states[0])
        for view in data.states[1:]:
            total = total + self._features(view)
        return total

    def classify(self, encoder: DualEncoder, states: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        features = unit(states)  # (b, d)
        gaussian = features.to(self.weight) @ self.weight.T + self.bias  # (b, c)
        return self.scaled(encoder, features @ texts.T.to(features)) + self.config.alpha * gaussian

    def linear_head(
        self, encoder: DualEncoder, class_texts: ClassTexts | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = self.as_linear(encoder, self.texts(encoder).double())
        weight, bias = weight + self.config.alpha * self.weight, bias + self.config.alpha * self.bias
        return weight.float(), bias.float()

    @torch.no_grad()
    def add_class(self, encoder: DualEncoder, pictures: Features) -> None:
        """With the covariance of the earlier fit and the mean of the new pictures."""
        mean = self._sums(pictures).mean(0) / len(pictures.states)  # (d,)
        weight = self.precision @ mean
        classes = self.noted("classes", len(self.weight))  # the prior that the other classes have
        self.weight = nn.Buffer(torch.cat([self.weight, weight[None]]))
        self.bias = nn.Buffer(torch.cat([self.bias, (-(weight @ mean) / 2 - math.log(classes))[None]]))

    def remove_class(self, label: int) -> None:
        keep = [row for row in range(len(self.weight)) if row != label]
        self.weight, self.bias = nn.Buffer(self.weight[keep]), nn.Buffer(self.bias[keep])


register("GDA", GDAConfig, GDA)
