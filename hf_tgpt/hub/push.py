"""Publishing an adapter on the Hub, in one commit or not at all."""

from __future__ import annotations

import filecmp
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi, ModelCard
from huggingface_hub.errors import HTTPError
from peft import PeftModel

from ..adapters.class_features import are_valid
from ..adapters.config import PromptConfig
from ..adapters.folder import CLASS_FEATURES, check_weights_file, read_config
from ..adapters.peft_towers import NOTE
from ..adapters.registry import registered_methods
from ..utils.files import read_json, write_json
from ..utils.names import TOY_NAME, is_toy_clip, public_name
from .card import LOCAL, dataset_title, hub_dataset, is_ours, write_card
from .client import CARD, CONFIG, FILES, NOTED_FILES, RUN_FILES, WEIGHTS, HubError, explained
from .old_formats import noted_config, read_note
from .programs import endpoint_files


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
    tags: list[str] | None = None,
    endpoint: bool = False,
    package: str | None = None,
) -> CommitInfo:
    """Publishes a saved adapter or a run's folder: weights, config, card, results.json, plot and training log.

    Everything is in one commit, so that the repository has either the whole adapter or its previous content, and a
    failed push can be repeated. `private` makes a new repository private, `revision` is the branch, `tags` are added to
    the card. A card that somebody has written is kept. Local paths are not published. With `endpoint`, the repository
    also has the files that the Hub's Inference Endpoints need to serve it; `package` is what they install in place of
    the released hf-tgpt, such as the URL of a wheel.

    Raises ValueError if the folder contains no adapter of this package, or for an `endpoint` one whose base model is
    not on the Hub, HubError if the Hub refuses.

    Example:
        >>> hf_tgpt.push_folder("runs/my-run", "me/my-pictures", private=True)
    """
    config = config_to_publish(folder)
    if endpoint:
        check_base(config)
    repo_id = check_repository(repo_id, private=private, revision=revision, token=token)
    api = HfApi(token=token)
    with TemporaryDirectory() as staged, explained(repo_id):
        if revision and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        branch = _branch(api, repo_id, revision)
        there = api.list_repo_files(repo_id, revision=branch)
        stage(Path(folder), Path(staged), config, repo_id, api)
        for name, text in endpoint_files(package).items() if endpoint else ():
            (Path(staged) / name).write_text(text, encoding="utf-8")
        if tags:
            card = ModelCard.load(Path(staged) / CARD, ignore_metadata_errors=True)
            card.data.tags = [*dict.fromkeys([*(card.data.tags or []), *tags])]
            card.save(Path(staged) / CARD)
        names = sorted(path.name for path in Path(staged).iterdir())
        if CARD in there and not is_ours(api.hf_hub_download(repo_id, CARD, revision=branch)):
            names.remove(CARD)
        operations: list[CommitOperationAdd | CommitOperationDelete]
        operations = [CommitOperationAdd(name, Path(staged) / name) for name in names]
        # Files of an earlier adapter that this one does not have.
        replaced = (*RUN_FILES, *NOTED_FILES, CLASS_FEATURES)
        operations += [CommitOperationDelete(name) for name in replaced if name in there and name not in names]
        # Not `upload_folder`, which makes several commits of an upload that takes minutes.
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def config_to_publish(folder: str | os.PathLike[str]) -> PromptConfig:
    """The config of the method in a folder: ours, or PEFT's from its note. Raises ValueError if there is none, or if
    the folder is damaged.
    """
    noted = os.path.isfile(os.path.join(folder, NOTE))
    config = noted_config(read_note(folder)) if noted else read_config(folder)
    if not isinstance(config, PromptConfig):
        raise ValueError(
            f"{os.fspath(folder)!r} holds PEFT's own {config.peft_type.value} without classes, which hf-tgpt does not "
            "publish; upload the whole folder with `hf upload USER/NAME FOLDER`."
        )
    check_weights_file(os.path.join(folder, WEIGHTS))
    return config


def check_base(config: PromptConfig) -> None:
    """Raises ValueError if a machine of the Hub could not load the adapter's base model."""
    base = config.base_model_name_or_path
    if not public_name(base) and not is_toy_clip(base):
        raise ValueError(
            f"The adapter's base model, {base!r}, is no model on the Hub, so nothing there can load it; upload it, and "
            "name it in `base_model_name_or_path` of adapter_config.json."
        )


