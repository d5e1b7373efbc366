"""A D2 block layer by layer: on every device, to every order of differentiation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._layout import dtype_for
from .block_params import ConvParams, D2Params, Norm, NormParams
from .functional import multidilated_conv2d
from .statistics import batch_statistics


def d2_block(x: Tensor, params: D2Params, norm: Norm, out_layers: int) -> Tensor:
    """The block through one multidilated convolution a layer; arguments as they were checked."""
    growth = params.convs[-1].weight.shape[0]
    psi = _PsiPerSource(params.norms) if norm == "per_source" else _PsiPerLayer(params.norms)
    sources = [x]
    for layer in range(1, len(params.convs) + 1):
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
        update_running(norm, mean.detach(), var.detach(), x.numel() // x.shape[1])
    scale = norm.weight * torch.rsqrt(var + norm.eps)
    return scale, norm.bias - mean * scale


def update_running(norm: NormParams, mean: Tensor, var: Tensor, count: int) -> None:
    """As torch.nn.BatchNorm2d: the running variance takes the unbiased one."""
    if norm.running_mean is None or norm.running_var is None:
        return
    with torch.no_grad():
        keep = 1 - norm.momentum
        norm.running_mean.mul_(keep).add_(norm.momentum * mean)
        norm.running_var.mul_(keep).add_(norm.momentum * (var * (count / (count - 1))))
