"""Publishing an adapter as a Space: a web page on the Hub that classifies pictures with it."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from .client import CARD, HubError, explained
from .programs import APP, OURS, space_files
from .push import check_base, check_token, config_to_publish, stage


def push_space(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    package: str | None = None,
    commit_message: str = "Upload adapter and page",
) -> CommitInfo:
    """Publishes the page of `hf-tgpt demo` with a saved adapter or a run's folder as a Space, in one commit.

    The Space holds the adapter itself, and loads its base model from the Hub. `package` is what it installs in place of
    the released hf-tgpt, such as the URL of a wheel. Pushing again replaces the adapter.

    Raises ValueError if the folder contains no adapter of this package, or one whose base model is not on the Hub;
    HubError if the Hub refuses, or if the Space exists but was not made this way.

    Example:
        >>> push_space("runs/my-run", "me/my-page", private=True)
    """
    config = config_to_publish(folder)
    check_base(config)
    api, space = HfApi(token=token), "space"
    with TemporaryDirectory() as staged, explained(repo_id):
        check_token(api)
        repo_id = api.create_repo(repo_id, repo_type=space, space_sdk="gradio", private=private, exist_ok=True).repo_id
        if private and not api.space_info(repo_id).private:
            raise HubError(f"{repo_id!r} exists and is public; make it private in its settings or choose another name.")
        there = api.list_repo_files(repo_id, repo_type=space)
        if APP in there:
            ours = OURS in Path(api.hf_hub_download(repo_id, APP, repo_type=space)).read_text(encoding="utf-8")
        else:
            ours = not set(there) - {".gitattributes", ".gitignore", "LICENSE", CARD}
        if not ours:
            raise HubError(f"{repo_id!r} exists and is a Space of another kind; choose another name.")
        name = repo_id.rpartition("/")[2]
        place = Path(staged) / name
        place.mkdir()
        stage(Path(folder), place, config, repo_id, api)
        files = {file: Path(staged) / file for file in space_files(name, config, package)}
        for file, text in space_files(name, config, package).items():
            files[file].write_text(text, encoding="utf-8")
        files |= {f"{name}/{file.name}": file for file in place.iterdir()}
        operations = [CommitOperationAdd(file, path) for file, path in sorted(files.items())]
        return api.create_commit(repo_id, operations, commit_message=commit_message, repo_type=space)
