"""The Hub's client: downloads, and errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from ..adapters.folder import CALIBRATION, CLASS_FEATURES, HEAD_WEIGHTS
from ..adapters.peft_towers import NOTE
from ..utils.compat import connection_error

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
# The pictures that a run has seen, one per line: 16 hexadecimal digits of the content's hash, and the split.
SEEN_PICTURES = "seen_pictures.txt"
# The pictures that a card shows if they are in its folder; the second is made by `hf-tgpt explain`, if at all.
PLOTS = {"training.png": "training curve and per-class change", "attention.png": "where the adapter looks"}
# The files beside an adapter that are for users.
RUN_FILES = ("results.json", *PLOTS, "training_log.jsonl", SEEN_PICTURES, CALIBRATION)
FILES = (CONFIG, WEIGHTS, CARD, *RUN_FILES)
# The additional files of PEFT's own adapters.
NOTED_FILES = (NOTE, HEAD_WEIGHTS)
_OLD = ("linear_probe.safetensors",)


class HubError(OSError):
    """The Hub cannot be reached or refuses a request. The message says what to do; nothing has been published.

    Example:
        >>> try:
        ...     hf_tgpt.push_folder("runs/my-run", "me/my-pictures")
        ... except hf_tgpt.HubError as error:
        ...     print(error)
    """


def download(
    repo_id: str,
    subfolder: str = "",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str:
    """The cached folder with only the adapter's own files from a repository. Raises HubError."""
    names = [f"{subfolder}/{name}" if subfolder else name for name in (*FILES, *NOTED_FILES, CLASS_FEATURES, *_OLD)]
    cache = None if cache_dir is None else os.fspath(cache_dir)
    with explained(f"{repo_id} (no folder here)"):
        return snapshot_download(repo_id, revision=revision, token=token, cache_dir=cache, allow_patterns=names)


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Raises the client's errors as HubError, which says what to do."""
    try:
        yield
    except HubError:
        raise
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(
            f"{repo_id}: the Hub cannot be reached and the files are not in the cache; connect, and unset "
            f"HF_HUB_OFFLINE if it is set. ({_first_line(error)})"
        ) from error
    except LocalTokenNotFoundError as error:
        raise HubError(
            "There is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN to a token with write "
            "permission."
        ) from error
    except HFValidationError as error:
        raise HubError(f"{repo_id} is not the id of a repository; write USER/NAME.") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no such revision; name an existing branch, tag or commit.") from error
    except (connection_error(), EntryNotFoundError) as error:
        if (response := getattr(error, "response", None)) is not None:
            raise HubError(f"{repo_id}: {_remedy(response.status_code)}") from error
        raise HubError(
            f"{repo_id}: the connection to the Hub broke off ({_first_line(error)}); check it and repeat, which does "
            "no harm."
        ) from error


def _remedy(status: int) -> str:
    if status == 401:
        return (
            "the Hub does not accept the token (401), or the repository is not yours to see; log in again with "
            "`hf auth login`, or set HF_TOKEN to a token that is valid."
        )
    if status == 403:
        return "the token may not write there (403); use one with write permission for that user or organisation."
    if status == 404:
        return "the repository does not exist (404), or the token has no access to it; correct the name."
    if status == 429:
        return "too many requests (429); wait some minutes and repeat."
    if status >= 500:
        return f"the Hub has a problem of its own ({status}); repeat later, which does no harm."
    return f"the Hub refused ({status}); correct the name, or look at the repository's settings."


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
