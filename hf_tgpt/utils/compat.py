"""What differs between versions of the libraries; no other file checks a version.

Each entry names the release that made it unnecessary; it can go once `pyproject.toml` requires that release.
"""

from __future__ import annotations

import copy
import inspect
from functools import partial
from importlib import metadata
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_type_hints

from packaging.version import Version


def before(library: str, release: str) -> bool:
    """Whether the installed version of a library is earlier than a release."""
    return Version(metadata.version(library)) < Version(release)


# Called in every forward, which torch.compile traces.
_TRANSFORMERS_4, _BEFORE_5_24 = before("transformers", "5"), before("transformers", "5.24")


def pil_image_processor(name: str = "CLIPImageProcessor") -> Any:
    """An image processor that works with PIL, or CLIP's if there is none of that name, as in old files. transformers 5
    gave these their own names.
    """
    import transformers

    suffix = "" if _TRANSFORMERS_4 else "Pil"
    return getattr(transformers, f"{name}{suffix}", None) or getattr(transformers, f"CLIPImageProcessor{suffix}")


def causal_mask(config: Any, hidden: Any) -> Any:
    """The causal mask for hidden states (s, t, d). Before transformers 5 layers have no flag for it; 5.24 renamed the
    argument for the cache, which is not used here.
    """
    if _TRANSFORMERS_4:
        import torch

        return hidden.new_full((hidden.shape[1],) * 2, torch.finfo(hidden.dtype).min).triu(1)[None, None]
    from transformers.masking_utils import create_causal_mask

    cache: dict[str, Any] = {"past_key_values" if _BEFORE_5_24 else "cache": None}
    return create_causal_mask(config, hidden, None, **cache)


def padding_mask(config: Any, hidden: Any, is_word: Any) -> Any:
    """The mask by which tokens of hidden states (s, t, d) attend only to words, `is_word` (s, t). Before transformers 5
    there is no function for it.
    """
    if _TRANSFORMERS_4:
        import torch

        return torch.finfo(hidden.dtype).min * (~is_word[:, None, None]).to(hidden.dtype)
    from transformers.masking_utils import create_bidirectional_mask

    return create_bidirectional_mask(config, hidden, is_word)


def encoder_layer(layer: Any, causal: bool) -> Any:
    """A tower's layer, from hidden states and a mask to hidden states. Before transformers 5 it returns a tuple, and
    takes no mask, one, or two, of which the last is causal.
    """
    if not _TRANSFORMERS_4:
        return partial(layer, is_causal=True) if causal else layer
    masks = [name for name in inspect.signature(layer.forward).parameters if name.endswith("attention_mask")]
    return lambda hidden, mask: layer(hidden, *([None, mask][-len(masks) :] if masks else ()))[0]


def features_output(features: Any) -> Any:
    """The output of a model's `get_text_features` or `get_image_features`. Before transformers 5 it is a tensor."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return features if _TRANSFORMERS_4 else BaseModelOutputWithPooling(pooler_output=features)


def commit_of(repo_id: str, **hub: Any) -> tuple[Any, str | None]:
    """What to pass as `revision` of a repository, and the commit. Before huggingface_hub 1.28 nothing resolves it."""
    if before("huggingface_hub", "1.28"):
        from huggingface_hub import hf_hub_download

        commit = Path(hf_hub_download(repo_id, "config.json", **hub)).parent.name
        return commit, commit
    from huggingface_hub import errors, resolve_revision

    try:
        revision = resolve_revision(repo_id, **hub)
    except errors.RevisionResolutionError as error:
        raise OSError(str(error)) from error
    return revision, revision.resolved


def spelled(kind: Any) -> Any:
    """A type as `typing` spells it, Optional[str] for `str | None`. huggingface_hub 1.0 checks both."""
    return Union[get_args(kind)] if isinstance(kind, UnionType) else kind  # noqa: UP007


def strict(dataclass: Any) -> Any:
    """huggingface_hub's. Before 1.0 it accepts types neither as strings nor as `X | Y`."""
    from huggingface_hub.dataclasses import strict

    if before("huggingface_hub", "1.0"):
        fields, hints = dataclass.__dataclass_fields__, get_type_hints(dataclass)
        for name in fields.keys() & hints.keys():
            fields[name] = copy.copy(fields[name])  # it may be another class's
            fields[name].type = spelled(hints[name])
    return strict(dataclass)


def connection_error() -> type[Exception]:
    """What the Hub's client raises when a connection fails. Before huggingface_hub 1.0 its client was requests."""
    from huggingface_hub.errors import HTTPError

    return HTTPError.mro()[1] if before("huggingface_hub", "1.0") else HTTPError
