"""Prompt learning for CLIP as PEFT adapters. Importing this package registers its methods with PEFT."""

from .convert import convert_original_state_dict, convert_to_original_state_dict
from .methods import MaPLeConfig, TGPTConfig

__version__ = "0.1.0"

__all__ = [
    "MaPLeConfig",
    "TGPTConfig",
    "convert_original_state_dict",
    "convert_to_original_state_dict",
]
