"""PromptSRC: independent prompts in both towers, kept close to CLIP's own answers and averaged over the epochs.

Source: Khattak, Wasim, Naseer, Khan, Yang, Khan: Self-regulating Prompts: Foundational Model Adaptation without
Forgetting, ICCV 2023, arXiv 2307.06948, sections 3.2 (the terms against CLIP) and 3.3 (the average).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import ImageClassifierOutput

from ..adapters.open_learner import Forward
from ..adapters.registry import register
from ..encoders import DualEncoder
from ..utils.fields import above, at_least, checked, documented
from ..utils.names import check_templates
from .ivlp import IVLP, IVLPConfig

_WEIGHT = at_least(0, "choose 0 (without this term) or more.")


@checked
class PromptSRCConfig(IVLPConfig):
    """Configuration of PromptSRC: IVLP's fields, and fields for its loss terms and its average.

    Example:
        >>> config = PromptSRCConfig(class_names=["cat", "dog"], teacher_templates=["a photo of a {}.", "the {}."])
    """

    text_prompt_length: int = documented(4, "Learned tokens in the text tower. Default: paper. 0: none.", at_least(0))
    vision_prompt_length: int = documented(
        4, "Learned tokens in the vision tower. Default: paper. 0: none.", at_least(0)
    )
    text_loss_weight: float = documented(
        25.0, "Weight of the mean distance to CLIP's own class features (lambda_1). Default: paper.", _WEIGHT
    )
    image_loss_weight: float = documented(
        10.0, "Weight of the mean distance to CLIP's own image features (lambda_2). Default: paper.", _WEIGHT
    )
    logit_loss_weight: float = documented(
        1.0, "Weight of the divergence from CLIP's own answers, per image and class. Default: paper.", _WEIGHT
    )
    teacher_templates: list[str] = documented(
        ["a photo of a {}."],
        "Sentences with {} for the class name, averaged after encoding: CLIP's own class features. The release uses "
        "60 of CLIP's templates for ImageNet on every data set.",
        check_templates,
    )
    averaging_mean: float = documented(
        15.0,
        "The epoch, counted from 1, whose weights count most in the average of all epochs (mu). Default: the release's "
        "for base to new, with 20 epochs; it uses 30 or 45 of 50 for few-shot, 6 of 20 across data sets.",
        above(0),
    )
    averaging_std: float = documented(
        1.0,
        "Standard deviation of the average's weights, in epochs (sigma); the release also uses 30, 5 and 10.",
        above(0),
    )
    ended_with: dict[str, Any] | None = documented(
        None,
        "Filled in by training: whether the weights are the average of the epochs or the last epoch's, and the "
        "accuracy of both on the validation pictures, if there are any.",
    )


@dataclass
class PromptSRCOutput(ImageClassifierOutput):
    """ImageClassifierOutput with the four terms of the loss, each with its weight."""

    loss_classification: torch.Tensor | None = None
    loss_text: torch.Tensor | None = None
    loss_image: torch.Tensor | None = None
    loss_logits: torch.Tensor | None = None


class PromptSRC(IVLP):
    """IVLP's prompts. Training ends with their average over the epochs, which is kept in float32."""

    config: PromptSRCConfig
    output_class: ClassVar = PromptSRCOutput
    last_epoch_is_result: ClassVar = True
    citation = """@inproceedings{khattak2023self,
  title = {Self-regulating Prompts: Foundational Model Adaptation without Forgetting},
  author = {Khattak, Muhammad Uzair and Wasim, Syed Talal and Naseer, Muzammal and Khan, Salman and Yang, Ming-Hsuan and
            Khan, Fahad Shahbaz},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year = {2023}
}"""

    def __init__(self, config: PromptSRCConfig, encoder: DualEncoder):
        super().__init__(config, encoder)
        self._average: dict[str, torch.Tensor] = {}

    def extra_losses(self, encoder: DualEncoder, computed: Forward) -> dict[str, torch.Tensor]:
        """The distances to CLIP itself: section 3.2, equations 4 to 6. Means are over all elements."""
        config = self.config
        texts = self.frozen_class_features(encoder, config.teacher_templates, computed.class_texts, False)  # (c, d)
        if computed.pixel_values is None:  # no vision prompts, so the features are CLIP's
            images = computed.image_features.detach()
        else:
            images = self.frozen_image_features(encoder, computed.pixel_values)  # (b, d)
        assert computed.logits is not None  # `answer` has made them
        teacher, student = encoder.scale(images @ texts.T).log_softmax(-1), computed.logits.log_softmax(-1)  # (b, c)
        divergence = F.kl_div(student, teacher.to(student.dtype), reduction="sum", log_target=True) / student.numel()
        return {
            "loss_text": config.text_loss_weight * (computed.class_features - texts).abs().mean(),
            "loss_image": config.image_loss_weight * (computed.image_features - images).abs().mean(),
            "loss_logits": config.logit_loss_weight * divergence,
        }

    def end_of_epoch(self, epoch: int, epochs: int) -> None:
        """Adds this epoch's weights to the average: section 3.3, equation 7."""
        share = epoch_weights(epochs, self.config.averaging_mean, self.config.averaging_std)[epoch]
        average = self.training_state()
        for name, weight in self.named_parameters():
            average[f"average.{name}"].add_(weight.detach(), alpha=share)

    def begin_stage(self, encoder: DualEncoder, stage: int) -> None:
        self._average = {}

    def training_state(self) -> dict[str, torch.Tensor]:
        if not self._average:
            weights = self.named_parameters()
            self._average = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights}
        return {f"average.{name}": value for name, value in self._average.items()}

    def results(self) -> dict[str, dict[str, torch.Tensor]]:
        last = {name: weight.detach().clone() for name, weight in self.named_parameters()}
        return {"average of the epochs": self._average, "last epoch": last}

    def ended_with(self, result: str, accuracies: dict[str, float]) -> None:
        self.config.ended_with = {"result": result} | ({"validation_accuracy": accuracies} if accuracies else {})


def epoch_weights(epochs: int, mean: float, std: float) -> list[float]:
    """The share of each epoch, counted from 1, in the average: a Gaussian, which sums to 1.

    Example:
        >>> [round(share, 2) for share in epoch_weights(3, mean=2, std=1)]
        [0.27, 0.45, 0.27]
    """
    numbers = torch.arange(1, epochs + 1, dtype=torch.float64)
    return (-((numbers - mean) ** 2) / (2 * std**2)).softmax(0).tolist()


register("PROMPTSRC", PromptSRCConfig, PromptSRC)
