"""An adapter on the Hub: pushed in one commit or not at all, and fetched without anything that is not its own."""

from __future__ import annotations

import filecmp
import functools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    HfApi,
    ModelCard,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from .base_model import TOY_CLIP, TOY_NAME, public_name
from .card import CARD, LOCAL, dataset_title, hub_dataset, is_ours, write_card
from .config import PromptConfig, check_weights_file, read_config
from .reading import read_json

# What a training leaves beside the adapter for people to see.
RUN_FILES = ("results.json", "training.png", "training_log.jsonl")
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (_CONFIG, _WEIGHTS, CARD, *RUN_FILES)
# Those of a reference (references.py), which is read from the Hub but not pushed from here.
_REFERENCE_FILES = ("reference.json", "linear_probe.safetensors")


class HubError(OSError):
    """The Hub cannot be reached or says no. The message tells what to do; nothing has been published."""


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload adapter",
    commit_description: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Publishes a saved adapter or a run's folder: weights, config, card, results.json, picture and training log.

    All of it goes in one commit, so that the repository holds the whole adapter or what it held before, and a push
    that failed may simply be repeated. `private` makes a new repository private, `revision` is the branch. A card that
    somebody has written there stays. Paths of this machine are left out of what is published.

    Raises ValueError if the folder holds no adapter of this package, HubError if the Hub says no.
    """
    config = read_config(folder)
    if not isinstance(config, PromptConfig):
        raise ValueError(f"{os.fspath(folder)!r} holds an adapter of {config.peft_type}; push it by PEFT's own means.")
    check_weights_file(os.path.join(folder, _WEIGHTS))
    repo_id = check_repository(repo_id, private=private, revision=revision, token=token)
    api = HfApi(token=token)
    with TemporaryDirectory() as staged, _explained(repo_id):
        if revision and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        branch = _branch(api, repo_id, revision)
        there = api.list_repo_files(repo_id, revision=branch)
        _stage(Path(folder), Path(staged), config, repo_id, api)
        names = sorted(path.name for path in Path(staged).iterdir())
        if CARD in there and not is_ours(api.hf_hub_download(repo_id, CARD, revision=branch)):
            names.remove(CARD)
        operations: list[CommitOperationAdd | CommitOperationDelete]
        operations = [CommitOperationAdd(name, Path(staged) / name) for name in names]
        # What an earlier adapter left there and this one does not bring.
        operations += [CommitOperationDelete(name) for name in RUN_FILES if name in there and name not in names]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def check_repository(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> str:
    """Makes the repository where there is none yet, and returns its full name; to be asked before a training.

    Raises HubError if the token cannot write there, if the repository is public but was to be `private`, or if it
    holds something that is no adapter of this package.
    """
    api = HfApi(token=token)
    with _explained(repo_id):
        user = api.whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise HubError(
                f"The token of {user['name']!r} may only read; make one with write permission at "
                "https://huggingface.co/settings/tokens and log in with it (`hf auth login`)."
            )
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise HubError(f"{repo_id!r} exists and is public; make it private in its settings or choose another name.")
        branch = _branch(api, repo_id, revision)
        names = set(api.list_repo_files(repo_id, revision=branch))
        foreign = sorted(names - {".gitattributes", ".gitignore", "LICENSE", CARD})
        ours = _CONFIG in names and _is_our_config(api.hf_hub_download(repo_id, _CONFIG, revision=branch))
        if foreign and not ours:
            raise HubError(
                f"{repo_id!r} exists and holds something else than an adapter of hf-tgpt ({', '.join(foreign[:3])}); "
                "choose another name."
            )
    return repo_id


def push_model(model: PeftModel, repo_id: str, **kwargs: Any) -> CommitInfo:
    """`push_folder` of the active adapter, with the results of the run if it comes unchanged from a run's folder."""
    name = model.active_adapter
    config = model.peft_config[name]
    run = config.folder  # the saving sets another
    with TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder, selected_adapters=[name])
        finally:
            config.folder = run
        here = Path(folder) / ("" if name == "default" else name)
        if run and _same_file(Path(run) / _WEIGHTS, here / _WEIGHTS):
            for file in (CARD, *RUN_FILES):
                if (Path(run) / file).is_file():
                    shutil.copy(Path(run) / file, here)
        return push_folder(here, repo_id, **kwargs)


