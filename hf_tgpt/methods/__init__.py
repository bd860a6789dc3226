from .maple import MaPLeConfig
from .tgpt import TGPTConfig

__all__ = ["MaPLeConfig", "TGPTConfig"]
