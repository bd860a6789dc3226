"""Tip-Adapter: a cache of the training pictures' features, whose votes by nearness are added to zero-shot
classification, and Tip-Adapter-F, which also trains the cached keys.

Source: Zhang, Fang, Zhang, Gao, Li, Dai, Qiao, Li: Tip-Adapter: Training-free Adaption of CLIP for Few-shot
Classification, ECCV 2022, arXiv 2207.09519, sections 3.2 and 3.3.
"""

from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.feature_head import FeatureHead, FeatureHeadConfig
from ..adapters.fitting import Features, Steps
from ..adapters.registry import register
from ..encoders import DualEncoder
from ..encoders.walk import unit
from ..utils.fields import at_least, checked, documented


@checked
class TipAdapterConfig(FeatureHeadConfig):
    """Configuration of Tip-Adapter and, with `train_keys`, of Tip-Adapter-F.

    Example:
        >>> config = TipAdapterConfig(class_names=["cat", "dog"], train_keys=True)
    """

    alpha: float = documented(1.0, "Weight of the cache's logits, which are added to zero-shot's.", at_least(0))
    beta: float = documented(5.5, "How fast a cached picture's vote decreases with its distance.", at_least(0))
    train_keys: bool = documented(False, "Train the cached features, as Tip-Adapter-F does.")


class TipAdapter(FeatureHead):
    """The cache: keys (n, d), a unit feature for each training picture, and key_labels (n,)."""

    config: TipAdapterConfig
    keys: torch.Tensor
    citation = """@inproceedings{zhang2022tip,
  title = {Tip-Adapter: Training-free Adaption of {CLIP} for Few-shot Classification},
  author = {Zhang, Renrui and Fang, Rongyao and Zhang, Wei and Gao, Peng and Li, Kunchang and Dai, Jifeng and
            Qiao, Yu and Li, Hongsheng},
  booktitle = {European Conference on Computer Vision},
  year = {2022}
}"""
    grid: ClassVar = {
        "alpha": [0.1 * 1.5**power for power in range(13)],  # to 13
        "beta": [0.25 * 1.5**power for power in range(12)],  # to 21.6
    }
    original_names: ClassVar = {"weight": "keys", "cache_keys": "keys", "cache_labels": "key_labels"}

    def __init__(self, config: TipAdapterConfig, encoder: DualEncoder):
        super().__init__(config, encoder)
        width, device = encoder.shape()["projection_width"], encoder.model.device
        count = self.noted("keys", 0)
        self._keep(torch.zeros(count, width, device=device), torch.zeros(count, dtype=torch.int64, device=device))

    def _keep(self, keys: torch.Tensor, labels: torch.Tensor) -> None:
        if self.config.train_keys:
            before = self._parameters.get("keys")
            self.keys = nn.Parameter(keys, requires_grad=before is None or before.requires_grad)
        else:
            self.keys = nn.Buffer(keys)
        self.key_labels = nn.Buffer(labels)
        if len(labels):
            self.note(keys=len(labels))

    def make_room(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if len(count := shapes.get("key_labels", ())) == 1 and count != tuple(self.key_labels.shape):
            self._keep(self.keys.new_zeros(*count, self.keys.shape[1]), self.key_labels.new_zeros(count))

    def start(self, encoder: DualEncoder, data: Features) -> None:
        self._keep(data.averaged().to(self.keys.device), data.labels.to(self.key_labels))

    def epochs(self, encoder: DualEncoder, data: Features, steps: Steps) -> Iterable[dict[str, float]]:
        return self.trained(encoder, data, steps) if self.config.train_keys else ()

    def classify(self, encoder: DualEncoder, states: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        features = unit(states)  # (b, d)
        nearness = torch.exp(self.config.beta * (features @ self.keys.T.to(features) - 1))  # (b, n)
        votes = F.one_hot(self.key_labels, len(texts)).to(features)  # (n, c)
        return self.scaled(encoder, features @ texts.T.to(features)) + self.config.alpha * nearness @ votes

    @torch.no_grad()
    def add_class(self, encoder: DualEncoder, pictures: Features) -> None:
        labels = torch.full_like(pictures.labels, len(self.config.class_names)).to(self.key_labels)
        keys = pictures.averaged().to(self.keys)
        self._keep(torch.cat([self.keys, keys]), torch.cat([self.key_labels, labels]))

    @torch.no_grad()
    def remove_class(self, label: int) -> None:
        keep = self.key_labels != label
        labels = self.key_labels[keep]
        self._keep(self.keys[keep], labels - (labels > label).long())


register("TIP_ADAPTER", TipAdapterConfig, TipAdapter)
