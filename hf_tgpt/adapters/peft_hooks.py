"""What this package replaces in PEFT itself, all of it here: how a PeftModel is saved and published, and, before PEFT
0.21, how an adapter's state is read and loaded.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import PeftModel

from ..utils.compat import before
from ..utils.names import check_class_names
from .config import PromptConfig
from .prompted import SLOT
from .tower_classifier import html_of
from .tuner import PromptTuner

WriteCard = Callable[[str | os.PathLike[str], PromptConfig], None]
_write_card: list[WriteCard] = []


def install(push: Callable[..., Any], write_card: WriteCard) -> None:
    """Makes PEFT publish this package's adapters with `push(model, repo_id, ...)`, and write the model card of each
    saved one with `write_card(folder, config)`. PEFT's own adapters are saved and published as before.
    """
    if _write_card:
        return
    _write_card.append(write_card)
    if before("peft", "0.21"):
        _keep_states()
    peft_push, peft_save = PeftModel.push_to_hub, PeftModel.save_pretrained

    @functools.wraps(peft_push)
    def push_to_hub(self: PeftModel, repo_id: str, **kwargs: Any) -> Any:
        # PEFT's own saves the adapter and then overwrites its card with an empty template.
        ours = isinstance(self.peft_config.get(self.active_adapter), PromptConfig)
        return push(self, repo_id, **kwargs) if ours else peft_push(self, repo_id, **kwargs)

    @functools.wraps(peft_save)
    def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
        ours = isinstance(self.peft_config.get(self.active_adapter), PromptConfig)
        if ours and len(args) < 3:
            # Otherwise PEFT contacts the Hub about the base model's vocabulary, which prompts never change.
            kwargs.setdefault("save_embedding_layers", False)
        for config in self.peft_config.values():
            if isinstance(config, PromptConfig):  # before anything is written
                check_class_names(config.class_names)
                if not (args[0] if args else kwargs.get("safe_serialization", True)):
                    raise ValueError(
                        "`safe_serialization`=False would write a pickle, which is never loaded here; leave it out."
                    )
        peft_save(self, save_directory, *args, **kwargs)
        for name, config in self.peft_config.items():
            folder = os.fspath(save_directory) if name == "default" else os.path.join(save_directory, name)
            if isinstance(config, PromptConfig) and config.folder == folder:  # it was among those that were saved
                saved(folder, config)

    def html(self: PeftModel) -> Callable[[], str]:
        if getattr(self, "learner", None) is None:
            raise AttributeError("_repr_html_")  # so that a notebook shows the text
        return functools.partial(html_of, self)

    PeftModel._repr_html_ = property(html)
    PeftModel.push_to_hub = push_to_hub
    PeftModel.save_pretrained = save_pretrained


def _keep_states() -> None:
    """Makes PEFT before 0.21, which knows only its own types, load the states of this package's adapters."""
    peft_get, peft_set = peft.get_peft_model_state_dict, peft.set_peft_model_state_dict

    @functools.wraps(peft_get)
    def get_state(
        model: Any,
        state_dict: dict[str, torch.Tensor] | None = None,
        adapter_name: str = "default",
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        if not isinstance(model.peft_config[adapter_name], PromptConfig):
            return peft_get(model, state_dict, adapter_name, *args, **kwargs)
        state = model.state_dict() if state_dict is None else state_dict
        own = f"{SLOT}.{PromptTuner.prefix}.{adapter_name}."
        name = PromptTuner._remove_adapter_name_from_key
        return {name(key, adapter_name): value for key, value in state.items() if own in key}

    @functools.wraps(peft_set)
    def set_state(
        model: Any,
        peft_model_state_dict: dict[str, torch.Tensor],
        adapter_name: str = "default",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if isinstance(config := model.peft_config[adapter_name], PromptConfig):
            PromptTuner.check_state(model, config, adapter_name, peft_model_state_dict)
        return peft_set(model, peft_model_state_dict, adapter_name, *args, **kwargs)

    for place in (peft, peft.utils, peft.utils.save_and_load, peft.peft_model):
        place.get_peft_model_state_dict, place.set_peft_model_state_dict = get_state, set_state


def saved(folder: str | os.PathLike[str], config: PromptConfig) -> None:
    """Call it after an adapter has been saved in a folder."""
    for write_card in _write_card:
        write_card(folder, config)
