"""A whole D2 block as one function of its input and its parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, block_handle, block_layers, block_node, checks, reference
from ._layout import autocast_dtype_for, channels_last
from .block_params import ConvParams, D2Params, Norm, NormParams, Processes
from .functional import multidilated_conv2d


def d2_block(
    x: Tensor | Sequence[Tensor],
    params: D2Params,
    *,
    norm: Norm = "per_source",
    out_layers: int | None = None,
    process_group: Processes = None,
) -> Tensor:
    """The layers of a D2 block: layer l reads psi(x_0), ..., psi(x_{l-1}) and gives x_l.

    Takahashi & Mitsufuji, CVPR 2021, eq. 2 and 3: the dilation of source i is 2**i. Batch
    statistics of a source are computed once, when it is made. With the compiled CPU kernels the
    block is one node of the autograd graph that keeps x_0, the features and per-channel vectors,
    and its result is in channels_last memory order; elsewhere, where several processes share their
    statistics, and with gradients but less than 8 channels in all its layers, it runs layer by
    layer.

    float32 follows torch's switches, `torch.backends.mkldnn.conv.fp32_precision` or else
    `torch.set_float32_matmul_precision`: "highest" (the default) errs no more than plain torch,
    "high" allows transforms on larger tiles, with two to five times its error, and "medium" also
    products of numbers rounded to bfloat16, where the CPU has them and they are faster. Under
    torch.autocast x is cast, and with the compiled CPU kernels the weights only where such products
    are made.

    Args:
        x: x_0, (N, C_0, H, W) of float32, float64, bfloat16 or float16; or a list of tensors whose
            concatenation it is, which is then never made.
        params: see :class:`D2Params`.
        norm: "per_source" shares one batch normalisation of a source among all its layers (as the
            official release does); "per_layer" has one per layer (eq. 2 read literally).
        out_layers: how many of the last layers to return, 1..L; None for all.
        process_group: whose batches make the batch statistics: None for this process alone, "world"
            for all processes, or a torch.distributed.ProcessGroup. Then every process of it has to
            call, and to go backward; that is one all-reduce per source each way. Results are those
            of one process with the batches of all, which may differ in size and be empty; running
            statistics stay where there are less than two values per channel in all.

    Returns:
        (N, k * out_layers, H, W): the raw x_{L - out_layers + 1}, ..., x_L, concatenated.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or sizes do not fit together.
        RuntimeError: a forced backend cannot serve, torch.distributed is not initialised, or the
            reference backend is asked for the statistics of several processes.
    """
    if process_group is None and not torch.is_grad_enabled():
        again = block_handle.d2_block(x, params, norm, out_layers)
        if again is not None:
            return again
    layers = len(params.convs)
    out_layers = checks.block_options(norm, out_layers, layers)
    batch_statistics = any(n.running_mean is None or n.use_batch_statistics for n in params.norms)
    parts, group = checks.block_input(x, params.convs[0].weight, batch_statistics, process_group)
    forced = backends.forced_for(parts)
    if forced == "reference":
        if group is not None:
            raise RuntimeError(
                "the reference backend takes batch statistics of one process alone; pass "
                "process_group=None, or leave the choice of the backend out"
            )
        return reference.d2_block(parts, params, norm=norm, out_layers=out_layers)
    parts = _as_autocast(parts)
    if group is None and forced in (None, "cpu") and block_node.serves(parts, params, norm):
        if not (batch_statistics or torch.is_grad_enabled()):
            block_handle.leave(parts, params, norm, out_layers)
        return block_node.d2_block(parts, params, norm, out_layers)
    checks.block_params(params, sum(part.shape[1] for part in parts), norm)
    return block_layers.d2_block(parts, _cast(params, parts[0].dtype), norm, out_layers, group)


def norm_conv2d(
    x: Tensor | Sequence[Tensor], conv: ConvParams, norm: NormParams | None, *, relu: bool = True
) -> Tensor:
    """Batch normalisation, ReLU if asked for, and a convolution, on a list of tensors at once.

    The 1x1 convolutions of D3Net (section 4: bottleneck, compression, transition) without the
    concatenation of what they read and without keeping what they normalise. With the compiled CPU
    kernels it is one node of the autograd graph, as :func:`d2_block`; elsewhere plain torch, also
    under `use_backend("cuda")` or "triton", which have no kernel of their own for it.

    Args:
        x: (N, C, H, W) of float32, float64, bfloat16 or float16, or a list of tensors whose
            concatenation it is.
        conv: weight (K, C, kh, kw) with odd sides, and bias (K,) or None.
        norm: of the C channels; None for neither normalisation nor ReLU.
        relu: whether negative values become zero before the convolution.

    Returns:
        (N, K, H, W); "same" zero padding.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or sizes do not fit together.
    """
    batch_statistics = norm is not None and (norm.running_mean is None or norm.use_batch_statistics)
    parts, _ = checks.block_input(x, conv.weight, batch_statistics, None)
    checks.norm_conv(conv.weight, [] if norm is None else [norm.weight, norm.bias])
    may = backends.forced_for(parts) in (None, "cpu")
    if norm is None:
        if may and block_node.serves_parts(parts):
            parts = [channels_last(part) for part in parts]
            ones = [1] * len(parts)
            return multidilated_conv2d(parts, conv.weight, conv.bias, dilations=ones)
    elif may:
        params = D2Params([conv], [norm])
        cast = _as_autocast(parts)
        if block_node.serves(cast, params, "per_source"):
            return block_node.d2_block(cast, params, "per_source", 1, relu)
    return reference.norm_conv2d(parts, conv, norm, relu=relu)


def _as_autocast(parts: list[Tensor]) -> list[Tensor]:
    """What autocast does to x. The node's weights stay as they are: it packs them anyway."""
    dtype = autocast_dtype_for(parts[0])
    return parts if dtype is None else [part.to(dtype) for part in parts]


def _cast(params: D2Params, dtype: torch.dtype) -> D2Params:
    """As autocast does, once and not once per layer: the convolutions, not the norms."""
    convs = [
        conv._replace(
            weight=conv.weight.to(dtype), bias=None if conv.bias is None else conv.bias.to(dtype)
        )
        for conv in params.convs
    ]
    return D2Params(convs, params.norms)
