"""A whole D2 block as one function of its input and its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import backends, checks, reference
from ._layout import autocast_dtype_for, dtype_for
from .functional import multidilated_conv2d
from .statistics import batch_statistics

Norm: TypeAlias = Literal["per_source", "per_layer"]


class ConvParams(NamedTuple):
    """The convolution of one source for all the layers that read it.

    weight (k * (L - i), C_i, 3, 3) and bias (k * (L - i),) or None: one slot of k output channels
    per layer i+1..L, in this order.
    """

    weight: Tensor
    bias: Tensor | None


class NormParams(NamedTuple):
    """One batch normalisation; the running statistics are updated in place from batch statistics.

    `momentum` is the share of the new batch: a number, or a tensor of no dimensions.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    use_batch_statistics: bool
    momentum: float | Tensor
    eps: float


class D2Params(NamedTuple):
    """All parameters of a D2 block: convs[i] of source i, and the norms.

    norm="per_source": norms[i] has the C_i channels of source i.
    norm="per_layer": norms[l] has the C_0 + l k channels that layer l + 1 reads.
    """

    convs: Sequence[ConvParams]
    norms: Sequence[NormParams]


def d2_block(
    x: Tensor, params: D2Params, *, norm: Norm = "per_source", out_layers: int | None = None
) -> Tensor:
    """The layers of a D2 block: layer l reads psi(x_0), ..., psi(x_{l-1}) and gives x_l.

    Takahashi & Mitsufuji, CVPR 2021, eq. 2 and 3: the dilation of source i is 2**i. Batch
    statistics of a source are computed once, when it is made. What autograd keeps are the raw
    sources and per-channel vectors, besides one copy of the weights.

    Args:
        x: x_0, (N, C_0, H, W) of float32, float64, bfloat16 or float16.
        params: see :class:`D2Params`.
        norm: "per_source" shares one batch normalisation of a source among all its layers (as the
            official release does); "per_layer" has one per layer (eq. 2 read literally).
        out_layers: how many of the last layers to return, 1..L; None for all.

    Returns:
        (N, k * out_layers, H, W): the raw x_{L - out_layers + 1}, ..., x_L, concatenated.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or sizes do not fit together.
    """
    layers = len(params.convs)
    growth = params.convs[-1].weight.shape[0]
    out_layers = checks.block_options(norm, out_layers, layers)
    batch_statistics = any(n.running_mean is None or n.use_batch_statistics for n in params.norms)
    checks.block_input(x, params.convs[0].weight, batch_statistics)
    if backends.reference_is_forced([x]):
        return reference.d2_block(x, params, norm=norm, out_layers=out_layers)
    autocast = autocast_dtype_for(x)
    if autocast is not None:
        x = x.to(autocast)  # once, and not once per layer
    psi = _PsiPerSource(params.norms) if norm == "per_source" else _PsiPerLayer(params.norms)
    sources = [x]
    for layer in range(1, layers + 1):
        scale, shift = psi.next(sources[-1])
        weight, bias = _layer_params(params.convs[:layer], layer, growth)
        sources.append(
            multidilated_conv2d(sources, weight, bias, scale=scale, shift=shift, relu=True)
        )
    return sources[-1] if out_layers == 1 else torch.cat(sources[-out_layers:], 1)


def _layer_params(
    convs: Sequence[ConvParams], layer: int, growth: int
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one layer from its slot in each of its sources."""
    weights, biases = [], []
    for i, conv in enumerate(convs):
        slot = (layer - 1 - i) * growth
        weights.append(conv.weight.narrow(0, slot, growth))
        if conv.bias is not None:
            biases.append(conv.bias.narrow(0, slot, growth))
    return torch.cat(weights, 1), torch.stack(biases).sum(0) if biases else None


class _PsiPerSource:
    """scale and shift of one layer after the other, each source normalised once."""

    def __init__(self, norms: Sequence[NormParams]) -> None:
        self._norms = norms
        self._scales: list[Tensor] = []
        self._shifts: list[Tensor] = []

    def next(self, newest: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the next layer, whose last source is `newest`."""
        norm = self._norms[len(self._scales)]
        statistics = batch_statistics(newest) if _uses_batch(norm, newest) else None
        scale, shift = _scale_and_shift(norm, statistics, newest)
        self._scales.append(scale)
        self._shifts.append(shift)
        return torch.cat(self._scales), torch.cat(self._shifts)


class _PsiPerLayer:
    """scale and shift of one layer after the other, all sources normalised again by each."""

    def __init__(self, norms: Sequence[NormParams]) -> None:
        self._norms = norms
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._layers = 0

    def next(self, newest: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the next layer, whose last source is `newest`."""
        norm = self._norms[self._layers]
        if any(_uses_batch(later, newest) for later in self._norms[self._layers :]):
            self._statistics.append(batch_statistics(newest))
        self._layers += 1
        if not _uses_batch(norm, newest):
            return _scale_and_shift(norm, None, newest)
        means, variances = zip(*self._statistics, strict=True)
        return _scale_and_shift(norm, (torch.cat(means), torch.cat(variances)), newest)


def _uses_batch(norm: NormParams, x: Tensor) -> bool:
    """Like torch, an empty batch leaves the running statistics alone."""
    return norm.running_mean is None or (norm.use_batch_statistics and x.numel() > 0)


def _scale_and_shift(
    norm: NormParams, statistics: tuple[Tensor, Tensor] | None, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Batch normalisation as one multiplication and one addition per channel."""
    if statistics is None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, var = norm.running_mean.to(dtype_for(x)), norm.running_var.to(dtype_for(x))
    else:
        mean, var = statistics
        _update_running(norm, mean.detach(), var.detach(), x.numel() // x.shape[1])
    scale = norm.weight * torch.rsqrt(var + norm.eps)
    return scale, norm.bias - mean * scale


def _update_running(norm: NormParams, mean: Tensor, var: Tensor, count: int) -> None:
    """As torch.nn.BatchNorm2d: the running variance takes the unbiased one."""
    if norm.running_mean is None or norm.running_var is None:
        return
    with torch.no_grad():
        keep = 1 - norm.momentum
        norm.running_mean.mul_(keep).add_(norm.momentum * mean)
        norm.running_var.mul_(keep).add_(norm.momentum * (var * (count / (count - 1))))
