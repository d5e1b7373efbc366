"""What the operator does under torch.autocast: inputs, weight and bias are cast, psi is not.

scale and shift stay as they are, since batch statistics lose too much in 16 bits; the kernels read
them in float32 next to bfloat16 or float16 inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """As torch does: float64 is left alone."""
    return t if t.dtype == torch.float64 else t.to(dtype)


def _register(op: Any, device: str, dispatch_key: str) -> None:
    def kernel(
        inputs: Sequence[Tensor],
        weight: Tensor,
        bias: Tensor | None,
        dilations: Sequence[int],
        scale: Tensor | None,
        shift: Tensor | None,
        relu: bool,
        precision: int,
    ) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return op(
                [_cast(x, dtype) for x in inputs],
                _cast(weight, dtype),
                None if bias is None else _cast(bias, dtype),
                dilations,
                scale,
                shift,
                relu,
                precision,
            )

    ops.library.impl(op, kernel, dispatch_key)


for _ops in (ops.DEFAULT, ops.TRITON):
    for _op in (_ops.multidilated_conv2d, _ops.with_moments):
        _register(_op, "cpu", "AutocastCPU")
        _register(_op, "cuda", "AutocastCUDA")
