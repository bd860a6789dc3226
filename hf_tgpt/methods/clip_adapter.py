"""CLIP-Adapter: a small residual network on the frozen image features, compared with the class texts.

Source: Gao, Geng, Zhang, Ma, Fang, Zhang, Li, Qiao: CLIP-Adapter: Better Vision-Language Models with Feature Adapters,
IJCV 2024, arXiv 2110.04544, section 3.2.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.feature_head import FeatureHead, FeatureHeadConfig
from ..adapters.fitting import Features, Steps
from ..adapters.registry import register
from ..encoders import DualEncoder
from ..encoders.walk import encode_image, unit
from ..texts.class_texts import ClassTexts
from ..utils.fields import at_least, between, checked, documented
from .zero_shot import ZeroShot


@checked
class CLIPAdapterConfig(FeatureHeadConfig):
    """Configuration of CLIP-Adapter.

    Example:
        >>> config = CLIPAdapterConfig(class_names=["cat", "dog"], residual_ratio=0.6)
    """

    residual_ratio: float = documented(
        0.2, "Weight of the adapted features; the image tower's own have the rest. Default: as released.", between(0, 1)
    )
    reduction: int = documented(
        4, "Factor by which the hidden layer is narrower than the features. Default: as released.", at_least(1)
    )

    @property
    def takes_new_classes(self) -> bool:
        return True


class CLIPAdapter(FeatureHead, ZeroShot):
    """Two layers without biases: down (d / 4, d), up (d, d / 4)."""

    config: CLIPAdapterConfig  # it has the fields that zero-shot reads
    citation = """@article{gao2023clip,
  title = {{CLIP}-Adapter: Better Vision-Language Models with Feature Adapters},
  author = {Gao, Peng and Geng, Shijie and Zhang, Renrui and Ma, Teli and Fang, Rongyao and Zhang, Yongfeng and
            Li, Hongsheng and Qiao, Yu},
  journal = {International Journal of Computer Vision},
  year = {2023}
}"""
    grid: ClassVar = {"residual_ratio": [0.2, 0.4, 0.6, 0.8, 1.0]}
    grid_is_trained_with: ClassVar = True
    original_names: ClassVar = {"adapter.fc.0.weight": "down.weight", "adapter.fc.2.weight": "up.weight"}

    def __init__(self, config: CLIPAdapterConfig, encoder: DualEncoder):
        super().__init__(config, encoder)
        width, device = encoder.shape()["projection_width"], encoder.model.device
        config.require(
            "reduction", config.reduction <= width, f"the features have width {width}; choose {width} or less."
        )
        self.down = nn.Linear(width, width // config.reduction, bias=False, device=device)
        self.up = nn.Linear(width // config.reduction, width, bias=False, device=device)

    def start(self, encoder: DualEncoder, data: Features) -> None:
        generator = torch.Generator().manual_seed(0)  # each fold and the final fit start from the same weights
        for layer in (self.down, self.up):
            bound = layer.weight.shape[1] ** -0.5  # nn.Linear's own initialisation
            values = torch.empty(layer.weight.shape).uniform_(-bound, bound, generator=generator)
            layer.weight.data.copy_(values)

    def epochs(self, encoder: DualEncoder, data: Features, steps: Steps) -> Iterable[dict[str, float]]:
        return self.trained(encoder, data, steps)

    def texts(self, encoder: DualEncoder, class_texts: ClassTexts | None = None) -> torch.Tensor:
        return self.class_features(encoder, class_texts)

    def take_class_features(self, encoder: DualEncoder, features: torch.Tensor) -> None:
        ZeroShot.take_class_features(self, encoder, features)

    def text_weights(self) -> Iterable[nn.Parameter]:
        return ()

    def adapted(self, states: torch.Tensor) -> torch.Tensor:
        """Image features (b, d) -> features (b, d), both not normalised."""
        states = states.to(self.up.weight)
        change = F.relu(self.up(F.relu(self.down(states))))
        return torch.lerp(states, change, self.config.residual_ratio)

    def classify(self, encoder: DualEncoder, states: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        features = unit(self.adapted(states))
        return self.scaled(encoder, features @ texts.T.to(features))

    def image_features(self, encoder: DualEncoder, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The image tower's features, adapted: (b, 3, h, w) -> (b, d), not normalised."""
        return self.adapted(encode_image(encoder, pixel_values, **kwargs))


register("CLIP_ADAPTER", CLIPAdapterConfig, CLIPAdapter)
