"""2SFS: first all layer norms of both towers are trained, then a linear head that starts from the tuned class texts.

Source: Farina, Mancini, Iacca, Ricci: Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages,
CVPR 2025, arXiv 2503.11609, section 4.
"""

import copy
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..adapters.learner import Stage
from ..adapters.peft_towers import PeftTowers, peft_config_of
from ..encoders import DualEncoder, encoder_of
from ..encoders.walk import unit
from ..texts.class_texts import ClassTexts
from ..utils.fields import above, below, checked, documented
from .zero_shot import ZeroShot, ZeroShotConfig


class TwoStage(ZeroShot):
    """Zero-shot classification with the tuned towers, with a row of the head for each trained class.

    `head` (c, d) has a row for each trained class; `head_is_set` is true once the second stage has begun.
    """

    config: "TwoStageConfig"
    citation = """@inproceedings{farina2025rethinking,
  title = {Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages},
  author = {Farina, Matteo and Mancini, Massimiliano and Iacca, Giovanni and Ricci, Elisa},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2025}
}"""
    vision_is_frozen = False

    def __init__(self, config: "TwoStageConfig", encoder: DualEncoder):
        super().__init__(config, encoder)
        size = len(self.trained_names), encoder.shape()["projection_width"]
        self.head = nn.Parameter(torch.zeros(size, device=encoder.model.device))
        self.head_is_set = nn.Buffer(torch.tensor(False, device=encoder.model.device))

    def text_weights(self) -> list[nn.Parameter]:
        return []

    def class_features(self, encoder: DualEncoder, class_texts: ClassTexts | None = None) -> torch.Tensor:
        """(c, d): for trained classes the rows of the head, once set; for others the tuned text tower's features."""
        texts = self.class_texts if class_texts is None else class_texts
        labels = texts.trained_labels  # (c,)
        if self.head_is_set and texts.all_trained:  # without a word for the text tower
            return unit(self.head)[labels].to(torch.promote_types(torch.float32, encoder.dtype))
        features = super().class_features(encoder, class_texts)
        if not self.head_is_set:
            return features
        rows = unit(self.head)[labels.clamp(min=0)].to(features.dtype)
        return torch.where(labels[:, None] >= 0, rows, features)

    def class_features_shape(self, encoder: DualEncoder) -> tuple[int, int] | None:
        """None while its head has a row for each class."""
        return None if self.head_is_set and self.class_texts.all_trained else super().class_features_shape(encoder)

    def stages(self) -> list[Stage]:
        share = self.config.stage_one_share
        return [
            Stage(share, trains=lambda name: name != "learner.head"),
            Stage(1 - share, trains=lambda name: name == "learner.head"),
        ]

    @torch.no_grad()
    def begin_stage(self, encoder: DualEncoder, stage: int) -> None:
        self.head_is_set.fill_(False)
        if stage == 1:
            self.head.copy_(self.class_features(encoder))
            self.head_is_set.fill_(True)

    def training_state(self) -> dict[str, torch.Tensor]:
        return {"head_is_set": self.head_is_set}


@checked
class TwoStageConfig(ZeroShotConfig):
    """Configuration of 2SFS.

    Example:
        >>> model = TwoStageConfig(class_names=["cat", "dog"]).build(clip)
    """

    method: ClassVar = "TWO_STAGE"
    learner_class: ClassVar = TwoStage
    loader: ClassVar = "hf_tgpt.load_trained"
    kind: ClassVar = "two_stage"
    trains: ClassVar = True
    follows_data: ClassVar = False
    stage_one_share: float = documented(
        0.6,
        "Share of the steps that train the layer norms; the others train the head. Default: paper.",
        above(0),
        below(1),
    )
    trained_class_names: list[str] | None = documented(
        None, "Filled in when `set_class_names` gives it other classes: those that it was trained on."
    )

    def build(self, model: PreTrainedModel) -> PeftTowers:
        encoder = encoder_of(model)  # refuses other models, before anything is changed
        config = copy.deepcopy(self)
        config.base_model_name_or_path = encoder.model.name_or_path
        adapter: Any = peft_config_of({"peft_type": "LN_TUNING"}, encoder)
        return PeftTowers(model, adapter, TwoStage(config, encoder))
