"""The building blocks of D3Net: D2 and D3 blocks in both flavours, and what joins the scales.

Takahashi & Mitsufuji, Densely connected multidilated convolutional networks for dense prediction
tasks, CVPR 2021, sections 3 to 5. The D2 core itself is `d3net_kernels.D2Block`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d3net_kernels import ConvParams, D2Block, NormConv2d, multidilated_conv2d, norm_conv2d
from d3net_kernels.reference import concatenated

Dilation: TypeAlias = Literal["multi", "standard", "none"]
Norm: TypeAlias = Literal["per_source", "per_layer"]
# (N, C, H, W), or a list of tensors whose concatenation it is, and which is not made.
Parts: TypeAlias = Tensor | Sequence[Tensor]
DILATIONS: tuple[Dilation, ...] = ("multi", "standard", "none")


class ConvNorm(nn.Module):
    """A convolution with "same" padding, batch normalisation and a ReLU.

    `conv` holds the parameters; it is never called itself.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias
        )
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Parts) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        folded = folded_norm(self.conv, self.norm)
        if folded is not None:
            return F.relu(norm_conv2d(x, folded, None), inplace=True)
        made = norm_conv2d(x, ConvParams(self.conv.weight, self.conv.bias), None)
        return F.relu(self.norm(made), inplace=True)


def folded_norm(conv: nn.Conv2d, norm: nn.Module) -> ConvParams | None:
    """One convolution in place of `conv` and the normalisation of its result by running statistics.

    It saves a pass over the result, and differentiates to the same gradients. None where `norm`
    takes batch statistics, has none of its own to fold or is no plain nn.BatchNorm2d, and where
    somebody has hooked one of the two, which are not called then.
    """
    if type(norm) is not nn.BatchNorm2d or norm.training or norm.running_mean is None:
        return None
    if norm.weight is None or _is_hooked(conv) or _is_hooked(norm):
        return None
    assert norm.running_var is not None
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)  # rounded once, at the end
    scale = norm.weight.to(dtype) * torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    mean = norm.running_mean.to(dtype)
    if conv.bias is not None:
        mean = mean - conv.bias
    weight, bias = conv.weight * scale[:, None, None, None], norm.bias - mean * scale
    return ConvParams(weight.to(conv.weight.dtype), bias.to(conv.weight.dtype))


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class SingleDilationD2Block(D2Block):
    """A D2 block whose layers have one dilation for all their sources: the paper's ablations.

    "standard" gives layer l the largest one that its multidilated layer has, 2**(l - 1), which
    aliases (section 3); "none" gives 1 (section 6.1, Table 1). The parameters are those of the
    multidilated block. A layer is one fused convolution; psi is computed in plain torch.
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        num_layers: int,
        *,
        dilation: Dilation,
        out_layers: int | None = None,
        norm: Norm = "per_source",
        bias: bool = True,
    ) -> None:
        super().__init__(
            in_channels, growth_rate, num_layers, out_layers=out_layers, norm=norm, bias=bias
        )
        self.dilation = dilation

    def forward(self, x: Parts) -> Tensor:
        """x_0 (N, C_0, H, W) to the last layers' raw outputs, (N, k * out_layers, H, W)."""
        sources, normalised = [concatenated(x)], []
        for layer, norm in enumerate(self.norms):
            if self.norm == "per_source":
                normalised.append(F.relu(norm(sources[-1])))
            else:
                normalised = [F.relu(norm(torch.cat(sources, 1)))]
            weight, bias = self._layer(layer)
            step = 1 << layer if self.dilation == "standard" else 1
            dilations = [step] * len(normalised)
            sources.append(multidilated_conv2d(normalised, weight, bias, dilations=dilations))
        return torch.cat(sources[-self.out_layers :], 1)

    def _layer(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of layer l = `layer` + 1 from its slot in each of its sources."""
        weights, biases = [], []
        for i, conv in enumerate(list(self.convs)[: layer + 1]):
            assert isinstance(conv, nn.Conv2d)
            start = (layer - i) * self.growth_rate
            weights.append(conv.weight.narrow(0, start, self.growth_rate))
            if conv.bias is not None:
                biases.append(conv.bias.narrow(0, start, self.growth_rate))
        return torch.cat(weights, 1), torch.stack(biases).sum(0) if biases else None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dilation={self.dilation!r}"


def d2_core(
    in_channels: int,
    growth_rate: int,
    num_layers: int,
    *,
    out_layers: int | None = None,
    norm: Norm = "per_source",
    dilation: Dilation = "multi",
    bias: bool = True,
) -> D2Block:
    """A D2 block of the paper (dilation="multi"), or one of its ablations "standard" and "none".

    Raises:
        ValueError: `dilation` is none of the three.
    """
    if dilation not in DILATIONS:
        raise ValueError(
            f"dilation is {dilation!r}; accepted are {', '.join(map(repr, DILATIONS))}"
        )
    block: Callable[..., D2Block] = D2Block
    if dilation != "multi":
        block = partial(SingleDilationD2Block, dilation=dilation)
    return block(in_channels, growth_rate, num_layers, out_layers=out_layers, norm=norm, bias=bias)


class ReducedD2Block(nn.Module):
    """A D2 block between its two channel reductions (section 4), as segmentation uses it.

    A 1x1 bottleneck to 4k channels stands before the core where more than 4k come in (or always),
    and a 1x1 convolution compresses the k * L channels of all its layers to floor(k * L * c).

    Args:
        in_channels: C.
        growth_rate: k.
        num_layers: L.
        compression: c; None leaves the channels as they are.
        always_bottleneck: whether also up to 4k channels pass through a bottleneck (DenseNet-BC).
        bias: whether the bottleneck and the core have biases.
        norm, dilation: see :func:`d2_core`.
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        num_layers: int,
        *,
        compression: float | None,
        always_bottleneck: bool = False,
        bias: bool = True,
        norm: Norm = "per_source",
        dilation: Dilation = "multi",
    ) -> None:
        super().__init__()
        width, made = 4 * growth_rate, growth_rate * num_layers
        self.bottleneck: NormConv2d | None = None
        if always_bottleneck or in_channels > width:
            self.bottleneck = NormConv2d(in_channels, width, bias=bias)
            in_channels = width
        self.core = d2_core(
            in_channels, growth_rate, num_layers, norm=norm, dilation=dilation, bias=bias
        )
        self.compression: NormConv2d | None = None
        self.out_channels = made
        if compression is not None:
            self.out_channels = int(made * compression)
            self.compression = NormConv2d(made, self.out_channels, bias=False)

    def forward(self, x: Parts) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, H, W)."""
        if self.bottleneck is not None:
            x = self.bottleneck(x)
        out: Tensor = self.core(x)
        return out if self.compression is None else self.compression(out)


class _D3Block(nn.Module):
    """What both D3 blocks share: their D2 blocks and the choice to recompute them in backward."""

    out_channels: int

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.checkpointing = False

    def _run(self, block: nn.Module, x: Parts) -> Tensor:
        if not (self.checkpointing and self.training and torch.is_grad_enabled()):
            result: Tensor = block(x)
            return result

        if torch.compiler.is_compiling():  # recomputes values, but no updates of statistics
            compiled: Tensor = checkpoint(block, x, use_reentrant=False)
            return compiled

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _statistics_kept(block)

        recomputed: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return recomputed


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """A second forward pass over the same batch must not count in the running statistics again."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


