"""The official weights: NNabla's .h5 files, read into our networks and written from them.

An official file is plain HDF5: one float32 array at every "/" path, with the attributes `need_grad`
(whether it is trained) and `index` (its place in the order of creation).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from d3net import checks
from d3net.files import path_of, replacing
from d3net.official_names import Official, official_parameters

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Report:
    """How the names of a file compare with those of a network."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} arrays fit"]
        for title in ("missing", "unexpected", "misshapen"):
            names = getattr(self, title)
            if names:
                parts.append(f"{len(names)} {title}:")
                parts += [f"  {name}" for name in names]
        return "\n".join(parts)


def load_nnabla_h5(path: str | Path, model: nn.Module, *, strict: bool = True) -> Report:
    """Load the official weights of `model` from a .h5 file of the official release.

    Files of an ImageNet backbone go into a backbone: `load_nnabla_h5(path, model.backbone)`. The
    file is only read as data. Needs h5py.

    Args:
        path: the file.
        model: a backbone, an FCN segmentation network or a separation network; its parameters and
            running statistics are overwritten.
        strict: raise where not every name and shape agrees; else load what does.

    Returns:
        Which official names were loaded, and which are missing, unexpected or misshapen.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no HDF5 or is damaged, or (strict) it does not fit the model; the
            message lists every name. The model stays as it was. Or the model is on the meta device.
        TypeError: the official release has no such network, or `path` is no path.
        ModuleNotFoundError: h5py is not installed.
    """
    wanted = official_parameters(model)
    checks.has_memory(model)
    arrays = read_h5(path)
    report = compare(wanted, arrays)
    if not report.loaded:
        raise ValueError(f"{path} has nothing of this model: {_summary(wanted, arrays)}")
    if strict and not report.complete:
        raise ValueError(f"{path} does not fit this model; it stays as it was. {report}")
    with torch.no_grad():
        for name in report.loaded:
            tensor = wanted[name].tensor
            tensor.copy_(torch.from_numpy(arrays[name]).view_as(tensor))
    return report


def save_nnabla_h5(path: str | Path, model: nn.Module) -> None:
    """Write the parameters and running statistics of `model` as the official release would.

    Raises:
        TypeError: the official release has no such network, or `path` is no path.
        ValueError: the model is on the meta device.
        OSError: the file cannot be written; what was there before stays.
        ModuleNotFoundError: h5py is not installed.
    """
    h5py = _h5py()
    named = official_parameters(model)
    checks.has_memory(model)
    with replacing(path_of("path", path)) as part, h5py.File(part, "w") as file:
        for index, (name, official) in enumerate(named.items()):
            array = official.tensor.detach().to("cpu", torch.float32).numpy()
            dataset = file.create_dataset(name, data=array.reshape(official.shape))
            dataset.attrs["need_grad"] = official.need_grad
            dataset.attrs["index"] = index


def read_h5(path: str | Path) -> dict[str, Array]:
    """All arrays of an official .h5 file by name, in the file's order.

    Links to other files are not followed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no HDF5, is damaged, or holds something else than arrays of numbers.
    """
    h5py = _h5py()
    path = path_of("path", path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; accepted is an official .h5 file")
    arrays: dict[str, Array] = {}

    def visit(name: str, item: object) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        if item.dtype.kind != "f" or item.external is not None or item.is_virtual:
            raise ValueError(f"{path}: {name} is no array of floating-point numbers in this file")
        arrays[name] = np.asarray(item[()], dtype=np.float32)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as HDF5: {error}") from error
    return arrays


def compare(wanted: dict[str, Official], arrays: dict[str, Array]) -> Report:
    """The report of loading `arrays` where `wanted` is expected."""
    report = Report([], [], [name for name in arrays if name not in wanted], [])
    for name, official in wanted.items():
        if name not in arrays:
            report.missing.append(name)
        elif arrays[name].shape != official.shape:
            report.misshapen.append(f"{name}: {arrays[name].shape}, expected {official.shape}")
        else:
            report.loaded.append(name)
    return report


def _h5py() -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; .h5 files need it: pip install 'd3net-kernels[h5]'", name=error.name
        ) from error
    return h5py


def _summary(wanted: dict[str, Official], arrays: dict[str, Array]) -> str:
    first = next(iter(arrays), None)
    found = "it is empty" if first is None else f"its first array is {first}"
    return f"{found}, expected are names like {next(iter(wanted))}; check the file and the model"
