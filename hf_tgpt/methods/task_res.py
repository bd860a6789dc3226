"""TaskRes: a trained residual on the frozen class texts.

Source: Yu, Lu, Jin, Chen, Wang: Task Residual for Tuning Vision-Language Models, CVPR 2023, arXiv 2211.10277,
section 3.3.
"""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn

from ..adapters.feature_head import FeatureHead, FeatureHeadConfig
from ..adapters.fitting import Features, Steps
from ..adapters.registry import register
from ..encoders import DualEncoder
from ..encoders.walk import unit
from ..texts.class_texts import ClassTexts
from ..utils.fields import checked, documented


@checked
class TaskResConfig(FeatureHeadConfig):
    """Configuration of TaskRes.

    Example:
        >>> config = TaskResConfig(class_names=["cat", "dog"], residual_scale=1.0)
    """

    residual_scale: float = documented(
        0.5, "Factor of the residual. Default: as released; the release uses 1 for Flowers102."
    )


class TaskRes(FeatureHead):
    """The residual x (c, d), which starts at 0."""

    config: TaskResConfig
    citation = """@inproceedings{yu2023task,
  title = {Task Residual for Tuning Vision-Language Models},
  author = {Yu, Tao and Lu, Zhihe and Jin, Xin and Chen, Zhibo and Wang, Xinchao},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2023}
}"""
    grid: ClassVar = {"residual_scale": [0.5, 1.0, 2.0, 4.0, 8.0]}
    grid_is_trained_with: ClassVar = True
    unit_texts: ClassVar = False

    def __init__(self, config: TaskResConfig, encoder: DualEncoder):
        super().__init__(config, encoder)
        shape = len(config.class_names), encoder.shape()["projection_width"]
        self.residual = nn.Parameter(torch.zeros(shape, device=encoder.model.device))

    @torch.no_grad()
    def start(self, encoder: DualEncoder, data: Features) -> None:
        self.residual.zero_()

    def epochs(self, encoder: DualEncoder, data: Features, steps: Steps) -> Iterable[dict[str, float]]:
        return self.trained(encoder, data, steps)

    def weight(self, texts: torch.Tensor) -> torch.Tensor:
        """Class texts t (c, d) -> unit class vectors (c, d)."""
        return unit(texts + self.config.residual_scale * self.residual)

    def classify(self, encoder: DualEncoder, states: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        features = unit(states)
        return self.scaled(encoder, features @ self.weight(texts).T.to(features))

    def linear_head(
        self, encoder: DualEncoder, class_texts: ClassTexts | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.as_linear(encoder, self.weight(self.texts(encoder)))


register("TASK_RES", TaskResConfig, TaskRes)
