"""A D2 block layer by layer: on every device, to every order of differentiation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._layout import dtype_for
from .block_params import ConvParams, D2Params, Norm, NormParams
from .functional import multidilated_conv2d, multidilated_conv2d_with_moments
from .statistics import Statistics, batch_statistics, update_running


def d2_block(
    parts: Sequence[Tensor],
    params: D2Params,
    norm: Norm,
    out_layers: int,
    group: dist.ProcessGroup | None,
    relu: bool = True,
) -> Tensor:
    """The block through one multidilated convolution a layer; arguments as they were checked.

    `parts` are x_0, tensors whose channels follow each other. `group` are the processes that share
    their batch statistics, None for this one alone. For its statistics x_0 is read; a layer's
    output is made together with them.
    """
    if group is not None:  # one all-reduce per source
        parts = [torch.cat(list(parts), 1)]
    growth = params.convs[-1].weight.shape[0]
    psi_of = _PsiPerSource if norm == "per_source" else _PsiPerLayer
    use_batch = [_uses_batch(n, parts[0], group) for n in params.norms]
    psi = psi_of(params.norms, use_batch, dtype_for(parts[0]))
    sources, dilations = list(parts), [1] * len(parts)
    statistics = None
    if psi.measures(0):
        statistics = _join([batch_statistics(part, group) for part in parts])
    for layer in range(1, len(params.convs) + 1):
        scale, shift = psi.next(statistics)
        weight, bias = _layer_params(params.convs[:layer], layer, growth)
        options: Any = {"dilations": dilations, "scale": scale, "shift": shift, "relu": relu}
        if psi.measures(layer):
            made, *moments = multidilated_conv2d_with_moments(sources, weight, bias, **options)
            statistics = batch_statistics(made, group, moments)
        else:
            made, statistics = multidilated_conv2d(sources, weight, bias, **options), None
        sources.append(made)
        dilations.append(1 << layer)
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

    def __init__(
        self, norms: Sequence[NormParams], use_batch: Sequence[bool], dtype: torch.dtype
    ) -> None:
        self._norms = norms
        self._use_batch = use_batch
        self._dtype = dtype
        self._scales: list[Tensor] = []
        self._shifts: list[Tensor] = []

    def measures(self, source: int) -> bool:
        """Whether the batch statistics of this source are used; x_L is none."""
        return any(self._use_batch[source : source + 1])

    def next(self, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
        """Those of the next layer; the statistics are those of its last source, if measured."""
        norm = self._norms[len(self._scales)]
        scale, shift = _scale_and_shift(norm, statistics, self._dtype)
        self._scales.append(scale)
        self._shifts.append(shift)
        return torch.cat(self._scales), torch.cat(self._shifts)


class _PsiPerLayer:
    """scale and shift of one layer after the other, all sources normalised again by each."""

    def __init__(
        self, norms: Sequence[NormParams], use_batch: Sequence[bool], dtype: torch.dtype
    ) -> None:
        self._norms = norms
        self._use_batch = use_batch
        self._dtype = dtype
        self._statistics: list[Statistics] = []
        self._layers = 0

    def measures(self, source: int) -> bool:
        """Whether the batch statistics of this source are used; x_L is none."""
        return any(self._use_batch[source:])

    def next(self, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
        """Those of the next layer; the statistics are those of its last source, if measured."""
        if statistics is not None:
            self._statistics.append(statistics)
        norm, uses_batch = self._norms[self._layers], self._use_batch[self._layers]
        self._layers += 1
        return _scale_and_shift(norm, _join(self._statistics) if uses_batch else None, self._dtype)


def _join(statistics: Sequence[Statistics]) -> Statistics:
    """Those of channels that follow each other."""
    if len(statistics) == 1:
        return statistics[0]
    means, variances, sizes = zip(*statistics, strict=True)
    return Statistics(torch.cat(means), torch.cat(variances), sizes[0])


def _uses_batch(norm: NormParams, x: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Like torch, an empty batch leaves the running statistics alone; in a group it is not all."""
    not_empty = group is not None or x.numel() > 0
    return norm.running_mean is None or (norm.use_batch_statistics and not_empty)


def _scale_and_shift(
    norm: NormParams, statistics: Statistics | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Batch normalisation as one multiplication and one addition per channel."""
    if statistics is None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, var = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    else:
        mean, var, count = statistics
        update_running([norm], [mean.detach()], [var.detach()], count)
    scale = norm.weight * torch.rsqrt(var + norm.eps)
    return scale, norm.bias - mean * scale
