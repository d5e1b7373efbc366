"""The operations as functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import backends, checks, ops, reference
from .backends import composite
from .precision import allowed_precision


def multidilated_conv2d(
    inputs: Sequence[Tensor] | Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilations: checks.Dilations | None = None,
    group_channels: Sequence[int] | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    r"""Sum over the sources of one dilated convolution each, with BN affine and ReLU on load.

    .. math:: out = bias + \sum_i conv(psi(x_i), weight_i, dilation=d_i), \quad
              psi(x) = relu(x \cdot scale + shift)

    Stride 1 and "same" padding: zeros are padded after psi, also where shift > 0.
    Takahashi & Mitsufuji, CVPR 2021, eq. 2.

    Args:
        inputs: one tensor (N, C_i, H, W) per source, any strides; or one tensor
            (N, sum C_i, H, W) together with `group_channels`.
        weight: (K, sum C_i, kh, kw), kh and kw odd; the groups in the order of the sources.
        bias: (K,) or None.
        dilations: a list with one int or (dh, dw) per source; None for 2**i.
        group_channels: C_0, C_1, ... where `inputs` is one tensor; it is not copied.
        scale: (sum C_i,), the factor of psi; goes together with `shift`.
        shift: (sum C_i,), the summand of psi.
        relu: whether psi ends in a ReLU (also without scale and shift). NaN passes through it.

    Returns:
        (N, K, H, W), in channels_last memory order where inputs[0] is, else contiguous.

    inputs, weight and bias share one dtype of float32, float64, bfloat16, float16 (under autocast
    they are made to); scale and shift have that dtype or float32. bfloat16 and float16 accumulate
    in float32. On GPUs, float32 is rounded to TF32 for products where torch's own convolutions may
    (`torch.backends.cudnn.conv.fp32_precision` is "tf32", the default) and tensor cores serve: by
    the CUDA kernels with 3x3 kernels. On the CPU, 3x3 kernels on float32 in channels_last follow
    torch's switches as :func:`d3net_kernels.d2_block` does. A backward pass goes by what held in
    the forward pass.

    Raises:
        TypeError: an argument or its dtype is of the wrong kind.
        ValueError: sizes, devices or dilations do not fit together.
        RuntimeError: a forced backend cannot serve these tensors.
    """
    out: Tensor = _served(
        False, inputs, weight, bias, dilations, group_channels, scale, shift, relu
    )
    return out


def multidilated_conv2d_with_moments(
    inputs: Sequence[Tensor] | Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilations: checks.Dilations | None = None,
    group_channels: Sequence[int] | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result of :func:`multidilated_conv2d`, and mean and variance of its channels.

    The GPU kernels measure them in the launch that makes the result, which is then not read again;
    elsewhere they are measured afterwards.

    Args:
        inputs, weight, bias, dilations, group_channels, scale, shift, relu: as there.

    Returns:
        out: (N, K, H, W), as there.
        mean, var: (K,), mean and biased variance of `out`, as it is rounded, over N, H and W;
            float64 if it is, else float32; NaN if it is empty. Differentiable.

    Raises:
        TypeError, ValueError, RuntimeError: as there.
    """
    out, mean, var = _served(
        True, inputs, weight, bias, dilations, group_channels, scale, shift, relu
    )
    return out, mean, var


def _served(
    with_moments: bool,
    inputs: Sequence[Tensor] | Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilations: checks.Dilations | None,
    group_channels: Sequence[int] | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> Any:
    sources, flat = checks.problem(
        inputs, weight, bias, dilations, group_channels, scale, shift, relu
    )
    forced = backends.forced_for(sources)
    if forced == "reference":
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        out = reference.multidilated_conv2d(
            sources, weight, bias, dilations=pairs, scale=scale, shift=shift, relu=relu
        )
        return (out, *composite.channel_moments(out)) if with_moments else out
    operators = ops.TRITON if forced == "triton" else ops.DEFAULT
    op = operators.with_moments if with_moments else operators.multidilated_conv2d
    precision = allowed_precision(sources[0].device.type)
    return op(sources, weight, bias, flat, scale, shift, relu, precision)
