"""LP++: a linear probe blended with the class texts, with step sizes computed from the features.

Source: Huang, Shakeri, Dolz, Boudiaf, Bahig, Ben Ayed: LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP,
CVPR 2024, arXiv 2404.02285, section 3.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.feature_head import FeatureHead, FeatureHeadConfig
from ..adapters.fitting import Features, Steps
from ..adapters.registry import register
from ..encoders import DualEncoder
from ..encoders.walk import unit
from ..texts.class_texts import ClassTexts
from ..utils.fields import above, checked, documented

_BLEND_EVERY = 10  # epochs between steps of the blend
_START = 250.0  # initial blend per unit of the mean cosine


@checked
class LPPlusPlusConfig(FeatureHeadConfig):
    """Configuration of LP++.

    Example:
        >>> config = LPPlusPlusConfig(class_names=["cat", "dog"])
    """

    logit_scale: float | None = documented(
        None, "Factor of a fitted head's logits. Default: none, since LP++ learns their scale.", above(0)
    )


class LPPlusPlus(FeatureHead):
    """The weight W (c, d), the bias b (c,) and the blend a (c,) of each class's text."""

    config: LPPlusPlusConfig
    citation = """@inproceedings{huang2024lp,
  title = {{LP++}: A Surprisingly Strong Linear Probe for Few-Shot {CLIP}},
  author = {Huang, Yunshi and Shakeri, Fereshteh and Dolz, Jose and Boudiaf, Malik and Bahig, Houda and
            Ben Ayed, Ismail},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2024}
}"""

    def __init__(self, config: LPPlusPlusConfig, encoder: DualEncoder):
        super().__init__(config, encoder)
        count, width, device = len(config.class_names), encoder.shape()["projection_width"], encoder.model.device
        self.weight = nn.Parameter(torch.zeros(count, width, device=device))
        self.bias = nn.Parameter(torch.zeros(count, device=device))
        self.blend = nn.Parameter(torch.full((count,), 100.0, device=device))  # zero-shot, before it is fitted

    @torch.no_grad()
    def start(self, encoder: DualEncoder, data: Features) -> None:
        features, texts = data.averaged().to(self.weight), self.texts(encoder).to(self.weight)
        labels = data.labels.to(features.device)
        self.weight.zero_().index_add_(0, labels, features)
        self.bias.zero_()
        one_hot = F.one_hot(labels, len(texts)).to(features)
        own = (features * texts[labels]).sum(-1) @ one_hot / one_hot.sum(0)  # a class's mean cosine with its text, (c,)
        self.blend.fill_(float(_START * own.mean()))

    @torch.no_grad()
    def epochs(self, encoder: DualEncoder, data: Features, steps: Steps) -> Iterator[dict[str, float]]:
        """Full-batch gradient descent on the mean cross entropy; the recipe defines only the number of epochs."""
        features, texts = data.averaged().to(self.weight), self.texts(encoder).to(self.weight)
        labels, count, cosines = data.labels.to(features.device), len(data.labels), features @ texts.T
        step = 4 * count / float(torch.linalg.eigvalsh(features.double().T @ features.double())[-1])
        blend_step = count / (4 * float(cosines.square().sum(0).max()))
        one_hot, pushes = F.one_hot(labels, len(texts)).to(features), [torch.zeros_like(self.weight)]
        pushes.append(torch.zeros_like(self.bias))
        for epoch in range(1, steps.epochs + 1):
            logits = self._logits(features, cosines)
            error = (logits.softmax(-1) - one_hot) / count  # the loss's gradient, (n, c)
            for weight, push, gradient in zip(
                (self.weight, self.bias), pushes, (error.T @ features, error.sum(0)), strict=True
            ):
                weight.sub_(step * push.mul_(0.9).add_(gradient))
            # Departs from the release, which adds up the gradients of all epochs and never clears them.
            if epoch % _BLEND_EVERY == 0:
                self.blend.sub_(blend_step * (error * cosines).sum(0))
            yield {
                "step": epoch,
                "loss": float(F.cross_entropy(logits, labels)),
                "train_accuracy": float((logits.argmax(-1) == labels).float().mean()),
                "learning_rate": step,
            }

    def _logits(self, features: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor:
        return features @ self.weight.T.to(features) + self.bias + self.blend * cosines

    def classify(self, encoder: DualEncoder, states: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        features = unit(states)
        return (self.config.logit_scale or 1.0) * self._logits(features, features @ texts.T.to(features))

    def linear_head(
        self, encoder: DualEncoder, class_texts: ClassTexts | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale, texts = self.config.logit_scale or 1.0, self.texts(encoder).to(self.weight)
        weight = self.weight + self.blend[:, None] * texts
        return (scale * weight).detach(), (scale * self.bias).detach()


register("LP_PLUS_PLUS", LPPlusPlusConfig, LPPlusPlus)
