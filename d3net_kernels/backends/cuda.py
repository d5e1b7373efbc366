"""The compiled CUDA kernels (csrc/cuda), reached through the dispatcher."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _binary


def why_not(tensors: Sequence[Tensor]) -> str | None:
    """The reason why this backend cannot serve `tensors`, or None."""
    if _binary.cuda_missing is not None:
        return _binary.cuda_missing
    for t in tensors:
        if t.device.type != "cuda":
            return f"a tensor is on {t.device}; the cuda backend serves CUDA tensors"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    devices = {t.device.index for t in tensors} or {torch.cuda.current_device()}
    return next((reason for device in devices if (reason := why_not_on(device))), None)


def why_not_on(device: int) -> str | None:
    """The reason why the binary, which is loaded, cannot serve a device, or None."""
    if _serves(device):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"the CUDA binary holds code for {archs()}, {torch.cuda.get_device_name(device)} "
        f"is sm_{major}{minor}; rebuild with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def archs() -> str:
    """The architectures with machine code in the binary, as in "sm_80 sm_90"; "none" without it."""
    if _binary.cuda_missing is not None:
        return "none"
    return " ".join(f"sm_{arch}" for arch in torch.ops.d3net_kernels.cuda_archs().split())


@functools.cache
def _serves(device: int) -> bool:
    return bool(torch.ops.d3net_kernels.cuda_serves(device))
