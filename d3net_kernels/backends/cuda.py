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
    for device in devices:
        if not _serves(device):
            major, minor = torch.cuda.get_device_capability(device)
            return (
                f"the CUDA binary holds code for {archs()}, {torch.cuda.get_device_name(device)} "
                f"is sm_{major}{minor}; rebuild with TORCH_CUDA_ARCH_LIST={major}.{minor}"
            )
    return None


def archs() -> str:
    """The architectures with machine code in the binary, as in "sm_80 sm_90"; "none" without it."""
    if _binary.cuda_missing is not None:
        return "none"
    return " ".join(f"sm_{arch}" for arch in torch.ops.d3net_kernels.cuda_archs().split())


@functools.cache
def _serves(device: int) -> bool:
    return bool(torch.ops.d3net_kernels.cuda_serves(device))
