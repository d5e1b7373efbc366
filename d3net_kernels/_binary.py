"""Finds and loads the compiled kernels, and keeps the reason where that is not possible.

The CUDA kernels are a binary of their own: the CPU kernels load where there is no CUDA runtime.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

PATH = Path(__file__).with_name("_C.abi3.so")
CUDA_PATH = Path(__file__).with_name("_C_cuda.abi3.so")
OLDEST_TORCH = (2, 10)

_HOW_TO_BUILD = (
    "in the source tree, with torch and a C++20 compiler there, run: "
    "pip install 'setuptools>=77' ninja && "
    "pip install --no-build-isolation --no-deps --editable ."
)

_warned: set[str] = set()


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _load(path: Path, how_to_build: str) -> str | None:
    """Load a binary; None on success, else the reason why its kernels are not there."""
    if not path.exists():
        return f"there is no compiled binary at {path}: {how_to_build}"
    if _torch_version() < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"the binary needs torch >= {oldest}, this is torch {torch.__version__}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load here ({error}); to rebuild it: {how_to_build}"
    return None


def warn_once(reason: str) -> None:
    """Say once per process and reason that the slower plain torch kernels serve."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"d3net_kernels runs on plain torch operations: {reason}", stacklevel=2)


missing: str | None = _load(PATH, _HOW_TO_BUILD)
"""Why the compiled CPU kernels are not there; None where they are."""

cuda_missing: str | None = _load(
    CUDA_PATH,
    f"with a CUDA build of torch and its CUDA toolkit there, D3NET_KERNELS_CUDA=1; {_HOW_TO_BUILD}",
)
"""Why the compiled CUDA kernels are not there; None where they are."""