class ConcatD3Block(_D3Block):
    """A D3 block that concatenates: every D2 block reads the input and all D2 blocks before it.

    Section 4, Fig. 4, as the official segmentation network has it: the result is the input and the
    compressed outputs of the M D2 blocks, left apart for those that read it.

    Args:
        in_channels: C.
        num_blocks: M.
        growth_rate, num_layers, compression, always_bottleneck, bias, norm, dilation: of each D2
            block, see :class:`ReducedD2Block`.
    """

    def __init__(
        self,
        in_channels: int,
        num_blocks: int,
        growth_rate: int,
        num_layers: int,
        *,
        compression: float | None,
        always_bottleneck: bool = False,
        bias: bool = True,
        norm: Norm = "per_source",
        dilation: Dilation = "multi",
    ) -> None:
        super().__init__()
        for _ in range(num_blocks):
            block = ReducedD2Block(
                in_channels,
                growth_rate,
                num_layers,
                compression=compression,
                always_bottleneck=always_bottleneck,
                bias=bias,
                norm=norm,
                dilation=dilation,
            )
            self.blocks.append(block)
            in_channels += block.out_channels
        self.out_channels = in_channels

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C, H, W) -> the parts of (N, out_channels, H, W), the input first."""
        parts = [x]
        for block in self.blocks:
            parts.append(self._run(block, list(parts)))
        return parts


class SumD3Block(_D3Block):
    """A D3 block that sums, as the official separation network has it.

    As the layers of a D2 block read slots of their sources, so the D2 blocks read slots of those
    before them. With A_m the last layer of D2 block m, which has growth k (M - m), m = 0..M-1:
    s = A_0(x) in M slots of k channels; for m = 1..M-1, A_m(s_{m-1}) is added to s_m, ..., s_{M-1};
    the result is s_{M-1}.

    Args:
        in_channels: C.
        growth_rate: k.
        num_layers: L of every D2 block.
        num_blocks: M.
        norm, dilation: see :func:`d2_core`.
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        num_layers: int,
        num_blocks: int,
        *,
        norm: Norm = "per_source",
        dilation: Dilation = "multi",
    ) -> None:
        super().__init__()
        self.out_channels = growth_rate
        for m in range(num_blocks):
            self.blocks.append(
                d2_core(
                    growth_rate if m else in_channels,
                    growth_rate * (num_blocks - m),
                    num_layers,
                    out_layers=1,
                    norm=norm,
                    dilation=dilation,
                )
            )

    def forward(self, x: Parts) -> Tensor:
        """(N, C, H, W) -> (N, k, H, W)."""
        waiting = self._run(self.blocks[0], x)
        for block in list(self.blocks)[1:]:
            source = waiting[:, : self.out_channels]
            waiting = waiting[:, self.out_channels :] + self._run(block, source)
        return waiting


class Transition(nn.Module):
    """To the next coarser scale: psi, a 1x1 convolution to half the channels, 2x2 mean pooling.

    Section 5. An odd last row or column is dropped.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.out_channels = in_channels // 2
        self.reduce = NormConv2d(in_channels, self.out_channels, bias=False)

    def forward(self, x: Parts) -> Tensor:
        """(N, C, H, W) -> (N, C // 2, H // 2, W // 2)."""
        # At this scale the mean of 2x2 pixels, but F.avg_pool2d would keep its input for backward.
        return F.interpolate(self.reduce(x), scale_factor=0.5, mode="bilinear", align_corners=False)


class Upsample(nn.Module):
    """To the next finer scale: batch normalisation without ReLU, 2x2 transposed convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.ConvTranspose2d(channels, channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 2 H, 2 W)."""
        out: Tensor = self.conv(self.norm(x))
        return out


def set_checkpointing(model: nn.Module, enable: bool) -> None:
    """Whether the D3 blocks of `model` recompute their D2 blocks in backward to save memory."""
    for module in model.modules():
        if isinstance(module, _D3Block):
            module.checkpointing = enable
