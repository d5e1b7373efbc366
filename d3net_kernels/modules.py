"""The operations as modules; their state_dict does not depend on the backend."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, reference
from .block import d2_block, norm_conv2d
from .block_params import ConvParams, D2Params, Norm, NormParams, Processes
from .functional import multidilated_conv2d


class MultidilatedConv2d(nn.Module):
    """A convolution over several sources, each with its own dilation, summed up.

    Takahashi & Mitsufuji, CVPR 2021, eq. 2 without psi; "same" zero padding, stride 1.

    Args:
        in_channels: [C_0, C_1, ...], one per source.
        out_channels: K.
        kernel_size: odd, an int or (kh, kw).
        dilations: a list with one int or (dh, dw) per source; None for 2**i.
        bias: whether there is a bias.

    Parameters: weight (K, sum C_i, kh, kw) and bias (K,), initialised as those of nn.Conv2d.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        dilations: checks.Dilations | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = checks.positive_ints("in_channels", in_channels)
        self.out_channels = checks.positive_int("out_channels", out_channels)
        self.kernel_size = checks.kernel_size(kernel_size)
        flat = checks.flat_dilations(dilations, len(self.in_channels))
        self.dilations = list(zip(flat[::2], flat[1::2], strict=True))
        shape = (out_channels, sum(self.in_channels), *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as nn.Conv2d does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, inputs: Sequence[Tensor] | Tensor) -> Tensor:
        """The sources as a list of (N, C_i, H, W) or concatenated; returns (N, K, H, W).

        Raises:
            TypeError, ValueError: a source is of the wrong kind or has other channels than C_i.
        """
        checks.sources_match(inputs, self.in_channels)
        return multidilated_conv2d(
            inputs,
            self.weight,
            self.bias,
            dilations=self.dilations,
            group_channels=self.in_channels if isinstance(inputs, Tensor) else None,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"dilations={self.dilations}, bias={self.bias is not None}"
        )


