"""PEFT's own LoRA, or another of PEFT's adapters, in both towers, trained on the cross entropy of zero-shot
classification.

Source: Zanella, Ben Ayed: Low-Rank Few-Shot Adaptation of Vision-Language Models, CVPR workshops 2024,
arXiv 2405.18541; LoRA itself: Hu et al., ICLR 2022, arXiv 2106.09685.
"""

import copy
from dataclasses import fields
from typing import Any, ClassVar

from peft import LoraConfig
from transformers import PreTrainedModel

from ..adapters.peft_towers import PeftTowers, kinds_of_peft, peft_config_of
from ..encoders import encoder_of
from ..utils.fields import at_least, checked, documented
from ..utils.files import parse_json, read_json
from .zero_shot import ZeroShot, ZeroShotConfig

_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules")  # fields of PEFT's LoraConfig


def read_peft_config(value: str | dict[str, Any]) -> dict[str, Any]:
    """PEFT's config as a dict, from JSON or a .json file. Raises ValueError unless it is for an adapter in layers."""
    if isinstance(value, str):
        value = read_json(value) if value.endswith(".json") else parse_json(value, "`peft_config`")
    if not isinstance(value, dict) or str(value.get("peft_type")).upper() not in kinds_of_peft():
        raise ValueError(
            f'`peft_config`={value!r}: give a JSON object, such as {{"peft_type": "LN_TUNING"}}, or a .json file; '
            f"types are {', '.join(kinds_of_peft())}."
        )
    return value


def check_peft_config(value: Any) -> None:
    """Raises ValueError unless it is None or `read_peft_config` accepts it."""
    if value is not None:
        read_peft_config(value)


@checked
class LoRAConfig(ZeroShotConfig):
    """Configuration of LoRA on both towers, after CLIP-LoRA, or of another of PEFT's adapters.

    Example:
        >>> model = LoRAConfig(class_names=["cat", "dog"], r=4).build(clip)
        >>> config = LoRAConfig(class_names=["cat", "dog"], peft_config={"peft_type": "LN_TUNING"})
    """

    method: ClassVar = "LORA"
    learner_class: ClassVar = ZeroShot
    loader: ClassVar = "hf_tgpt.load_trained"
    kind: ClassVar = "lora"
    trains: ClassVar = True
    follows_data: ClassVar = False
    r: int = documented(
        2, "Rank of the updates. Default: CLIP-LoRA's (Zanella and Ben Ayed, CVPR workshops 2024).", at_least(1)
    )
    lora_alpha: int = documented(1, "The updates are scaled by lora_alpha / r, as in LoRA's paper.")
    use_rslora: bool = documented(False, "Scale the updates by lora_alpha / sqrt(r), as CLIP-LoRA does.")
    lora_dropout: float = documented(0.25, "Dropout on the input of the updates, in training. Default: CLIP-LoRA's.")
    target_modules: list[str] | None = documented(  # type: ignore[assignment,misc]  # a field here, since LoRA's user chooses it
        None, "Linear layers of the towers to adapt. Default: queries, keys and values, as in CLIP-LoRA."
    )

    peft_config: str | dict[str, Any] | None = documented(
        None,
        'Another PEFT adapter instead of LoRA: its config as JSON, such as {"peft_type": "LN_TUNING"}, or a '
        ".json file. Without target_modules it adapts the same layers as LoRA; LN_TUNING all layer norms.",
        check_peft_config,
    )

    @property
    def citation(self) -> str:
        return """@inproceedings{hu2022lora,
  title = {LoRA: Low-Rank Adaptation of Large Language Models},
  author = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean and
            Wang, Lu and Chen, Weizhu},
  booktitle = {International Conference on Learning Representations},
  year = {2022}
}

@inproceedings{zanella2024low,
  title = {Low-Rank Few-Shot Adaptation of Vision-Language Models},
  author = {Zanella, Maxime and Ben Ayed, Ismail},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition Workshops},
  year = {2024}
}"""

    def __post_init__(self) -> None:
        super().__post_init__()
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        for name in _LORA:
            self.require(
                name,
                self.peft_config is None or name not in changed,
                "`peft_config` replaces LoRA's fields; set it there, or leave it out.",
            )

    def build(self, model: PreTrainedModel) -> PeftTowers:
        encoder = encoder_of(model)  # refuses other models, before anything is changed
        config = copy.deepcopy(self)
        config.base_model_name_or_path = encoder.model.name_or_path
        if config.peft_config is None:
            config.target_modules = config.target_modules or list(encoder.attention_inputs)
            return PeftTowers(
                model, LoraConfig(**{name: getattr(config, name) for name in _LORA}), ZeroShot(config, encoder)
            )
        config.peft_config = read_peft_config(config.peft_config)
        adapter = peft_config_of(config.peft_config, encoder)
        return PeftTowers(model, adapter, ZeroShot(config, encoder))
