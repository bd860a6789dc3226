"""PEFT's own LoRA in both towers, trained on the cross entropy of zero-shot classification.

Source: Zanella, Ben Ayed: Low-Rank Few-Shot Adaptation of Vision-Language Models, CVPR workshops 2024,
arXiv 2405.18541; LoRA itself: Hu et al., ICLR 2022, arXiv 2106.09685.
"""

import copy
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel

from ..adapters.config import PromptConfig
from ..adapters.folder import check_weights_file
from ..adapters.peft_hooks import saved
from ..adapters.tower_classifier import TowerClassifier
from ..encoders import DualEncoder, encoder_of
from ..utils.fields import at_least, checked, documented
from ..utils.files import write_json
from ..utils.names import name_in_files
from .zero_shot import ZeroShot, ZeroShotConfig

# Beside PEFT's own files: the classes, and the fields of the config.
NOTE = "reference.json"


@checked
class LoRAConfig(ZeroShotConfig):
    """Configuration of LoRA on both towers, after CLIP-LoRA.

    Example:
        >>> model = LoRAConfig(class_names=["cat", "dog"], r=4).build(clip)
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
    # Departs from the release, which scales by lora_alpha / sqrt(r).
    lora_alpha: int = documented(1, "The updates are scaled by lora_alpha / r, as PEFT does.")
    lora_dropout: float = documented(0.25, "Dropout on the input of the updates, in training. Default: CLIP-LoRA's.")
    target_modules: list[str] | None = documented(  # type: ignore[assignment,misc]  # a field here, as LoRA chooses it
        None, "Linear layers of the towers to adapt. Default: those of queries, keys and values, as in CLIP-LoRA."
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

    def build(self, model: PreTrainedModel) -> "LoRA":
        return LoRA(model, self)

    def own_fields(self) -> dict[str, Any]:
        """The fields that are this method's, as `reference.json` keeps them."""
        names = {field.name for field in fields(self)} - {field.name for field in fields(PromptConfig)}
        return {name: getattr(self, name) for name in sorted(names)}


class LoRA(TowerClassifier):
    """A PeftModel of PEFT's with LoRA, and zero-shot classification with its towers.

    PEFT's adapter itself has no class names and does not classify, hence this module around it.
    """

    def __init__(self, model: PreTrainedModel, config: LoRAConfig):
        encoder = encoder_of(model)  # refuses other models, before anything is changed
        config = copy.deepcopy(config)
        config.base_model_name_or_path = encoder.model.name_or_path
        config.target_modules = config.target_modules or list(encoder.attention_inputs)
        shared = {field.name for field in fields(LoraConfig)} & config.own_fields().keys()
        lora = LoraConfig(**{name: getattr(config, name) for name in shared})
        super().__init__(get_peft_model(model.requires_grad_(False), lora), ZeroShot(config, encoder))

    def get_base_model(self) -> Any:
        """The model with LoRA in its layers."""
        return self.model.get_base_model()

    def untuned_encoder(self) -> DualEncoder:
        """Of a copy: PEFT's switch for LoRA would change the answers of all who ask this model meanwhile."""
        return encoder_of(copy.deepcopy(self.model).unload())

    def merged_encoder(self) -> DualEncoder:
        return encoder_of(copy.deepcopy(self.model).merge_and_unload())

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """PEFT's own files, which PeftModel.from_pretrained reads, and the classes beside them."""
        self.model.save_pretrained(folder, save_embedding_layers=False)  # or PEFT asks the Hub about the vocabulary
        config: LoRAConfig = self.learner.config
        content = {
            "method": "lora",
            "base_model": name_in_files(config.base_model_name_or_path),
            "class_names": config.class_names,
            "config": config.own_fields(),
        }
        write_json(Path(folder) / NOTE, content)
        self._is_in(folder)
        saved(folder, config)

    def load_weights(self, folder: str | os.PathLike[str]) -> None:
        """Those that `save_pretrained` wrote."""
        check_weights_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))  # PEFT would take a pickle in its place
        self.model.load_adapter(folder, "default", torch_device=str(self.model.device))
        self._is_in(folder)

    def _is_in(self, folder: str | os.PathLike[str]) -> None:
        self.learner.config.folder = os.fspath(folder)  # type: ignore[misc]  # see PromptConfig
