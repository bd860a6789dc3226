"""What differs between versions of the libraries; no other file asks for a version.

Each entry names the release that made it needed; it can go when `pyproject.toml` asks for that one.
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


# Asked in every forward, which torch.compile follows.
_TRANSFORMERS_4, _BEFORE_5_24 = before("transformers", "5"), before("transformers", "5.24")


def pil_image_processor(name: str = "CLIPImageProcessor") -> Any:
    """An image processor that works with PIL, CLIP's where there is none of that name, which old files have.
    transformers 5 gave these names of their own."""
    import transformers

    suffix = "" if _TRANSFORMERS_4 else "Pil"
    return getattr(transformers, f"{name}{suffix}", None) or getattr(transformers, f"CLIPImageProcessor{suffix}")


def causal_mask(config: Any, hidden: Any) -> Any:
    """What each token of hidden states (s, t, d) sees. Before transformers 5 layers know no flag for it; 5.24 calls the
    cache, of which there is none, by another name."""
    if _TRANSFORMERS_4:
        import torch

        return hidden.new_full((hidden.shape[1],) * 2, torch.finfo(hidden.dtype).min).triu(1)[None, None]
    from transformers.masking_utils import create_causal_mask

    cache: dict[str, Any] = {"past_key_values" if _BEFORE_5_24 else "cache": None}
    return create_causal_mask(config, hidden, None, **cache)


def padding_mask(config: Any, hidden: Any, is_word: Any) -> Any:
    """What each token of hidden states (s, t, d) sees: the words, `is_word` (s, t). Before transformers 5 there is no
    function for it."""
    if _TRANSFORMERS_4:
        import torch

        return torch.finfo(hidden.dtype).min * (~is_word[:, None, None]).to(hidden.dtype)
    from transformers.masking_utils import create_bidirectional_mask

    return create_bidirectional_mask(config, hidden, is_word)


def encoder_layer(layer: Any, causal: bool) -> Any:
    """A layer of a tower, from hidden states and a mask to hidden states. Before transformers 5 it gives a tuple, and
    takes one mask, two, of which the last is the causal one, or none."""
    if not _TRANSFORMERS_4:
        return partial(layer, is_causal=True) if causal else layer
    masks = [name for name in inspect.signature(layer.forward).parameters if name.endswith("attention_mask")]
    return lambda hidden, mask: layer(hidden, *([None, mask][-len(masks) :] if masks else ()))[0]


def features_output(features: Any) -> Any:
    """The answer to a model's `get_text_features` or `get_image_features`. Before transformers 5 it is a tensor."""
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
    """huggingface_hub's. Before 1.0 it takes a type neither as a string nor as `X | Y`."""
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
