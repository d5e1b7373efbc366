"""Networks that save to a folder and come back from it: config.json and model.safetensors.

The same two files in a repository on the Hugging Face Hub do as well.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d3net import checks, hub
from d3net.files import path_of, replacing

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

P = TypeVar("P", bound="Pretrained")


class Pretrained(nn.Module):
    """A network that is made from one config, a frozen dataclass of the type `Config`."""

    Config: type[Any]

    def __init__(self, config: Any) -> None:
        if not isinstance(config, self.Config):
            raise TypeError(
                f"config is a {type(config).__name__}; {type(self).__name__} is made from a "
                f"{self.Config.__name__}"
            )
        super().__init__()
        self.config = config

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`, which is made if it is missing.

        Raises:
            OSError: `folder` is a file, or cannot be written to; files that were there stay.
            ValueError: the network is on the meta device.
        """
        checks.has_memory(self)
        folder = path_of("folder", folder)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"folder is {folder}, which is a file; accepted is a folder")
        folder.mkdir(parents=True, exist_ok=True)
        config = {"architecture": type(self).__name__, **dataclasses.asdict(self.config)}
        with replacing(folder / CONFIG_FILE) as part:
            part.write_text(json.dumps(config, indent=2) + "\n")
            save_safetensors(self.state_dict(), folder / WEIGHTS_FILE)

    @classmethod
    def from_pretrained(cls: type[P], source: str | Path, **download: Any) -> P:
        """The network that :meth:`save_pretrained` wrote, in evaluation mode.

        Args:
            source: the folder, or "owner/name" of a repository on the Hugging Face Hub (where no
                such folder exists; needs huggingface_hub, pip install 'd3net-kernels[hub]').
            download: for a repository, as in huggingface_hub.snapshot_download: revision, token,
                cache_dir, local_files_only and others.

        Raises:
            FileNotFoundError: the folder or one of its two files is missing, or the repository
                cannot be fetched.
            ValueError: a file is damaged, or belongs to another kind of network.
            TypeError: `source` is no path.
        """
        folder = path_of("source", source)
        if not folder.exists() and hub.is_repository(source):
            folder = hub.download(str(source), (CONFIG_FILE, WEIGHTS_FILE), **download)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is missing; accepted is a folder that save_pretrained wrote"
                )
        model = _build(cls, folder / CONFIG_FILE)
        load_safetensors(folder / WEIGHTS_FILE, model)
        return model.eval()

    def push_to_hub(self, repository: str, **create: Any) -> str:
        """Save into the repository "owner/name" on the Hugging Face Hub; returns its address.

        Args:
            repository: its name; it is made if it is missing.
            create: as in huggingface_hub.HfApi.create_repo: private, token and others.

        Raises:
            ModuleNotFoundError: huggingface_hub is not installed.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload(folder, repository, **create)


def save_safetensors(
    state: dict[str, Tensor], path: str | Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Write a state_dict, with a few words about it if there are any.

    Raises:
        OSError: the file cannot be written; what was there before stays.
    """
    with replacing(path_of("path", path)) as part:
        save_file({name: t.contiguous() for name, t in state.items()}, part, metadata)


def load_safetensors(path: str | Path, model: nn.Module) -> None:
    """Load a state_dict that fits `model` exactly; on any error the model stays as it was.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, its names or shapes do not fit, or the model is on the meta
            device.
    """
    checks.has_memory(model)
    if not path_of("path", path).is_file():
        raise FileNotFoundError(f"{path} is missing; accepted is a .safetensors file")
    try:
        state = load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    own = model.state_dict()
    problems = [
        *(f"missing {name}" for name in own if name not in state),
        *(f"unexpected {name}" for name in state if name not in own),
        *(
            f"{name} has shape {tuple(state[name].shape)}, expected {tuple(t.shape)}"
            for name, t in own.items()
            if name in state and state[name].shape != t.shape
        ),
    ]
    if problems:
        raise ValueError(f"{path} does not fit this model:\n  " + "\n  ".join(problems))
    model.load_state_dict(state)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The words that :func:`save_safetensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged.
    """
    if not path_of("path", path).is_file():
        raise FileNotFoundError(f"{path} is missing; accepted is a .safetensors file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def _build(cls: type[P], path: Path) -> P:
    """The network of the config in the file `path`, freshly initialised."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    architecture = values.pop("architecture", None) if isinstance(values, dict) else None
    if architecture != cls.__name__:
        found = f"a {architecture}" if isinstance(architecture, str) else "no network"
        raise ValueError(
            f"{path} describes {found}, not a {cls.__name__}; load it with the class that saved it"
        )
    try:
        return cls(_config_from(cls.Config, values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a {cls.__name__}: {error}") from error


def _config_from(config: type[Any], values: dict[str, Any]) -> Any:
    """The dataclass `config` from its JSON values: nested ones rebuilt, lists as tuples."""
    hints = get_type_hints(config)
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints.get(name)) and isinstance(value, dict):
            fields[name] = _config_from(hints[name], value)
        else:
            fields[name] = tuple(value) if isinstance(value, list) else value
    return config(**fields)
