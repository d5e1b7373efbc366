"""Mean and variance of a source over a batch, computed once for all the layers that read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _BatchStatistics(torch.autograd.Function):
    """Keeps the raw source only, which the convolution keeps too; no float32 or centred copy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(x.to(dtype_for(x)), (0, 2, 3), correction=0)
        return mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x.shape[0] * x.shape[2] * x.shape[3]
        centred = x - mean[:, None, None]
        grad = (centred * (2 * grad_var)[:, None, None] + grad_mean[:, None, None]) / count
        grad_x: Tensor = grad.to(x.dtype)
        return grad_x


def dtype_for(x: Tensor) -> torch.dtype:
    """Statistics, scale and shift are float32, or float64 next to float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of `x` (N, C, H, W) over N, H and W; differentiable."""
    mean, var = _BatchStatistics.apply(x)
    return mean, var
