"""The truth: the multidilated convolution in plain torch, any floating dtype, differentiable.

Takahashi & Mitsufuji, Densely connected multidilated convolutional networks for dense prediction
tasks, CVPR 2021, eq. 2: the layer is the sum over its sources of one dilated convolution each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .checks import Dilations, flat_dilations, split_sources


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
    height, width = sources[0].shape[2:]
    kernel_h, kernel_w = weight.shape[2:]
    out, start = None, 0
    for x, dh, dw in zip(sources, flat[::2], flat[1::2], strict=True):
        group = slice(start, start := start + x.shape[1])
        y = psi(
            x,
            None if scale is None else scale[group],
            None if shift is None else shift[group],
            relu,
        )
        if height == 0 or width == 0:  # F.conv2d refuses empty maps: lend one row and one column
            y = F.pad(y, (0, 1, 0, 1))
        padding = (dh * (kernel_h // 2), dw * (kernel_w // 2))
        part = F.conv2d(y, weight[:, group], padding=padding, dilation=(dh, dw))
        out = part if out is None else out + part
    assert out is not None
    if bias is not None:
        out = out + bias[:, None, None]
    return out[..., :height, :width] if height == 0 or width == 0 else out
