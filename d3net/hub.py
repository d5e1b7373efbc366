"""The Hugging Face Hub: fetch the two files of a saved network from a repository, and send them.

Needs huggingface_hub, the extra "hub"; nothing here is imported before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

INSTALL = "pip install 'd3net-kernels[hub]'"
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_repository(name: str | Path) -> bool:
    """Whether `name` could be that of a repository, "owner/name"."""
    return REPOSITORY.fullmatch(str(name)) is not None


def download(repository: str, files: Sequence[str], **options: Any) -> Path:
    """The folder in which `files` of a repository lie after fetching what is not there yet.

    `options` are those of huggingface_hub.snapshot_download: revision, token, cache_dir,
    local_files_only and others.

    Raises:
        FileNotFoundError: huggingface_hub is not installed, or the repository cannot be fetched.
    """
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {repository}; if it is a repository on the Hugging Face Hub, "
            f"fetching it needs: {INSTALL}"
        ) from error
    try:
        return Path(snapshot_download(repository, allow_patterns=list(files), **options))
    except OSError as error:  # what huggingface_hub raises for the network and for missing files
        raise FileNotFoundError(
            f"there is no folder {repository}, and it cannot be fetched as a repository on the "
            f"Hugging Face Hub: {error}"
        ) from error


def upload(folder: str | Path, repository: str, **options: Any) -> str:
    """Send a folder's files to a repository, which is made if it is missing; returns its address.

    `options` are those of huggingface_hub.HfApi.create_repo: private, token and others.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; the Hugging Face Hub needs it: {INSTALL}", name=error.name
        ) from error
    api = HfApi(token=options.pop("token", None))
    address = str(api.create_repo(repository, exist_ok=True, **options))
    api.upload_folder(repo_id=repository, folder_path=folder)
    return address
