"""Mean and variance of a source over a batch, computed once for all the layers that read it.

The batch is that of this process, or that of all processes of a group: then each way, forward and
backward, is one all-reduce of float64 numbers a channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from ._layout import dtype_for
from .block_params import NormParams


class Statistics(NamedTuple):
    """Mean and biased variance (C,) of a source over N, H and W, and of how many values.

    `size` is a number, or for a group of processes a tensor of no dimensions.
    """

    mean: Tensor
    var: Tensor
    size: int | Tensor


def update_running(
    norms: Sequence[NormParams],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    count: int | Tensor,
) -> None:
    """As torch.nn.BatchNorm2d, of several norms: the running variance takes the unbiased one.

    Args:
        norms: those without running statistics are left out.
        means, variances: of the batch, (C,) for each norm, the variances biased.
        count: of how many values; a tensor of no dimensions for a group of processes.
    """
    running: list[Tensor] = []
    batch: list[Tensor] = []
    momenta: list[Any] = []
    for n, mean, var in zip(norms, means, variances, strict=True):
        if n.running_mean is not None and n.running_var is not None:
            running += n.running_mean, n.running_var
            batch += mean, var
            momenta.append(n.momentum)
    if not running:
        return
    with torch.no_grad():
        if isinstance(count, Tensor):  # without a branch, for which a GPU would have to be awaited
            some = (count > 1).to(count.dtype)
            momenta = [m * some for m in momenta]
            count = count.clamp(min=2)
        unbiased = count / (count - 1)
        kept = [1 - m for m in momenta for _ in range(2)]
        shares = [share for m in momenta for share in (m, m * unbiased)]
        mapped = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        if not mapped and not any(isinstance(share, Tensor) for share in shares):
            # A call for all: one each costs as much as the kernels themselves on small maps.
            torch._foreach_mul_(running, kept)
            torch._foreach_add_(running, torch._foreach_mul(batch, shares))
        else:
            for r, b, keep, share in zip(running, batch, kept, shares, strict=True):
                r.mul_(keep).add_(b * share)


def batch_statistics(
    x: Tensor,
    group: dist.ProcessGroup | None = None,
    moments: Sequence[Tensor] | None = None,
) -> Statistics:
    """The statistics of `x` (N, C, H, W), differentiable; with a group of all its processes' x.

    `moments` are mean and variance of this process's x, differentiable, if it was made with them;
    then it is not read for them.

    Processes may have batches and maps of different sizes, and empty ones. Where all are empty,
    mean and variance are 0.
    """
    if group is None:
        mean, var = _BatchStatistics.apply(x) if moments is None else moments
        return Statistics(mean, var, x.numel() // x.shape[1])
    own = None if moments is None else tuple(t.detach() for t in moments)
    return Statistics(*_GroupStatistics.apply(x, own, group))


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
        x, mean = ctx.saved_tensors
        count = x.shape[0] * x.shape[2] * x.shape[3]
        return gradient_of_moments(x, mean, count, grad_mean, grad_var)


class _GroupStatistics(torch.autograd.Function):
    """Every process has its x, and all have the same mean, variance and count.

    All their losses depend on those, so that the gradients with respect to them add up.
    `own` are the moments of x, if known: part of what x gives, no arguments beside it.
    """

    @staticmethod
    def forward(
        x: Tensor, own: tuple[Tensor, ...] | None, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _combined_moments(x, own, group)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        x, _, ctx.group = inputs
        mean, _, count = output
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(x, mean, count)

    @staticmethod
    def backward(
        ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: Tensor
    ) -> tuple[Tensor, None, None]:
        x, mean, count = ctx.saved_tensors
        both = _Sum.apply(torch.stack([grad_mean, grad_var]).double(), ctx.group)
        grad_mean, grad_var = both.to(mean.dtype)
        return gradient_of_moments(x, mean, count, grad_mean, grad_var), None, None


class _Sum(torch.autograd.Function):
    """The sum over the processes of a group, given to all of them; to every order."""

    @staticmethod
    def forward(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, dist.ProcessGroup], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None


def _combined_moments(
    x: Tensor, own: tuple[Tensor, ...] | None, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count over all processes, the same bits in each.

    Sums of squares would cancel where the mean is large, so variances are combined by the distances
    of the means (Chan, Golub & LeVeque, The American Statistician 37, 1983). Each process fills its
    row of a table of zeros, which makes the sum over the processes exact in any order.
    """
    channels = x.shape[1]
    table = x.new_zeros((dist.get_world_size(group), 1 + 2 * channels), dtype=torch.float64)
    if x.numel() > 0:  # an empty batch has no moments
        row = table[dist.get_rank(group)]
        row[0] = x.numel() // channels
        row[1:] = torch.cat(ops.channel_moments(x) if own is None else own)
    dist.all_reduce(table, group=group)
    counts, means, variances = table.split([1, channels, channels], 1)
    count = counts.sum()
    share = counts / count.clamp(min=1)
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    kept = dtype_for(x)
    return mean.to(kept), var.to(kept), count


def gradient_of_moments(
    x: Tensor, mean: Tensor, count: int | Tensor, grad_mean: Tensor, grad_var: Tensor
) -> Tensor:
    """Of x: grad_mean / n + grad_var * 2 (x - mean) / n, n = `count`, in one pass over x."""
    count = count if isinstance(count, Tensor) else max(count, 1)
    slope = grad_var * (2 / count)
    offset = grad_mean / count - mean * slope
    grad = torch.addcmul(offset[:, None, None], x, slope[:, None, None])
    return grad.to(x.dtype)