def download(
    repo_id: str,
    subfolder: str = "",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str:
    """The folder in the cache with an adapter's own files, whatever else the repository lists. Raises HubError."""
    names = [f"{subfolder}/{name}" if subfolder else name for name in FILES + _REFERENCE_FILES]
    cache = None if cache_dir is None else os.fspath(cache_dir)
    with _explained(f"{repo_id} (no folder here)"):
        return snapshot_download(repo_id, revision=revision, token=token, cache_dir=cache, allow_patterns=names)


def _same_file(a: Path, b: Path) -> bool:
    return a.is_file() and filecmp.cmp(a, b, shallow=False)


# What is published ---------------------------------------------------------------------------------------------------


def _stage(folder: Path, staged: Path, config: PromptConfig, repo_id: str, api: HfApi) -> None:
    """Copies what is to be published, without the names that mean nothing elsewhere."""
    for name in FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staged / name)
    content = json.loads((staged / _CONFIG).read_text())
    base, tokenizer = content["base_model_name_or_path"], content.get("tokenizer_name_or_path")
    if tokenizer not in (None, base) and not public_name(tokenizer):
        raise ValueError(
            f"`tokenizer_name_or_path`={tokenizer!r} is a folder that others do not have; put the tokenizer on the Hub "
            "and name that, or leave it out where it is the base model's own."
        )
    content["base_model_name_or_path"] = base if base == TOY_NAME else public_name(base)
    content["tokenizer_name_or_path"] = public_name(tokenizer)
    _write_json(staged / _CONFIG, content)
    results = None
    if (staged / "results.json").exists():
        results = read_json(staged / "results.json")
        results["dataset"] = dataset_title(results)
        if config.base_model_name_or_path != str(TOY_CLIP):
            results["base_model"] = public_name(results.get("base_model")) or LOCAL
        _write_json(staged / "results.json", results)
    if not (staged / CARD).exists() or is_ours(staged / CARD):
        base = _licence(api, public_name(config.base_model_name_or_path), ModelCard)
        data = _licence(api, public_name(hub_dataset(results or {})), DatasetCard)
        write_card(staged, config, results, repo_id, base_licence=base, data_licence=data)


def _licence(api: HfApi, name: str | None, kind: type[ModelCard] | type[DatasetCard]) -> str | None:
    """What the card of a base model or data set says; one that cannot be had says nothing."""
    if name is None:
        return None
    try:
        path = api.hf_hub_download(name, CARD, repo_type=kind.repo_type)
        return kind.load(path, ignore_metadata_errors=True).data.get("license")
    except (HTTPError, OSError, ValueError):
        return None


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


# What is there -------------------------------------------------------------------------------------------------------


def _branch(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """The branch, or None where it does not exist and so would start from the main one."""
    return revision if revision and api.revision_exists(repo_id, revision) else None


def _is_our_config(path: str) -> bool:
    try:
        method = read_json(path)["peft_type"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(method, str) and issubclass(PEFT_TYPE_TO_CONFIG_MAPPING.get(method, object), PromptConfig)


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """The client's errors in words that say what to do."""
    try:
        yield
    except HubError:
        raise
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(
            f"{repo_id}: the Hub cannot be reached and the files are not in the cache; connect, and unset "
            f"HF_HUB_OFFLINE where it is set. ({_first_line(error)})"
        ) from error
    except LocalTokenNotFoundError as error:
        raise HubError(
            "There is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN to a token with write "
            "permission."
        ) from error
    except HFValidationError as error:
        raise HubError(f"{repo_id}, and no id of a repository, which is USER/NAME; correct it.") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no such revision; name a branch, tag or commit that it has.") from error
    except HfHubHTTPError as error:
        raise HubError(f"{repo_id}: {_remedy(error.response.status_code)}") from error
    except (HTTPError, EntryNotFoundError) as error:
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
        return "the Hub knows no such repository (404), or the token may not see it; correct the name."
    if status == 429:
        return "too many requests (429); wait some minutes and repeat."
    if status >= 500:
        return f"the Hub has a problem of its own ({status}); repeat later, which does no harm."
    return f"the Hub refused ({status}); correct the name, or look at the repository's settings."


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# PEFT's ------------------------------------------------------------------------------------------------------------

_peft_push = PeftModel.push_to_hub


@functools.wraps(_peft_push)
def _push_to_hub(self: PeftModel, repo_id: str, **kwargs: Any) -> CommitInfo:
    if isinstance(self.peft_config.get(self.active_adapter), PromptConfig):
        return push_model(self, repo_id, **kwargs)
    return _peft_push(self, repo_id, **kwargs)


_peft_save = PeftModel.save_pretrained


@functools.wraps(_peft_save)
def _save_pretrained(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
    if len(args) < 3 and isinstance(self.peft_config.get(self.active_adapter), PromptConfig):
        kwargs.setdefault("save_embedding_layers", False)
    _peft_save(self, save_directory, *args, **kwargs)


# PEFT's own saves the adapter and then writes an empty form over its card.
PeftModel.push_to_hub = _push_to_hub
# PEFT's own asks the Hub about the base model's vocabulary, which prompts never change.
PeftModel.save_pretrained = _save_pretrained
