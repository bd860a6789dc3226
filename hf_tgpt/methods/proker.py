"""ProKeR: kernel ridge regression, on frozen image features, of what zero-shot classification leaves unexplained.

Source: Bendou, Ouasfi, Gripon, Boukhayma: ProKeR: A Kernel Perspective on Few-Shot Adaptation of Large Vision-Language
Models, CVPR 2025, arXiv 2501.11175, section 4.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.feature_head import FeatureHead, FeatureHeadConfig
from ..adapters.fitting import Features
from ..adapters.registry import register
from ..encoders import DualEncoder
from ..encoders.walk import unit
from ..utils.fields import above, at_least, checked, documented


@checked
class ProKeRConfig(FeatureHeadConfig):
    """Configuration of ProKeR.

    Example:
        >>> config = ProKeRConfig(class_names=["cat", "dog"], beta=5.0, regularization=1.0, search=False)
    """

    beta: float = documented(5.0, "How fast the kernel decreases with the distance between two pictures.", at_least(0))
    regularization: float = documented(
        1.0,
        "Lambda: how closely the training pictures are fitted; with small values, logits stay close to zero-shot.",
        above(0),
    )


class ProKeR(FeatureHead):
    """The training pictures' unit features, keys (n, d), and their coefficients Z for each class (n, c)."""

    config: ProKeRConfig
    citation = """@inproceedings{bendou2025proker,
  title = {{ProKeR}: A Kernel Perspective on Few-Shot Adaptation of Large Vision-Language Models},
  author = {Bendou, Yassir and Ouasfi, Amine and Gripon, Vincent and Boukhayma, Adnane},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2025}
}"""
    grid: ClassVar = {
        "beta": [0.25 * 2.0**power for power in range(8)],  # to 32
        "regularization": [10.0 ** (power / 2) for power in range(-4, 7)],  # 0.01 to 1,000
    }

    def __init__(self, config: ProKeRConfig, encoder: DualEncoder):
        super().__init__(config, encoder)
        width, device = encoder.shape()["projection_width"], encoder.model.device
        count = self.noted("keys", 0)
        self.keys = nn.Buffer(torch.zeros(count, width, device=device))
        self.coefficients = nn.Buffer(torch.zeros(count, len(config.class_names), device=device))
        self._unexplained: torch.Tensor | None = None  # during the fit, (n, c)

    def make_room(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if len(shape := shapes.get("keys", ())) == 2 and shape[0] != len(self.keys):
            self.keys = nn.Buffer(self.keys.new_zeros(shape[0], self.keys.shape[1]))
            self.coefficients = nn.Buffer(self.coefficients.new_zeros(shape[0], self.coefficients.shape[1]))
            self.note(keys=shape[0])

    @torch.no_grad()
    def start(self, encoder: DualEncoder, data: Features) -> None:
        self.keys = nn.Buffer(data.averaged().to(self.keys.device))
        self.note(keys=len(self.keys))
        explained = self.keys.double() @ self.texts(encoder).T.double()
        self._unexplained = F.one_hot(data.labels.to(explained.device), explained.shape[1]) - explained

    @torch.no_grad()
    def settle(self, values: dict[str, float]) -> None:
        super().settle(values)
        assert self._unexplained is not None  # `start` has made it
        ridge = self._kernel(self.keys.double()) / self.config.regularization
        ridge.diagonal().add_(1.0)
        factor = torch.linalg.cholesky(ridge)
        self.coefficients = nn.Buffer(torch.cholesky_solve(self._unexplained, factor).to(self.keys).contiguous())

    def _kernel(self, features: torch.Tensor) -> torch.Tensor:
        """Unit features (b, d) -> their kernel with the training pictures (b, n)."""
        return (features @ self.keys.T.to(features)).sub_(1).mul_(self.config.beta).exp_()

    def classify(self, encoder: DualEncoder, states: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        features = unit(states)  # (b, d)
        cosines = features @ texts.T.to(features) + self._kernel(features) @ self.coefficients.to(features)
        # Scaled as a whole, so that the softmax gives probabilities; the paper takes the largest, without a factor.
        return self.scaled(encoder, cosines)


register("PROKER", ProKeRConfig, ProKeR)
