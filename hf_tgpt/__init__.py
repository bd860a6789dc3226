"""Prompt learning for CLIP as PEFT adapters. Importing this package registers its methods with PEFT."""

from typing import TYPE_CHECKING, Any

from .convert import adapter_from_release as adapter_from_release
from .convert import convert_original_state_dict as convert_original_state_dict
from .convert import convert_to_original_state_dict as convert_to_original_state_dict
from .hub import HubError as HubError
from .hub import push_folder as push_folder
from .loading import TOY_CLIP as TOY_CLIP
from .loading import load_adapter as load_adapter
from .loading import load_base_model as load_base_model
from .loading import load_clip as load_clip
from .loading import load_trained as load_trained
from .methods import CoCoOpConfig as CoCoOpConfig
from .methods import CoOpConfig as CoOpConfig
from .methods import IVLPConfig as IVLPConfig
from .methods import MaPLeConfig as MaPLeConfig
from .methods import MutualPromptConfig as MutualPromptConfig
from .methods import TGPTConfig as TGPTConfig
from .registry import config_class as config_class
from .registry import methods as methods
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .predict import load_classifier as load_classifier


def __getattr__(name: str) -> Any:
    if name == "load_classifier":  # it reads pictures, and so imports datasets, which training your own way need not
        from .predict import load_classifier

        return load_classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
