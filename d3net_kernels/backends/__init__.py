"""Which implementation serves a call: chosen by the dispatcher, or forced by the user.

Left alone, torch's dispatcher picks the compiled kernel for the tensors' device, for CUDA tensors
without one Triton's, and falls back to the plain torch kernels of `composite`. A GPU that the
compiled kernels have no code for is served by Triton's or by plain torch too. `use_backend` or
D3NET_KERNELS_BACKEND force one backend and turn its absence into an error; "reference" is plain
torch with plain torch autograd.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _binary
from . import composite, cpu, cuda, triton

NAMES = ("cpu", "cuda", "triton", "reference")

_PREDICATES = {
    "cpu": cpu.why_not,
    "cuda": cuda.why_not,
    "triton": triton.why_not,
    "reference": composite.why_not,
}

# A plain global and not a ContextVar: torch.compile guards on it, so a compiled function follows.
_forced: str | None = os.environ.get("D3NET_KERNELS_BACKEND") or None


class use_backend:  # noqa: N801 (used like a function)
    """Context manager that forces one backend: "cpu", "cuda", "triton" or "reference".

    It holds for the calls made inside, in every thread; their backward passes follow wherever
    they run.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend is not available here; the message says why.
    """

    def __init__(self, name: str) -> None:
        _require(name, ())
        self.name = name
        self._before: list[str | None] = []

    def __enter__(self) -> None:
        global _forced
        self._before.append(_forced)
        _forced = self.name

    def __exit__(self, *error: object) -> None:
        global _forced
        _forced = self._before.pop()


def forced() -> str | None:
    """The backend that is asked for, with what speaks against it; None if none is."""
    if _forced is None:
        return None
    if _forced not in _PREDICATES:
        return f"{_forced!r} (error: accepted are {', '.join(NAMES)})"
    reason = why_not(_forced)
    return _forced if reason is None else f"{_forced} (error: {reason})"


def why_not(backend: str, *tensors: Tensor) -> str | None:
    """Why `backend` cannot serve `tensors` (or any tensor at all, if none are given), else None.

    Raises:
        ValueError: there is no backend of that name.
    """
    if backend not in _PREDICATES:
        raise ValueError(f"there is no backend {backend!r}; accepted are {', '.join(NAMES)}")
    return _PREDICATES[backend](tensors)


def forced_for(tensors: Sequence[Tensor]) -> str | None:
    """The backend that the user asks for, if any; raises where it cannot serve `tensors`.

    Where nobody asks: what serves a GPU that the compiled CUDA kernels have no code for.
    """
    if _forced is None:
        return _instead_of_cuda(tensors)
    if _forced not in _PREDICATES:
        raise ValueError(f"D3NET_KERNELS_BACKEND is {_forced!r}; accepted are {', '.join(NAMES)}")
    _require(_forced, tensors)
    return _forced


def _instead_of_cuda(tensors: Sequence[Tensor]) -> str | None:
    # torch.compile must not trace questions to the driver: there the kernel itself refuses.
    device = tensors[0].device
    if device.type != "cuda" or _binary.cuda_missing or torch.compiler.is_compiling():
        return None
    reason = cuda.no_code_for(device.index)
    if reason is None:
        return None
    if triton.why_not(tensors) is None:
        return "triton"
    _binary.warn_once(reason)
    return "reference"


def _require(name: str, tensors: Sequence[Tensor]) -> None:
    reason = why_not(name, *tensors)
    if reason is not None:
        raise RuntimeError(f"the {name} backend is not available: {reason}")
