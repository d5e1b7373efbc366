"""The compiled CUDA kernels (csrc/cuda), reached through the dispatcher.

How a layer is cut into blocks is chosen from its shape and the GPU (csrc/cuda/plan.h). To tune for
a GPU, D3NET_KERNELS_CUDA_PLAN="tiles=3,parts=8" fixes it for the process: `tiles` of 8 outputs a
block of the tensor-core convolutions (1 to 5), `parts` of the map in a weight gradient (1 or more).
"""

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
    return next(filter(None, map(no_code_for, devices)), None)


def archs() -> str:
    """The architectures with machine code in the binary, as in "sm_80 sm_90"; "none" without it."""
    if _binary.cuda_missing is not None:
        return "none"
    return " ".join(f"sm_{arch}" for arch in torch.ops.d3net_kernels.cuda_archs().split())


@functools.cache
def no_code_for(device: int) -> str | None:
    """Why the binary, which has to be there, cannot run on the GPU of that index, or None."""
    if _serves(device):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"the CUDA binary holds code for {archs()}, {torch.cuda.get_device_name(device)} "
        f"is sm_{major}{minor}; rebuild with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def _serves(device: int) -> bool:
    return bool(torch.ops.d3net_kernels.cuda_serves(device))
