"""Mean and variance of a source over a batch, computed once for all the layers that read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops


class _BatchStatistics(torch.autograd.Function):
    """Keeps the raw source only, which the convolution keeps too; no float32 or centred copy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = ops.channel_moments(x)
        return mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        """grad_mean / n + grad_var * 2 (x - mean) / n, in one pass over x."""
        x, mean = ctx.saved_tensors
        count = x.shape[0] * x.shape[2] * x.shape[3]
        slope = grad_var * (2 / count)
        offset = grad_mean / count - mean * slope
        grad = torch.addcmul(offset[:, None, None], x, slope[:, None, None])
        grad_x: Tensor = grad.to(x.dtype)
        return grad_x


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of `x` (N, C, H, W) over N, H and W; differentiable."""
    mean, var = _BatchStatistics.apply(x)
    return mean, var
