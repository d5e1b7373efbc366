"""The truth: one layer and the whole D2 block in plain torch, any floating dtype, differentiable.

Takahashi & Mitsufuji, Densely connected multidilated convolutional networks for dense prediction
tasks, CVPR 2021, eq. 2: a layer is the sum over its sources of one dilated convolution each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import Dilations, flat_dilations, split_sources

if TYPE_CHECKING:
    from .block_params import ConvParams, D2Params, Norm, NormParams


def psi(x: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool) -> Tensor:
    """relu(x * scale + shift) per channel, in the dtype of `x`; each step only where asked for."""
    if scale is not None and shift is not None:
        x = (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)
    return x.relu() if relu else x


def multidilated_conv2d(
    inputs: Sequence[Tensor] | Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilations: Dilations | None = None,
    group_channels: Sequence[int] | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Same arguments and result as :func:`d3net_kernels.multidilated_conv2d`."""
    sources = split_sources(inputs, group_channels)
    flat = flat_dilations(dilations, len(sources))
    out, start = None, 0
    for x, dh, dw in zip(sources, flat[::2], flat[1::2], strict=True):
        group = slice(start, start := start + x.shape[1])
        y = psi(
            x,
            None if scale is None else scale[group],
            None if shift is None else shift[group],
            relu,
        )
        part = same_conv2d(y, weight[:, group], None, (dh, dw))
        out = part if out is None else out + part
    assert out is not None
    return out if bias is None else out + bias[:, None, None]


def d2_block(
    x: Tensor | Sequence[Tensor],
    params: D2Params,
    *,
    norm: Norm = "per_source",
    out_layers: int | None = None,
) -> Tensor:
    """Same arguments and result as :func:`d3net_kernels.d2_block`, but for one process alone.

    With norm="per_source" every source is normalised once for all the layers that read it. In the
    faster memory layout no form of plain torch keeps less for backward.
    """
    growth = params.convs[-1].weight.shape[0]
    sources, normalised = [concatenated(x)], list[Tensor]()
    for layer, batch_norm in enumerate(params.norms, start=1):
        if norm == "per_source":
            normalised.append(normalise(sources[-1], batch_norm).relu_())
        else:
            y = normalise(torch.cat(sources, 1), batch_norm).relu_()
            normalised = list(y.split([source.shape[1] for source in sources], 1))
        out = None
        for i, (y, conv) in enumerate(zip(normalised, params.convs, strict=False)):
            slot = slice((layer - 1 - i) * growth, (layer - i) * growth)
            bias = None if conv.bias is None else conv.bias[slot]
            part = same_conv2d(y, conv.weight[slot], bias, (1 << i, 1 << i))
            out = part if out is None else out + part
        assert out is not None
        sources.append(out)
    returned = sources[len(sources) - (out_layers or len(params.norms)) :]
    return torch.cat(returned, 1) if len(returned) > 1 else returned[0]


def norm_conv2d(
    x: Tensor | Sequence[Tensor], conv: ConvParams, norm: NormParams | None, *, relu: bool = True
) -> Tensor:
    """Same arguments and result as :func:`d3net_kernels.norm_conv2d`."""
    y = concatenated(x)
    if norm is not None:
        y = normalise(y, norm)
        y = y.relu_() if relu else y
    return same_conv2d(y, conv.weight, conv.bias, (1, 1))


def concatenated(x: Tensor | Sequence[Tensor]) -> Tensor:
    """The tensor that a list holds the parts of."""
    if isinstance(x, Tensor):
        return x
    return torch.cat(list(x), 1) if len(x) > 1 else x[0]


def normalise(x: Tensor, norm: NormParams) -> Tensor:
    """Batch normalisation without the ReLU; updates the running statistics as torch does."""
    return F.batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        training=norm.use_batch_statistics or norm.running_mean is None,
        momentum=float(norm.momentum),
        eps=norm.eps,
    )


def same_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int]
) -> Tensor:
    """A convolution of odd size with "same" zero padding, of empty maps too."""
    height, width = x.shape[2:]
    empty = height == 0 or width == 0
    if empty:  # F.conv2d refuses them: lend one row and one column
        x = F.pad(x, (0, 1, 0, 1))
    padding = (dilation[0] * (weight.shape[2] // 2), dilation[1] * (weight.shape[3] // 2))
    out = F.conv2d(x, weight, bias, padding=padding, dilation=dilation)
    return out[..., :height, :width] if empty else out
