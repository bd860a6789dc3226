"""One file for each method and its paper; importing it registers it with PEFT.

Another package adds a method through an entry point of the group "hf_tgpt.methods" that names its module.
"""

import warnings
from importlib.metadata import entry_points

from ..adapters.config import PromptConfig
from ..adapters.registry import plain_name, registered_methods
from .clap import CLAPConfig as CLAPConfig
from .clap import ZSLPConfig as ZSLPConfig
from .clip_adapter import CLIPAdapterConfig as CLIPAdapterConfig
from .cocoop import CoCoOpConfig as CoCoOpConfig
from .coop import CoOpConfig as CoOpConfig
from .gda import GDAConfig as GDAConfig
from .ivlp import IVLPConfig as IVLPConfig
from .kgcoop import KgCoOpConfig as KgCoOpConfig
from .linear_probe import LinearProbeConfig as LinearProbeConfig
from .lora import LoRAConfig as LoRAConfig
from .lp_plus_plus import LPPlusPlusConfig as LPPlusPlusConfig
from .maple import MaPLeConfig as MaPLeConfig
from .mmrl import MMRLConfig as MMRLConfig
from .mutual import MutualPromptConfig as MutualPromptConfig
from .proker import ProKeRConfig as ProKeRConfig
from .promptsrc import PromptSRCConfig as PromptSRCConfig
from .task_res import TaskResConfig as TaskResConfig
from .tgpt import TGPTConfig as TGPTConfig
from .tip_adapter import TipAdapterConfig as TipAdapterConfig
from .two_stage import TwoStageConfig as TwoStageConfig
from .zero_shot import ZeroShotConfig as ZeroShotConfig


def available_methods() -> dict[str, type[PromptConfig]]:
    """All methods by their names: {"maple": MaPLeConfig, ...}.

    Example:
        >>> "maple" in available_methods()
        True
    """
    return dict(sorted(registered_methods().items())) | {"lora": LoRAConfig, "two_stage": TwoStageConfig}


def method_name(method: str) -> str:
    """A method's registered name for "MaPLe", "zero-shot" and the like. Raises ValueError for an unknown one."""
    names = {plain_name(name): name for name in available_methods()}
    if not isinstance(method, str) or plain_name(method) not in names:
        raise ValueError(f"`method`={method!r} is unknown; choose one of {', '.join(available_methods())}.")
    return names[plain_name(method)]


def config_class(method: str) -> type[PromptConfig]:
    """The config of a method by its name. Raises ValueError for an unknown one.

    Example:
        >>> config = config_class("maple")(class_names=["cat", "dog"])
    """
    return available_methods()[method_name(method)]


# Last, so that such a module can import what is above.
for _entry_point in entry_points(group="hf_tgpt.methods"):
    try:
        _entry_point.load()
    except Exception as error:  # the other methods must work whatever is wrong with it
        warnings.warn(
            f"The method {_entry_point.name!r} of the package {getattr(_entry_point.dist, 'name', '?')!r} cannot be "
            f"used ({type(error).__name__}: {error}); update or uninstall that package.",
            stacklevel=2,
        )
