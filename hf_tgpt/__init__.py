"""Few-shot learning with CLIP as PEFT adapters. Importing this package registers its methods with PEFT.

Names are imported when they are first used, and methods are registered when PEFT itself is imported, so that
`import hf_tgpt` waits for neither.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .utils.imports import SuggestNames, missing, when_imported
from .utils.version import __version__ as __version__

if TYPE_CHECKING:
    from .adapters.class_features import save_class_features as save_class_features
    from .data import load_splits as load_splits
    from .encoders.loading import load_clip as load_clip
    from .evaluation.accuracy import evaluate as evaluate
    from .evaluation.accuracy import for_classes as for_classes
    from .evaluation.metrics import compute_metrics as compute_metrics
    from .hub.client import HubError as HubError
    from .hub.convert import adapter_from_release as adapter_from_release
    from .hub.convert import convert_original_state_dict as convert_original_state_dict
    from .hub.convert import convert_to_original_state_dict as convert_to_original_state_dict
    from .hub.convert_base import convert_base as convert_base
    from .hub.loading import load_adapter as load_adapter
    from .hub.loading import load_base_model as load_base_model
    from .hub.loading import load_trained as load_trained
    from .hub.push import push_folder as push_folder
    from .inference.classifier import Classifier as Classifier
    from .inference.loading import load_classifier as load_classifier
    from .methods import CLAPConfig as CLAPConfig
    from .methods import CLIPAdapterConfig as CLIPAdapterConfig
    from .methods import CoCoOpConfig as CoCoOpConfig
    from .methods import CoOpConfig as CoOpConfig
    from .methods import GDAConfig as GDAConfig
    from .methods import IVLPConfig as IVLPConfig
    from .methods import KgCoOpConfig as KgCoOpConfig
    from .methods import LinearProbeConfig as LinearProbeConfig
    from .methods import LoRAConfig as LoRAConfig
    from .methods import LPPlusPlusConfig as LPPlusPlusConfig
    from .methods import MaPLeConfig as MaPLeConfig
    from .methods import MMRLConfig as MMRLConfig
    from .methods import MutualPromptConfig as MutualPromptConfig
    from .methods import ProKeRConfig as ProKeRConfig
    from .methods import PromptSRCConfig as PromptSRCConfig
    from .methods import TaskResConfig as TaskResConfig
    from .methods import TGPTConfig as TGPTConfig
    from .methods import TipAdapterConfig as TipAdapterConfig
    from .methods import TwoStageConfig as TwoStageConfig
    from .methods import ZeroShotConfig as ZeroShotConfig
    from .methods import ZSLPConfig as ZSLPConfig
    from .methods import available_methods as available_methods
    from .methods import config_class as config_class
    from .training.config import TrainingConfig as TrainingConfig
    from .training.fit import add_classes as add_classes
    from .training.fit import fit as fit
    from .training.fit import remove_classes as remove_classes
    from .training.loop import train as train
    from .utils.names import TOY_CLIP as TOY_CLIP

# Where each public name is.
_NAMES = {
    "adapters.class_features": ["save_class_features"],
    "data": ["load_splits"],
    "encoders.loading": ["load_clip"],
    "evaluation.accuracy": ["evaluate", "for_classes"],
    "evaluation.metrics": ["compute_metrics"],
    "hub.client": ["HubError"],
    "hub.convert": ["adapter_from_release", "convert_original_state_dict", "convert_to_original_state_dict"],
    "hub.convert_base": ["convert_base"],
    "hub.loading": ["load_adapter", "load_base_model", "load_trained"],
    "hub.push": ["push_folder"],
    "inference.classifier": ["Classifier"],
    "inference.loading": ["load_classifier"],
    "methods": [
        "CLAPConfig",
        "CLIPAdapterConfig",
        "CoCoOpConfig",
        "CoOpConfig",
        "GDAConfig",
        "IVLPConfig",
        "KgCoOpConfig",
        "LPPlusPlusConfig",
        "LinearProbeConfig",
        "LoRAConfig",
        "MMRLConfig",
        "MaPLeConfig",
        "MutualPromptConfig",
        "ProKeRConfig",
        "PromptSRCConfig",
        "TGPTConfig",
        "TaskResConfig",
        "TipAdapterConfig",
        "TwoStageConfig",
        "ZSLPConfig",
        "ZeroShotConfig",
        "available_methods",
        "config_class",
    ],
    "training.config": ["TrainingConfig"],
    "training.fit": ["add_classes", "fit", "remove_classes"],
    "training.loop": ["train"],
    "utils.names": ["TOY_CLIP"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
_FOLDERS = ("adapters", "cli", "data", "encoders", "evaluation", "hub", "inference", "methods", "texts", "training")
__all__ = ["__version__", *sorted(_MODULES)]  # a test compares it with the imports above


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    if name in _FOLDERS:
        return import_module(f".{name}", __name__)
    raise AttributeError(missing(__name__, name, __dir__()), name=name)


def __dir__() -> list[str]:
    return [*__all__, *_FOLDERS]


def _tell_peft() -> None:
    """Registers the methods, and makes PEFT use this package's code to publish adapters and write their cards."""
    from . import methods as methods  # importing a method registers it
    from .adapters import peft_hooks
    from .hub.card import replace_empty_card
    from .hub.push import push_model

    peft_hooks.install(push_model, replace_empty_card)


when_imported("peft", _tell_peft)
sys.meta_path.append(SuggestNames(__name__, __dir__()))