def check_repository(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> str:
    """Makes the repository if it does not exist, and returns its full name; to be called before training.

    Raises HubError if the token cannot write there, if the repository is public but was to be `private`, or if it
    contains something other than an adapter of this package.
    """
    api = HfApi(token=token)
    with explained(repo_id):
        check_token(api)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise HubError(f"{repo_id!r} exists and is public; make it private in its settings or choose another name.")
        branch = _branch(api, repo_id, revision)
        names = set(api.list_repo_files(repo_id, revision=branch))
        foreign = sorted(names - {".gitattributes", ".gitignore", "LICENSE", CARD})
        ours = NOTE in names or (
            CONFIG in names and _is_our_config(api.hf_hub_download(repo_id, CONFIG, revision=branch))
        )
        if foreign and not ours:
            raise HubError(
                f"{repo_id!r} exists and contains something other than an adapter of hf-tgpt ({', '.join(foreign[:3])}"
                "); choose another name."
            )
    return repo_id


def check_token(api: HfApi) -> None:
    """Raises HubError if the token is read-only."""
    user = api.whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            f"The token of {user['name']!r} has only read access; make one with write permission at "
            "https://huggingface.co/settings/tokens and log in with it (`hf auth login`)."
        )


def push_model(model: PeftModel, repo_id: str, **kwargs: Any) -> CommitInfo:
    """`push_folder` of the active adapter, with the results of the run if it comes unchanged from a run's folder."""
    kwargs.pop("max_shard_size", None)  # PEFT's; an adapter of this package is one file
    name = model.active_adapter
    config = model.peft_config[name]
    run = config.folder  # saving sets another one
    with TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder, selected_adapters=[name])
        finally:
            config.folder = run
        here = Path(folder) / ("" if name == "default" else name)
        if run and _same_file(Path(run) / WEIGHTS, here / WEIGHTS):
            for file in (CARD, *RUN_FILES, CLASS_FEATURES):
                if (Path(run) / file).is_file():
                    shutil.copy(Path(run) / file, here)
        return push_folder(here, repo_id, **kwargs)


def _same_file(a: Path, b: Path) -> bool:
    return a.is_file() and filecmp.cmp(a, b, shallow=False)


# What is published ---------------------------------------------------------------------------------------------------


def stage(folder: Path, staged: Path, config: PromptConfig, repo_id: str, api: HfApi) -> None:
    """Copies the files to publish, without local paths."""
    for name in (*FILES, *NOTED_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staged / name)
    if are_valid(folder, config):
        shutil.copyfile(folder / CLASS_FEATURES, staged / CLASS_FEATURES)
    base, tokenizer = config.base_model_name_or_path, getattr(config, "tokenizer_name_or_path", None)
    if tokenizer not in (None, base) and not public_name(tokenizer):
        raise ValueError(
            f"`tokenizer_name_or_path`={tokenizer!r} is a local folder; upload the tokenizer to the Hub and name "
            "that, or leave it out if it is the base model's own."
        )
    _publicly(staged / CONFIG, base, tokenizer)
    if (staged / NOTE).exists():
        _publicly(staged / NOTE, base, tokenizer)
    results = None
    if (staged / "results.json").exists():
        results = read_json(staged / "results.json")
        results["dataset"] = dataset_title(results)
        if not is_toy_clip(config.base_model_name_or_path):
            results["base_model"] = public_name(results.get("base_model")) or LOCAL
        write_json(staged / "results.json", results)
    if not (staged / CARD).exists() or is_ours(staged / CARD):
        base = _licence(api, public_name(config.base_model_name_or_path), ModelCard)
        data = _licence(api, public_name(hub_dataset(results or {})), DatasetCard)
        write_card(staged, config, results, repo_id, base_licence=base, data_licence=data)


def _publicly(file: Path, base: str | None, tokenizer: str | None) -> None:
    """Rewrites the names of base model and tokenizer in a config or a note; a local path becomes null."""
    content = read_json(file)
    name, fields = ("base_model", content["config"]) if file.name == NOTE else ("base_model_name_or_path", content)
    content[name] = TOY_NAME if is_toy_clip(base) else public_name(base)
    if fields.get("tokenizer_name_or_path") is not None:
        fields["tokenizer_name_or_path"] = public_name(tokenizer)
    write_json(file, content)


def _licence(api: HfApi, name: str | None, kind: type[ModelCard] | type[DatasetCard]) -> str | None:
    """The metadata in the card of a base model or data set; empty if it cannot be downloaded."""
    if name is None:
        return None
    try:
        path = api.hf_hub_download(name, CARD, repo_type=kind.repo_type)
        return kind.load(path, ignore_metadata_errors=True).data.get("license")
    except (HTTPError, OSError, ValueError):
        return None


# What is there ------------------------------------------------------------------------------------------------------


def _branch(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """The branch, or None if it does not exist and would start from the main branch."""
    return revision if revision and api.revision_exists(repo_id, revision) else None


def _is_our_config(path: str) -> bool:
    try:
        method = read_json(path)["peft_type"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(method, str) and method.lower() in registered_methods()
