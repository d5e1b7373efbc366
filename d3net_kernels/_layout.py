"""Memory layout and dtype of results, the rules that all kernels and checks share.

Strides are spelled out instead of using torch.channels_last, which is ambiguous where C or H*W is
1 and would let a fake tensor and a real one disagree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(t: Tensor) -> bool:
    """Whether the channels of `t` (N, C, H, W) are adjacent in memory and order matters."""
    _, channels, height, width = t.shape
    return bool(t.stride(1) == 1 and channels > 1 and height * width > 1)


def channels_last(t: Tensor) -> Tensor:
    """`t`, or a copy of it whose channels are adjacent."""
    return t if is_channels_last(t) else t.contiguous(memory_format=torch.channels_last)


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A dense tensor of `shape` (N, C, H, W) with dtype, device and channel order of `like`."""
    n, c, h, w = shape
    strides = (c * h * w, 1, w * c, c) if is_channels_last(like) else (c * h * w, h * w, w, 1)
    return torch.empty_strided((n, c, h, w), strides, dtype=like.dtype, device=like.device)


def empty_channels_last(shape: Sequence[int], like: Tensor) -> Tensor:
    """A dense tensor of `shape` (N, C, H, W) whose channels are adjacent."""
    n, c, h, w = shape
    strides = (c * h * w, 1, w * c, c)
    return torch.empty_strided((n, c, h, w), strides, dtype=like.dtype, device=like.device)


def empty_gradients(inputs: Sequence[Tensor], wanted: Sequence[int]) -> list[Tensor]:
    """Memory for the gradients of the sources that are wanted; without elements for the others."""
    return [
        empty(x.shape, x) if is_wanted else x.new_empty(0)
        for x, is_wanted in zip(inputs, wanted, strict=True)
    ]


def zero_weight_gradients(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias where the output has no element."""
    return weight.new_zeros(weight.shape), weight.new_zeros(weight.shape[0])


def hidden_pitch(growth: int, layers: int, out_layers: int) -> int:
    """Channels of a pixel of the features that a D2 block keeps and does not return.

    As csrc/d2_block.h has it: x_1 .. x_L lie in a row that ends on a multiple of 16 channels.
    """
    if out_layers == layers:
        return 0
    row = -(-growth * layers // 16) * 16
    return -(-(row - growth * out_layers) // 16) * 16


def dtype_for(x: Tensor) -> torch.dtype:
    """Statistics, scale and shift are float32, or float64 next to float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_dtype_for(x: Tensor) -> torch.dtype | None:
    """What torch.autocast makes of `x`; None where it is off, unknown to the device, or float64."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
