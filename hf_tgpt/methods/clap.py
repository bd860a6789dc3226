"""ZS-LP and CLAP: a linear probe that starts from the class texts, and one that is kept near each class's texts, the
more closely the better they classify.

Source: Silva-Rodriguez, Hajimiri, Ben Ayed, Dolz: A Closer Look at the Few-Shot Adaptation of Large Vision-Language
Models, CVPR 2024, arXiv 2312.12730, sections 4.1 and 4.2.
"""

import math
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
from ..texts.class_texts import ClassTexts
from ..utils.fields import checked


@checked
class ZSLPConfig(FeatureHeadConfig):
    """Configuration of ZS-LP.

    Example:
        >>> config = ZSLPConfig(class_names=["cat", "dog"])
    """


class ZSLP(FeatureHead):
    """The weight W (c, d), whose rows start as the class texts t; only their directions matter."""

    config: ZSLPConfig
    citation = """@inproceedings{silva2024closer,
  title = {A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models},
  author = {Silva-Rodr{\\'i}guez, Julio and Hajimiri, Sina and Ben Ayed, Ismail and Dolz, Jose},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2024}
}"""
    unit_texts: ClassVar = False
    classifies_by_texts: ClassVar = False

    def __init__(self, config: ZSLPConfig, encoder: DualEncoder):
        super().__init__(config, encoder)
        self.awaits_weights = config.inference_mode
        if self.awaits_weights:  # so that it needs no texts
            shape = len(config.class_names), encoder.shape()["projection_width"]
            self.weight = nn.Parameter(torch.full(shape, math.nan, device=encoder.model.device))
        else:
            self.weight = nn.Parameter(self.texts(encoder).clone())

    @torch.no_grad()
    def start(self, encoder: DualEncoder, data: Features) -> None:
        self.weight.copy_(self.texts(encoder))

    def epochs(self, encoder: DualEncoder, data: Features, steps: Steps) -> Iterable[dict[str, float]]:
        return self.trained(encoder, data, steps)

    def classify(self, encoder: DualEncoder, states: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return self.scaled(encoder, (features := unit(states)) @ unit(self.weight).T.to(features))

    def linear_head(
        self, encoder: DualEncoder, class_texts: ClassTexts | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.as_linear(encoder, unit(self.weight))


@checked
class CLAPConfig(ZSLPConfig):
    """Configuration of CLAP.

    Example:
        >>> config = CLAPConfig(class_names=["cat", "dog"])
    """


class CLAP(ZSLP):
    """ZS-LP with a penalty on each row's distance from its class text, weighted by how well the text classifies."""

    config: CLAPConfig
    _trust: torch.Tensor  # lambda (c,), while it is fitted

    @torch.no_grad()
    def start(self, encoder: DualEncoder, data: Features) -> None:
        super().start(encoder, data)
        states, labels = data.every_view()
        shares = self.classify(encoder, states, self.weight).softmax(-1)  # zero-shot's, (v * n, c)
        own = shares.gather(1, labels[:, None]).squeeze(1)
        one_hot = F.one_hot(labels, len(self.weight)).to(own)
        self._trust = (own @ one_hot) / one_hot.sum(0)

    def penalty(self, texts: torch.Tensor) -> torch.Tensor:
        return (self._trust * (self.weight - texts).square().sum(-1)).mean()


register("ZS_LP", ZSLPConfig, ZSLP)
register("CLAP", CLAPConfig, CLAP)
