"""KgCoOp: CoOp with class texts kept near a template's, so that the prompts still suit other classes.

Source: Yao, Zhang, Xu: Visual-Language Prompt Tuning with Knowledge-guided Context Optimization, CVPR 2023,
arXiv 2303.13283, section 3.2. The term itself is CoOp's `anchor_weight`.
"""

from typing import ClassVar

from ..adapters.registry import register
from ..utils.fields import at_least, checked, documented
from .coop import CoOp, CoOpConfig


@checked
class KgCoOpConfig(CoOpConfig):
    """Configuration of KgCoOp.

    Example:
        >>> config = KgCoOpConfig(class_names=["cat", "dog"], anchor_templates=["a photo of a {}, a type of pet."])
    """

    initial_text: str | None = documented(
        "a photo of a",
        "The class sentence is '{initial_text} {name}.', or this text if it contains {} for the name; its words before "
        "the name initialise the learned tokens. None: as many 'X' as learned tokens, initialised at random. Default: "
        "as released.",
    )
    prompt_length: int = documented(
        4, "Learned tokens in a class sentence. Default: paper.", at_least(1, "learn at least 1 token.")
    )
    anchor_weight: float = documented(
        8.0, "Weight of the distance to the anchors (lambda). Default: paper.", at_least(0, "choose 0 or more.")
    )


class KgCoOp(CoOp):
    """CoOp's prompts, with the anchor term in the loss."""

    config: KgCoOpConfig
    citation = """@inproceedings{yao2023visual,
  title = {Visual-Language Prompt Tuning with Knowledge-guided Context Optimization},
  author = {Yao, Hantao and Zhang, Rui and Xu, Changsheng},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2023}
}"""
    original_names: ClassVar = CoOp.original_names


register("KGCOOP", KgCoOpConfig, KgCoOp)