class D2Block(nn.Module):
    """A multidilated dense block: every layer reads all earlier ones, source i with dilation 2**i.

    Takahashi & Mitsufuji, CVPR 2021, eq. 2 and 3; x_0 is the input and x_l, l = 1..L, has k
    channels. See :func:`d3net_kernels.d2_block` for what is computed and kept.

    Args:
        in_channels: C_0.
        growth_rate: k.
        num_layers: L.
        out_layers: how many of the last layers to return, 1..L; None for all.
        norm: "per_source" (one batch normalisation of a source, shared by its layers, as in the
            official release) or "per_layer" (eq. 2 read literally).
        bias, eps, momentum: as in nn.Conv2d and nn.BatchNorm2d.
        process_group: whose batches make the batch statistics of training, as in
            :func:`d3net_kernels.d2_block`: None for this process alone, "world", or a
            torch.distributed.ProcessGroup. An attribute like any other, which may be set later. A
            ProcessGroup cannot be pickled or deep-copied, and a block that holds one neither; with
            None and "world" it can. What state_dict saves does not depend on it.

    `convs[i]` (k (L - i) output channels: a slot for each layer that reads source i) and `norms[i]`
    hold the parameters in the order of the official weights; they are never called themselves, so
    hooks on them do not run. A norm in eval mode or without gradients is frozen also while the
    block trains.
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        num_layers: int,
        *,
        out_layers: int | None = None,
        norm: Norm = "per_source",
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        process_group: Processes = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = checks.positive_int("in_channels", in_channels)
        self.growth_rate = checks.positive_int("growth_rate", growth_rate)
        self.num_layers = checks.positive_int("num_layers", num_layers)
        self.out_layers = checks.block_options(norm, out_layers, num_layers)
        self.norm = norm
        self.process_group = checks.process_group(process_group)
        self._recent = _RecentParams()
        self.norms = nn.ModuleList()
        self.convs = nn.ModuleList()
        for i in range(num_layers):
            channels = in_channels if i == 0 else growth_rate
            read = in_channels + i * growth_rate if norm == "per_layer" else channels
            self.norms.append(
                nn.BatchNorm2d(read, eps=eps, momentum=momentum, device=device, dtype=dtype)
            )
            self.convs.append(
                nn.Conv2d(
                    channels,
                    growth_rate * (num_layers - i),
                    3,
                    padding=1 << i,
                    dilation=1 << i,
                    bias=bias,
                    device=device,
                    dtype=dtype,
                )
            )

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """x_0 (N, C_0, H, W), or a list of its parts, to (N, k * out_layers, H, W), raw outputs."""
        params = self._params()
        if any(norm.use_batch_statistics for norm in params.norms):
            # Before the norms count the batch.
            checks.block_input(x, params.convs[0].weight, True, self.process_group)
            norms = [_counted(*pair) for pair in zip(self.norms, params.norms, strict=True)]
            params = D2Params(params.convs, norms)
        return d2_block(
            x,
            params,
            norm=self.norm,
            out_layers=self.out_layers,
            process_group=self.process_group,
        )

    def _params(self) -> D2Params:
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() or compiling or torch._C._are_functorch_transforms_active():
            return _params_of(self.convs, self.norms)
        return self._recent.params_of(self.convs, self.norms)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self._recent.forget()  # torch may want to exchange tensors, which nobody else may hold then
        return super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        shared = "" if self.process_group is None else f", process_group={self.process_group!r}"
        return (
            f"{self.in_channels}, growth_rate={self.growth_rate}, num_layers={self.num_layers}, "
            f"out_layers={self.out_layers}, norm={self.norm!r}{shared}"
        )


class NormConv2d(nn.Module):
    """Batch normalisation, a ReLU, then a convolution, on one tensor or on a list of them.

    The list is read as if concatenated, without a copy: the 1x1 convolutions of D3Net (Takahashi &
    Mitsufuji, CVPR 2021, section 4). See :func:`d3net_kernels.norm_conv2d`.

    Args:
        in_channels: C, of all tensors of the list together.
        out_channels: K.
        kernel_size: odd, an int or (kh, kw).
        relu: whether there is a ReLU.
        bias, eps, momentum: as in nn.Conv2d and nn.BatchNorm2d.

    `norm` and `conv` hold the parameters; they are never called themselves, so hooks on them do not
    run. Only where `norm` was replaced by another kind, nn.SyncBatchNorm say, both are, in plain
    torch. A norm in eval mode is frozen also while the rest trains.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        *,
        relu: bool = True,
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_channels = checks.positive_int("in_channels", in_channels)
        out_channels = checks.positive_int("out_channels", out_channels)
        kernel = checks.kernel_size(kernel_size)
        self.relu = relu
        self.norm = nn.BatchNorm2d(
            in_channels, eps=eps, momentum=momentum, device=device, dtype=dtype
        )
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            padding=(kernel[0] // 2, kernel[1] // 2),
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """(N, C, H, W), or a list of its parts, to (N, K, H, W).

        Raises:
            TypeError, ValueError: x is of the wrong kind or has other channels than C, or `conv`
                has got a stride, a dilation or another padding.
        """
        return norm_then_conv(x, self.norm, self.conv, relu=self.relu)

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


def norm_then_conv(
    x: Tensor | Sequence[Tensor], norm: nn.Module, conv: nn.Conv2d, *, relu: bool = True
) -> Tensor:
    """:class:`NormConv2d` of modules that stand apart; arguments and errors are those of its call.

    `conv` has stride 1, "same" padding and one group.
    """
    if type(norm) is not nn.BatchNorm2d:
        y = norm(reference.concatenated(x))
        out: Tensor = conv(y.relu() if relu else y)
        return out
    checks.unchanged_convolution(conv)
    conv_params, norm_params = _conv_params(conv), _norm_params(norm)
    if norm_params.use_batch_statistics:
        # Before the norm counts the batch.
        checks.block_input(x, conv_params.weight, True, None)
        norm_params = _counted(norm, norm_params)
    return norm_conv2d(x, conv_params, norm_params, relu=relu)


class _RecentParams:
    """The parameters of a block as one object for as long as its modules hold the same ones, so
    that calls without gradients can build on each other. A copy of the block begins without.
    """

    def __init__(self) -> None:
        self._last: tuple[list[Any], D2Params] | None = None

    def __reduce__(self) -> Any:
        return _RecentParams, ()

    def forget(self) -> None:
        self._last = None

    def params_of(self, convs: nn.ModuleList, norms: nn.ModuleList) -> D2Params:
        """What `_params_of` gives, or gave last time."""
        held = self._held_by(convs, norms)
        last = self._last
        if held and last and len(held) == len(last[0]) and all(map(operator.is_, held, last[0])):
            return last[1]
        params = _params_of(convs, norms)
        keeps_graph = any(isinstance(t, Tensor) and not t.is_leaf for t in held)
        self._last = (held, params) if held and not keeps_graph else None
        return params

    @staticmethod
    def _held_by(convs: nn.ModuleList, norms: nn.ModuleList) -> list[Any]:
        """All that the parameters are made of; nothing where it is made anew at each access."""
        held: list[Any] = []
        try:
            conv: Any
            for conv in convs:
                own = conv._parameters
                held += own["weight"], own["bias"]
                held += conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
            for norm in norms:
                own, buffers = norm._parameters, norm._buffers
                held += own["weight"], own["bias"], buffers["running_mean"], buffers["running_var"]
                held += type(norm), norm.training, norm.momentum, norm.eps
        except (KeyError, AttributeError):
            return []
        return held


def _params_of(convs: nn.ModuleList, norms: nn.ModuleList) -> D2Params:
    for i, conv in enumerate(convs):
        checks.unchanged_convolution(conv, 1 << i)
    return D2Params([_conv_params(conv) for conv in convs], [_norm_params(norm) for norm in norms])


def _conv_params(conv: nn.Module) -> ConvParams:
    return ConvParams(*_weight_and_bias(conv))


def _weight_and_bias(module: nn.Module) -> tuple[Any, Any]:
    own = module._parameters  # three times faster than attributes
    try:
        return own["weight"], own["bias"]
    except KeyError:  # made from something else at each access
        return module.weight, module.bias


def _norm_params(norm: nn.Module) -> NormParams:
    """What nn.BatchNorm2d would do with its next batch, if it need not be counted."""
    if not isinstance(norm, nn.BatchNorm2d):
        raise TypeError(
            f"a norm of this D2Block is of type {type(norm).__name__}; accepted is nn.BatchNorm2d "
            "(do not convert to SyncBatchNorm, set the block's process_group)"
        )
    weight, bias = _weight_and_bias(norm)
    buffers = norm._buffers
    running_mean = buffers["running_mean"]
    return NormParams(
        weight,
        bias,
        running_mean,
        buffers["running_var"],
        norm.training or running_mean is None,
        0.0 if norm.momentum is None else norm.momentum,
        norm.eps,
    )


def _counted(norm: nn.Module, params: NormParams) -> NormParams:
    """Count the next batch as nn.BatchNorm2d does; `params` with the momentum that follows."""
    assert isinstance(norm, nn.BatchNorm2d)
    if not norm.training or norm.num_batches_tracked is None:
        return params
    norm.num_batches_tracked.add_(1)
    if norm.momentum is not None:
        return params
    # A tensor, so that the cumulative average does not synchronise.
    return params._replace(momentum=1 / norm.num_batches_tracked.to(norm.weight.dtype))
