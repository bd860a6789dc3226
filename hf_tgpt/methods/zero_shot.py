"""Zero-shot classification: class sentences, averaged over templates after encoding. It learns nothing.

Source: Radford et al.: Learning Transferable Visual Models From Natural Language Supervision, ICML 2021,
arXiv 2103.00020, section 3.1.4.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ..adapters.config import PromptConfig
from ..adapters.open_learner import OpenPromptLearner
from ..adapters.registry import register
from ..adapters.tower_classifier import TowerClassifier
from ..encoders import DualEncoder, encoder_of
from ..encoders.packing import Packing
from ..encoders.walk import encode_words
from ..texts.class_texts import ClassTexts
from ..texts.sentences import tokenize
from ..texts.zero_shot_head import zero_shot_head
from ..utils.fields import checked, documented
from ..utils.names import check_class_names, check_templates


def check_sentences(templates: Any) -> None:
    """Raises ValueError unless these are templates, or {class: [sentences]}."""
    if not isinstance(templates, dict):
        check_templates(templates)
    elif not all(isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)
                 for texts in templates.values()):  # fmt: skip
        raise ValueError("`templates`: give each class a list of sentences.")


@checked
class ZeroShotConfig(PromptConfig):
    """Configuration of zero-shot classification.

    Example:
        >>> config = ZeroShotConfig(class_names=["cat", "dog"], templates=["a photo of a {}.", "a drawing of a {}."])
    """

    trains: ClassVar = False
    learns_prompts: ClassVar = False
    follows_data: ClassVar = True
    templates: list[str] | dict[str, list[str]] = documented(
        ["a photo of a {}."],
        "Sentences with {} for the class name, averaged after encoding. In Python also {class: [sentences about it]}.",
        check_sentences,
    )
    tokenizer_name_or_path: str | None = documented(None, "Tokenizer of the sentences. Default: the base model's own.")


class ZeroShot(OpenPromptLearner):
    """Class sentences on the base model as it is."""

    config: ZeroShotConfig
    citation = """@inproceedings{radford2021learning,
  title = {Learning Transferable Visual Models From Natural Language Supervision},
  author = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel and
            Agarwal, Sandhini and Sastry, Girish and Askell, Amanda and Mishkin, Pamela and Clark, Jack and
            Krueger, Gretchen and Sutskever, Ilya},
  booktitle = {International Conference on Machine Learning},
  year = {2021}
}"""
    vision_is_frozen = True

    def texts_for(self, encoder: DualEncoder, class_names: Sequence[str]) -> ClassTexts:
        check_class_names(class_names)
        templates, tokenizer = self.config.templates, self.tokenizer(encoder)
        plainest = "{}." if isinstance(templates, dict) else templates[0]
        sentences = [plainest.replace("{}", name) for name in class_names]
        with torch.inference_mode(False):
            tokens = tokenize(tokenizer, sentences, encoder, class_names)
            return ClassTexts(class_names, *tokens, trained=self.trained_names)

    def encode_classes(self, encoder: DualEncoder, class_texts: ClassTexts, share: slice | None = None) -> torch.Tensor:
        names = class_texts.names[slice(None) if share is None else share]
        return zero_shot_head(encoder, names, self.config.templates, self.tokenizer(encoder))

    def text_features(
        self, encoder: DualEncoder, input_ids: torch.Tensor, ends: torch.Tensor, packing: Packing | None = None
    ) -> torch.Tensor:
        """The model's own, without prompts."""
        return encode_words(encoder, input_ids, ends)


register("ZERO_SHOT", ZeroShotConfig, ZeroShot)


def zero_shot_beside(model: Any, class_names: Sequence[str], **fields: Any) -> TowerClassifier:
    """Zero-shot classification with a base model, or with an adapted model's base model; the model does not change.

    `fields` are fields of `ZeroShotConfig`. Other threads may use the adapted model at the same time.
    """
    encoder = model.untuned_encoder() if hasattr(model, "untuned_encoder") else encoder_of(model)
    config = ZeroShotConfig(class_names=list(class_names), **fields)
    classifier = TowerClassifier(encoder.model, ZeroShot(config, encoder).eval())
    classifier.training = False  # not eval(), which would also switch the model, which may be in training
    return classifier
