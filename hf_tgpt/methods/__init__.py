"""One file for each method; importing it registers it."""

from .cocoop import CoCoOpConfig as CoCoOpConfig
from .coop import CoOpConfig as CoOpConfig
from .ivlp import IVLPConfig as IVLPConfig
from .maple import MaPLeConfig as MaPLeConfig
from .mutual import MutualPromptConfig as MutualPromptConfig
from .tgpt import TGPTConfig as TGPTConfig
