"""The files in the folder of a trained adapter, local or on the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..adapters.folder import read_config, read_results
from ..adapters.peft_towers import NOTE
from ..utils.files import read_text
from ..utils.names import name_here
from .client import SEEN_PICTURES, download
from .old_formats import read_note


def local_folder(name_or_path: str | os.PathLike[str], **hub: Any) -> str:
    """The folder itself, or the cached folder of a repository's files; `hub` is passed to `client.download`."""
    name = os.path.expanduser(name_or_path)
    return name if name.startswith((".", os.sep)) or os.path.isdir(name) else download(name, **hub)


def results_of(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The results of an adapter's training, results.json; empty if there is none.

    Raises ValueError if it is damaged.
    """
    return read_results(local_folder(name_or_path))


def seen_pictures(folder: str | os.PathLike[str]) -> dict[str, str]:
    """The pictures of a run, {digest of a picture (`data.duplicates.digests`): split}; empty without such a file.

    A picture that is in several splits counts as the first of train, validation and test.
    """
    file = Path(folder) / SEEN_PICTURES
    seen: dict[str, str] = {}
    for line in read_text(file).splitlines() if file.is_file() else []:
        digest, _, split = line.partition(" ")
        seen.setdefault(digest, split)
    return seen


def is_cut_off(folder: str | os.PathLike[str]) -> bool:
    """Whether a training in this folder was interrupted."""
    return (Path(folder) / "run.json").is_file() and not (Path(folder) / "results.json").is_file()


def base_and_revision(name_or_path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """The base model that an adapter was trained on, a Hub id or folder, and its revision if known.

    Raises ValueError if its config names none.
    """
    folder = local_folder(name_or_path)
    if os.path.isfile(os.path.join(folder, NOTE)):
        base, revision = name_here(read_note(folder)["base_model"]), None
    else:
        config = read_config(folder)
        base, revision = config.base_model_name_or_path, config.revision
    if not base:
        raise ValueError(f"{os.fspath(name_or_path)!r} does not name its base model; pass `base_model`, or --model.")
    return base, revision
