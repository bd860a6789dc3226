"""One file for each method; importing it registers it."""

from .maple import MaPLeConfig as MaPLeConfig
from .tgpt import TGPTConfig as TGPTConfig
