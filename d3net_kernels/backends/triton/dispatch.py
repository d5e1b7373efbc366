"""Makes torch's dispatcher reach the Triton kernels.

Plain dispatcher registrations of the operators of ops.py, which have fake kernels and derivatives
already: to torch.compile they are one opaque node. torch.library.triton_op would let it look
inside, at launches whose arguments (tuples of raw pointers, numbers made from strides) it cannot
trace, and there is nothing left to fuse: psi, bias and sums are in the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ... import ops
from .. import composite
from . import interpreted, why_not

_NAMES = ("forward", "backward_data", "backward_weight", "forward_with_moments")
_SOURCES_AT = (0, 1, 1, 0)


def _kernel(name: str) -> Callable[..., Any]:
    """The launch; imported when first called, since Triton takes a second to import."""

    def kernel(*arguments: Any) -> Any:
        from . import launch

        return getattr(launch, name)(*arguments)

    return kernel


def _kernel_or_error(name: str, sources_at: int) -> Callable[..., Any]:
    """The launch, or the reason why it cannot be: what torch.compile traced asked no driver."""
    launch = _kernel(name)

    def kernel(*arguments: Any) -> Any:
        reason = why_not(arguments[sources_at])
        if reason is not None:
            raise RuntimeError(f"the triton backend is not available: {reason}")
        return launch(*arguments)

    return kernel


def _kernel_or_composite(name: str, sources_at: int) -> Callable[..., Any]:
    """The launch, or plain torch where that cannot serve; composite.py says so once."""
    kernel, fallback = _kernel(name), getattr(composite, name)

    def choose(*arguments: Any) -> Any:
        can = why_not(arguments[sources_at]) is None
        return (kernel if can else fallback)(*arguments)

    return choose


def _has_kernel(op: Any, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key))


for _op, _name, _at in zip(ops.TRITON, _NAMES, _SOURCES_AT, strict=True):
    ops.library.impl(_op, _kernel_or_error(_name, _at), "CPU" if interpreted() else "CUDA")
for _op, _name, _at in zip(ops.DEFAULT, _NAMES, _SOURCES_AT, strict=True):
    if not _has_kernel(_op, "CUDA"):
        ops.library.impl(_op, _kernel_or_composite(_name, _at), "CUDA")
