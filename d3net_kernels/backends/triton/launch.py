"""From tensors to launches: kernels of the three operators, with the signatures of ops.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _layout
from . import configs, kernels

INTERPRETED = kernels.INTERPRETED

_ACCUMULATORS = {torch.float64: kernels.tl.float64}
_DTYPES = {
    torch.float32: kernels.tl.float32,
    torch.float64: kernels.tl.float64,
    torch.bfloat16: kernels.tl.bfloat16,
    torch.float16: kernels.tl.float16,
}


def packed(values: Sequence[int]) -> tuple[int, ...]:
    """Odd numbers beyond 32 bits, which Triton treats all alike.

    A number in a tuple that is 1, divisible by 16 or beyond 32 bits otherwise makes a kernel of
    its own: there would be one for every list of channels, dilations and strides.
    """
    return tuple((1 << 62) + 2 * value + 1 for value in values)


class View(NamedTuple):
    """A tensor (N, C, H, W) with the strides of dimensions of size 1 set to what suits best."""

    pointer: int
    channels: int
    stride_n: int
    stride_c: int
    stride_h: int
    stride_w: int

    @staticmethod
    def of(t: Tensor) -> View:
        """The view of `t`."""
        _, c, h, w = t.shape
        stride_n, stride_c, stride_h, stride_w = t.stride()
        if w == 1:
            stride_w = stride_h if h > 1 else 1
        if h == 1:
            stride_h = stride_w * w
        return View(t.data_ptr(), c, stride_n, stride_c if c > 1 else 1, stride_h, stride_w)


def layout_of(views: Sequence[View], width: int) -> Any:
    """The layout that all of `views` have: one of those that kernels.py names."""
    if all(v.stride_w == 1 and v.stride_h == width for v in views):
        return kernels.PLANES
    if all(v.stride_c == 1 and v.stride_h == width * v.stride_w for v in views):
        return kernels.CHANNELS_LAST
    return kernels.STRIDED


def aligned(views: Sequence[View], itemsize: int) -> bool:
    """Whether every pixel of every view starts at a multiple of 16 bytes."""
    return all(
        v.pointer % 16 == 0
        and v.stride_n * itemsize % 16 == 0
        and v.stride_h * itemsize % 16 == 0
        and v.stride_w * itemsize % 16 == 0
        for v in views
    )


def _wide(tensors: Sequence[Tensor], whole: bool = False) -> bool:
    """Whether offsets inside an image (or the whole tensor) need 64 bits."""
    return any(
        sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
        >= 1 << 30
        for t in tensors
    )


class _Call:
    """What the three launches have in common."""

    def __init__(
        self,
        kernel: str,
        inputs: Sequence[Tensor],
        weight: Tensor,
        dilations: Sequence[int],
        scale: Tensor | None,
        shift: Tensor | None,
        relu: bool,
        outputs: int,
        tensors: Sequence[Tensor],
    ) -> None:
        first = inputs[0]
        self.batch, _, self.height, self.width = first.shape
        self.out_channels, self.total_channels, self.taps_h, self.taps_w = weight.shape
        self.views = [View.of(x) for x in inputs]
        self.layout = layout_of(self.views, self.width)
        starts = [0]
        for view in self.views:
            starts.append(starts[-1] + view.channels)
        self.starts = starts[:-1]
        self.pairs = list(zip(dilations[::2], dilations[1::2], strict=True))
        self.scale, self.shift = scale, shift
        arch = configs.arch_of(first.device)
        self.config = configs.config_for(kernel, arch, first.dtype, outputs)
        self.options: dict[str, Any] = {
            "WIDE": _wide([*inputs, *tensors]),
            "AFFINE": scale is not None,
            "RELU": relu,
            "PRECISION": _precision(first),
            "UPCAST": INTERPRETED and first.dtype == torch.bfloat16,
            "ACCUMULATOR": _ACCUMULATORS.get(first.dtype, kernels.tl.float32),
            "PIXELS": self.config.pixels,
            "STAGES": self.config.stages,
            "num_warps": self.config.warps,
        }

    @property
    def tiles(self) -> int:
        """Programs that cover the pixels of all images."""
        return int(self.batch * -(-self.height * self.width // self.config.pixels))

    @property
    def radii(self) -> tuple[int, int]:
        return self.taps_h // 2, self.taps_w // 2

    def source(self, i: int, first_block: int = 0) -> tuple[int, ...]:
        """The tuple of source `i` as kernels.py reads it."""
        return (*self.views[i], *self.pairs[i], self.starts[i], first_block)


def _padded(tuples: list[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Packed tuples, as many as the next power of two: few variants for all numbers of sources."""
    count = 1 << (len(tuples) - 1).bit_length()
    unused = (*tuples[-1][:_FIRST_BLOCK], 1 << 40, *tuples[-1][_FIRST_BLOCK + 1 :])
    return tuple(packed(t) for t in [*tuples, *[unused] * (count - len(tuples))])


