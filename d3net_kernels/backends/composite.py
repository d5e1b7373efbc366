"""The operators in plain torch: every device, every dtype; serves where no compiled kernel does.

Like the compiled kernels these keep nothing: psi is evaluated again in the backward pass. The
precision of float32 is up to torch, which reads its own switches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .. import _binary, _layout, reference
from . import cuda


def why_not(tensors: Sequence[Tensor]) -> str | None:
    """Always available."""
    return None


class _Group(NamedTuple):
    """What belongs to one source."""

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    dilation: tuple[int, int]
    padding: tuple[int, int]


def _groups(
    inputs: Sequence[Tensor],
    weight: Tensor,
    dilations: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
) -> Iterator[_Group]:
    kernel_h, kernel_w = weight.shape[2:]
    start = 0
    for i, x in enumerate(inputs):
        channels = slice(start, start := start + x.shape[1])
        dh, dw = dilations[2 * i : 2 * i + 2]
        yield _Group(
            x,
            weight[:, channels],
            None if scale is None else scale[channels],
            None if shift is None else shift[channels],
            (dh, dw),
            (dh * (kernel_h // 2), dw * (kernel_w // 2)),
        )


def forward(
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    dilations: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    precision: int,
) -> Tensor:
    """Kernel of d3net_kernels::multidilated_conv2d."""
    _say_that_this_serves(inputs[0].device.type)
    pairs = list(zip(dilations[::2], dilations[1::2], strict=True))
    result = reference.multidilated_conv2d(
        inputs, weight, bias, dilations=pairs, scale=scale, shift=shift, relu=relu
    )
    return _layout.empty(result.shape, inputs[0]).copy_(result)


def backward_data(
    grad_output: Tensor,
    inputs: Sequence[Tensor],
    weight: Tensor,
    dilations: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    precision: int,
    wanted: Sequence[int],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Kernel of d3net_kernels::multidilated_conv2d_backward_data."""
    grad_inputs = _layout.empty_gradients(inputs, wanted)
    grad_scales, grad_shifts = [], []
    groups = _groups(inputs, weight, dilations, scale, shift)
    for group, grad_input, is_wanted in zip(groups, grad_inputs, wanted, strict=True):
        if not is_wanted and group.scale is None:
            continue
        x, grad = group.x, _grad_of_psi(group, grad_output)
        if relu:
            y = reference.psi(x, group.scale, group.shift, False)
            grad = grad.masked_fill(y <= 0, 0)
        if group.scale is not None:
            grad_scales.append((grad * x).sum((0, 2, 3)).to(group.scale.dtype))
            grad_shifts.append(grad.sum((0, 2, 3)).to(group.scale.dtype))
            grad = grad * group.scale[:, None, None]
        if is_wanted:
            grad_input.copy_(grad)
    if scale is None:
        return grad_inputs, weight.new_empty(0), weight.new_empty(0)
    return grad_inputs, torch.cat(grad_scales), torch.cat(grad_shifts)


def backward_weight(
    grad_output: Tensor,
    inputs: Sequence[Tensor],
    weight: Tensor,
    dilations: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    precision: int,
) -> tuple[Tensor, Tensor]:
    """Kernel of d3net_kernels::multidilated_conv2d_backward_weight."""
    if grad_output.numel() == 0:
        return _layout.zero_weight_gradients(weight)
    grads = [
        conv2d_weight(
            reference.psi(group.x, group.scale, group.shift, relu),
            group.weight.shape,
            grad_output,
            padding=group.padding,
            dilation=group.dilation,
        )
        for group in _groups(inputs, weight, dilations, scale, shift)
    ]
    return torch.cat(grads, 1).contiguous(), grad_output.sum((0, 2, 3))


def forward_with_moments(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of d3net_kernels::multidilated_conv2d_with_moments: two kernels of the device."""
    operators = torch.ops.d3net_kernels
    out: Tensor = operators.multidilated_conv2d(*arguments)
    return out, *operators.channel_moments(out)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel of d3net_kernels::channel_moments."""
    var, mean = torch.var_mean(x.to(_layout.dtype_for(x)), (0, 2, 3), correction=0)
    return mean, var


def _grad_of_psi(group: _Group, grad_output: Tensor) -> Tensor:
    """Gradient with respect to what enters the convolution: psi(x), or x itself without psi."""
    if grad_output.numel() == 0:
        return torch.zeros_like(group.x)
    # Not rounded to 16 bits before the sums over N, H and W that scale and shift take of it.
    dtype = group.x.dtype if group.scale is None else _layout.dtype_for(group.x)
    grad: Tensor = conv2d_input(
        group.x.shape,
        group.weight.to(dtype),
        grad_output.to(dtype),
        padding=group.padding,
        dilation=group.dilation,
    )
    return grad


def _say_that_this_serves(device: str) -> None:
    if device == "cpu" and _binary.missing is not None:
        _binary.warn_once(_binary.missing)
    elif device == "cuda":
        _binary.warn_once(cuda.why_not(()) or "the CUDA kernels do not serve these tensors")
    elif device != "cpu":
        _binary.warn_once(f"this release has no compiled kernels for {device} tensors")