_FIRST_BLOCK = int(kernels.FIRST_BLOCK.value)


def _precision(t: Tensor) -> str:
    """TF32 where torch's own convolutions may use it, else all bits of float32."""
    allowed = t.is_cuda and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if t.dtype == torch.float32 and allowed else "ieee"


def _flag(t: Tensor | None, unused: Tensor) -> Tensor:
    return unused if t is None else t.contiguous()


def forward(
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    dilations: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> Tensor:
    """Kernel of d3net_kernels::multidilated_conv2d."""
    out, _ = forward_with_moments(
        inputs, weight, bias, dilations, scale, shift, relu, want_moments=False
    )
    return out


def forward_with_moments(
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    dilations: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    want_moments: bool = True,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The output, and mean and biased variance (K,) of each of its channels."""
    n, _, h, w = inputs[0].shape
    outputs = weight.shape[0]
    out = _layout.empty((n, outputs, h, w), inputs[0])
    call = _Call("forward", inputs, weight, dilations, scale, shift, relu, outputs, [out])
    block, rest = configs.output_blocks([outputs])
    blocks = -(-outputs // (block + rest))
    moments = out.new_empty((call.tiles, 2, outputs), dtype=_layout.dtype_for(out)) if want_moments else out
    if out.numel() > 0:
        ready = weight.new_zeros((call.taps_h, call.taps_w, call.total_channels, blocks * (block + rest)))
        ready[..., :outputs] = weight.permute(2, 3, 1, 0)
        view = View.of(out)
        kernels.forward[(call.tiles, blocks)](
            out,
            moments,
            ready,
            _flag(bias, out),
            _flag(scale, out),
            _flag(shift, out),
            _padded([call.source(i) for i in range(len(inputs))]),
            len(inputs),
            h,
            w,
            outputs,
            call.total_channels,
            view.stride_n,
            view.stride_c,
            view.stride_w,
            *call.radii,
            LAYOUT=call.layout,
            ALIGNED=aligned(call.views, out.element_size()),
            BIAS=bias is not None,
            MOMENTS=want_moments,
            CHUNK=call.config.channels,
            BLOCK=block,
            REST=rest,
            **call.options,
        )
    return out, _mean_and_variance(moments, out, call.config.pixels) if want_moments else None


def _mean_and_variance(moments: Tensor, out: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """Tiles' sums and squared deviations of their own means, put together (Chan et al. 1979)."""
    n, _, h, w = out.shape
    tiles = -(-h * w // pixels)
    counts = moments.new_full((n, tiles), pixels, dtype=torch.float64)
    counts[:, -1:] = h * w - (tiles - 1) * pixels
    counts = counts.view(-1, 1)
    sums, deviations = moments.double().unbind(1)
    mean = sums.sum(0) / (n * h * w)
    variance = (deviations + counts * (sums / counts - mean).square()).sum(0) / (n * h * w)
    return mean.to(moments.dtype), variance.to(moments.dtype)


def backward_data(
    grad_output: Tensor,
    inputs: Sequence[Tensor],
    weight: Tensor,
    dilations: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    wanted: Sequence[int],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Kernel of d3net_kernels::multidilated_conv2d_backward_data."""
    grads = [
        _layout.empty(x.shape, x) if is_wanted else x.new_empty(0)
        for x, is_wanted in zip(inputs, wanted, strict=True)
    ]
    active = [i for i, is_wanted in enumerate(wanted) if is_wanted or scale is not None]
    like = weight if scale is None else scale
    channels = 0 if scale is None else weight.shape[1]
    if grad_output.numel() == 0 or not active:
        return grads, like.new_zeros(channels), like.new_zeros(channels)
    widths = [inputs[i].shape[1] for i in active]
    block, rest = configs.output_blocks(widths)
    call = _Call(
        "backward_data", inputs, weight, dilations, scale, shift, relu, block + rest, [grad_output]
    )
    first_blocks = [0]
    for width in widths:
        first_blocks.append(first_blocks[-1] + -(-width // (block + rest)))
    blocks = first_blocks.pop()
    ready = weight.new_zeros((call.taps_h, call.taps_w, call.out_channels, blocks * (block + rest)))
    tuples = []
    for i, first_block, width in zip(active, first_blocks, widths, strict=True):
        start, at = call.starts[i], first_block * (block + rest)
        ready[..., at : at + width] = weight[:, start : start + width].permute(2, 3, 0, 1)
        grad = View.of(grads[i]) if wanted[i] else View(0, 0, 0, 0, 0, 0)
        pixel = (grad.pointer, grad.stride_n, grad.stride_c, grad.stride_w)
        tuples.append((*call.source(i, first_block), *pixel))
    sums = weight.new_empty((call.tiles, 2, channels), dtype=_layout.dtype_for(weight))
    view = View.of(grad_output)
    kernels.backward_data[(call.tiles, blocks)](
        sums,
        ready,
        _flag(scale, sums),
        _flag(shift, sums),
        (packed(view),),
        _padded(tuples),
        call.height,
        call.width,
        call.out_channels,
        call.total_channels,
        *call.radii,
        LAYOUT=layout_of([view], call.width),
        ALIGNED=aligned([view], weight.element_size()),
        SOURCE_LAYOUT=call.layout,
        CHUNK=call.config.channels,
        BLOCK=block,
        REST=rest,
        **call.options,
    )
    grad_scale, grad_shift = sums.sum(0, dtype=torch.float64).to(like.dtype)
    return grads, grad_scale, grad_shift


def backward_weight(
    grad_output: Tensor,
    inputs: Sequence[Tensor],
    weight: Tensor,
    dilations: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Kernel of d3net_kernels::multidilated_conv2d_backward_weight."""
    if grad_output.numel() == 0:
        return weight.new_zeros(weight.shape), weight.new_zeros(weight.shape[0])
    call = _Call(
        "backward_weight",
        inputs,
        weight,
        dilations,
        scale,
        shift,
        relu,
        weight.shape[0],
        [grad_output],
    )
    block, rest = configs.output_blocks([call.out_channels])
    blocks = -(-call.out_channels // (block + rest))
    rows = call.config.channels
    first_blocks = [0]
    for view in call.views:
        first_blocks.append(first_blocks[-1] + -(-view.channels // rows))
    row_blocks = first_blocks.pop() * call.taps_h * call.taps_w
    slabs = configs.slabs(grad_output.device, row_blocks * blocks, call.batch * call.height)
    partial = weight.new_empty(
        (slabs, call.taps_h, call.taps_w, call.total_channels, blocks * (block + rest)),
        dtype=_layout.dtype_for(weight),
    )
    view = View.of(grad_output)
    kernels.backward_weight[(slabs, row_blocks, blocks)](
        partial,
        _flag(scale, partial),
        _flag(shift, partial),
        (packed(view),),
        _padded([call.source(i, b) for i, b in enumerate(first_blocks)]),
        call.batch,
        call.height,
        call.width,
        call.out_channels,
        call.total_channels,
        *call.radii,
        LAYOUT=layout_of([view], call.width),
        SOURCE_LAYOUT=call.layout,
        DTYPE=_DTYPES[weight.dtype],
        COLUMNS=configs.patch_columns(call.height, call.width, call.config.pixels),
        CHANNELS_BLOCK=rows,
        BLOCK=block,
        REST=rest,
        **call.options,
    )
    grad_weight = partial.sum(0)[..., : call.out_channels].permute(3, 2, 0, 1)
    grad_bias = grad_output.sum((0, 2, 3), dtype=_layout.dtype_for(weight))
    return grad_weight.to(weight.dtype).contiguous(), grad_bias.to(weight.dtype)
