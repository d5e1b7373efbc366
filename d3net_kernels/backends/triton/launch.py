"""From tensors to launches: the kernels of the operators, with the signatures of ops.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ... import _layout
from ...precision import PRECISIONS
from . import configs, interpreted
from .kernels import parts
from .kernels.backward_data import backward_data as backward_data_kernel
from .kernels.backward_weight import backward_weight as backward_weight_kernel
from .kernels.finish_moments import finish_moments as finish_moments_kernel
from .kernels.forward import forward as forward_kernel
from .prepared import Prepared, prepare
from .views import Source, View, alignment, layout_of, need_wide_offsets, packed_sources

_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_FINISHED = (256, 4)  # tiles and channels that a program puts together at once
_NOT_WANTED = View(0, 0, 0, 0, 0, 0)  # for the gradient of a source


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
    call = _Call(inputs, weight, dilations, scale, shift, relu, precision)
    out, _ = _forward(call, bias, False)
    return out


def forward_with_moments(
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    dilations: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of d3net_kernels::multidilated_conv2d_with_moments, all three from one launch."""
    call = _Call(inputs, weight, dilations, scale, shift, relu, precision)
    out, moments = _forward(call, bias, True)
    return out, *_mean_and_variance(moments, out)


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
    grads = _layout.empty_gradients(inputs, wanted)
    like = weight if scale is None else scale
    channels = 0 if scale is None else weight.shape[1]
    active = [i for i, is_wanted in enumerate(wanted) if is_wanted or scale is not None]
    if grad_output.numel() == 0 or not active:
        return grads, like.new_zeros(channels), like.new_zeros(channels)

    call = _Call(inputs, weight, dilations, scale, shift, relu, precision)
    pieces = call.blocks([inputs[i].shape[1] for i in active])
    grad_views = {i: View.of(grads[i]) for i in active if wanted[i]}
    both = (call.views, list(grad_views.values()))
    layout, grad_layout = (layout_of(seen, call.width) for seen in both)
    area, item = call.height * call.width, weight.element_size()
    aligned = min(
        alignment(seen, of_seen, area, item)
        for seen, of_seen in zip(both, (layout, grad_layout), strict=True)
    )
    wide = need_wide_offsets([*inputs, *grads])
    config = call.config("backward_data", sum(pieces), wide or call.is_scattered(aligned))
    prepared = prepare([grad_output], config.channels)
    sources, blocks = call.sources(sum(pieces), active, [0] * len(inputs))
    ready = weight.new_zeros((*weight.shape[2:], prepared.pitch, blocks * sum(pieces)))
    rows = []
    for i, source in zip(active, sources, strict=True):
        at, width = source.first_block * sum(pieces), source.view.channels
        group = weight.narrow(1, source.start, width).permute(2, 3, 0, 1)
        ready[:, :, : weight.shape[0], at : at + width].copy_(group)
        grad = grad_views.get(i, _NOT_WANTED)
        own = (grad.pointer, grad.stride_n, grad.stride_c, grad.stride_h, grad.stride_w)
        rows.append((*source.numbers(), *own))
    sums = call.accumulators(call.tiles(config), 2, channels)
    call.launch(
        backward_data_kernel,
        (call.tiles(config), blocks),
        config,
        pieces,
        sums,
        ready,
        # The kernel takes some tensor for what is not there, and does not touch it.
        weight if scale is None else scale.contiguous(),
        weight if shift is None else shift.contiguous(),
        prepared.data,
        packed_sources(rows),
        call.height,
        call.width,
        weight.shape[1],
        prepared.pitch,
        *call.radii,
        LAYOUT=layout,
        GRAD_LAYOUT=grad_layout,
        ALIGNED=aligned,
        WIDE=wide or need_wide_offsets([prepared.image]),
        AFFINE=scale is not None,
        RELU=relu,
        CHUNK=config.channels,
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
    precision: int,
) -> tuple[Tensor, Tensor]:
    """Kernel of d3net_kernels::multidilated_conv2d_backward_weight."""
    if grad_output.numel() == 0:
        return _layout.zero_weight_gradients(weight)
    call = _Call(inputs, weight, dilations, scale, shift, relu, precision)
    outputs, _, *taps = weight.shape
    pieces = configs.output_blocks([outputs])
    layout = layout_of(call.views, call.width)
    channels = [view.channels for view in call.views]
    aligned = alignment(call.views, layout, call.width, weight.element_size())
    wide = need_wide_offsets(inputs)
    config = call.config("backward_weight", sum(pieces), wide or call.is_scattered(aligned))
    # A second block of channels needs too many registers where a thread holds more channels, as it
    # does without wide loads along a row, or more sums, as with more than 64 outputs. With loads
    # of 8 bytes ptxas spills for sm_90, but not for sm_8x.
    wide_loads = aligned * weight.element_size() >= (8 if call.arch.startswith("sm_8") else 16)
    whole = layout is parts.PLANES and wide_loads and sum(pieces) <= 64
    blocks = configs.channel_blocks(channels, config.channels, rest=whole)
    output_blocks = -(-outputs // sum(pieces))
    padded = output_blocks * sum(pieces)
    prepared_grad = prepare([grad_output], configs.GRAIN, padded)
    taps_of_program = min(taps[0], configs.MOST_TAPS)
    sources, programs = call.tap_sources(sum(blocks), taps_of_program)
    slabs = configs.slabs(inputs[0].device, programs * output_blocks, call.batch * call.height)
    partial = call.accumulators(slabs, *taps, weight.shape[1], padded)
    if call.has_dead_taps():
        partial.zero_()
    call.launch(
        backward_weight_kernel,
        (programs, slabs, output_blocks),
        config,
        pieces,
        partial,
        # The kernel takes some tensor for what is not there, and does not touch it.
        weight if scale is None else scale.contiguous(),
        weight if shift is None else shift.contiguous(),
        prepared_grad.data,
        packed_sources([source.numbers() for source in sources]),
        call.batch,
        call.height,
        call.width,
        weight.shape[1],
        prepared_grad.pitch,
        *call.radii,
        LAYOUT=layout,
        ALIGNED=aligned,
        WIDE=wide or need_wide_offsets([prepared_grad.image]),
        AFFINE=scale is not None,
        RELU=relu,
        TAPS=taps_of_program,
        COLUMN=taps_of_program == taps[0],
        CHANNELS_BLOCK=blocks[0],
        CHANNELS_REST=blocks[1],
        GRAIN=configs.GRAIN,
    )
    grad_weight = partial.sum(0)[..., :outputs].permute(3, 2, 0, 1)
    grad_bias = grad_output.sum((0, 2, 3), dtype=partial.dtype)
    return grad_weight.to(weight.dtype).contiguous(), grad_bias.to(weight.dtype)


class _Call:
    """What the launches of one call have in common."""

    def __init__(
        self,
        inputs: Sequence[Tensor],
        weight: Tensor,
        dilations: Sequence[int],
        scale: Tensor | None,
        shift: Tensor | None,
        relu: bool,
        precision: int,
    ) -> None:
        self.inputs, self.weight = inputs, weight
        self.psi = (scale, shift, relu)
        self.precision = _precision(weight.dtype, precision)
        self.arch = configs.arch_of(weight.device)
        self.batch, _, self.height, self.width = inputs[0].shape
        self.views = [View.of(x) for x in inputs]
        # All dilations beyond the map are alike; the kernels have 32 bits for them.
        most = max(self.height, self.width, 1)
        within = [min(d, most) for d in dilations]
        self.dilations = list(zip(within[::2], within[1::2], strict=True))
        self.radii = (weight.shape[2] // 2, weight.shape[3] // 2)

    def config(self, kernel: str, outputs: int, scattered: bool = False) -> configs.Config:
        """Block sizes of a kernel whose programs have so many outputs each."""
        key = configs.Key(kernel, self.arch, self.weight.dtype, outputs, scattered)
        return configs.config_for(key, self.weight.device)

    def is_scattered(self, aligned: int) -> bool:
        """Whether reading so many numbers at once costs the registers of reading each by itself."""
        return aligned == 1 or aligned * self.weight.element_size() < 8

    def blocks(self, groups: Sequence[int]) -> tuple[int, int]:
        """BLOCK and REST of the forward pass and the data gradient."""
        return configs.convolved_blocks(groups, self.arch, self.weight.dtype)

    def tiles(self, config: configs.Config) -> int:
        """Tiles of pixels of all images."""
        return int(self.batch * -(-self.height * self.width // config.pixels))

    def prepare(self, chunk: int) -> Prepared:
        """psi of the sources, each in whole chunks of channels."""
        return prepare(self.inputs, chunk, 0, *self.psi)

    def sources(
        self, block: int, active: Sequence[int], prepared_starts: Sequence[int]
    ) -> tuple[list[Source], int]:
        """The sources of these numbers, each in whole blocks of channels; how many blocks."""
        starts = [0, *itertools.accumulate(view.channels for view in self.views)]
        sources, blocks = [], 0
        for i in active:
            where = (starts[i], prepared_starts[i], blocks)
            sources.append(Source(self.views[i], self.dilations[i], *where))
            blocks += -(-self.views[i].channels // block)
        return sources, blocks

    def live_taps(self) -> list[tuple[int, int]]:
        """By source, how many rows and columns of taps reach into the map."""

        def along(radius: int, size: int, dilation: int) -> int:
            return 2 * min(radius, (size - 1) // dilation) + 1

        (radius_h, radius_w), (height, width) = self.radii, (self.height, self.width)
        return [
            (along(radius_h, height, dh), along(radius_w, width, dw)) for dh, dw in self.dilations
        ]

    def has_dead_taps(self) -> bool:
        """Whether a tap of any source sees nothing but padding."""
        return any(live != tuple(self.weight.shape[2:]) for live in self.live_taps())

    def tap_sources(self, block: int, taps: int) -> tuple[list[Source], int]:
        """The sources, each in programs for a block of channels at `taps` taps of a column."""
        sources, programs = [], 0
        whole, _ = self.sources(block, range(len(self.views)), [0] * len(self.views))
        for source, (rows, columns) in zip(whole, self.live_taps(), strict=True):
            sources.append(source._replace(first_block=programs))
            programs += -(-source.view.channels // block) * columns * -(-rows // taps)
        return sources, programs

    def accumulators(self, *shape: int) -> Tensor:
        """Memory for sums."""
        return self.weight.new_empty(shape, dtype=_layout.dtype_for(self.weight))

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        config: configs.Config,
        pieces: tuple[int, int],
        *arguments: Any,
        **options: Any,
    ) -> None:
        """Start `kernel` on the device of the weight, in torch's current stream there."""
        dtype = self.weight.dtype
        with torch.cuda.device(self.weight.device if self.weight.is_cuda else -1):
            kernel[grid](
                *arguments,
                **options,
                PRECISION=self.precision,
                UPCAST=interpreted() and dtype == torch.bfloat16,
                ACCUMULATOR=_TYPES[_layout.dtype_for(self.weight)],
                PIXELS=config.pixels,
                BLOCK=pieces[0],
                REST=pieces[1],
                STAGES=config.stages,
                num_warps=config.warps,
                # Lanes that reduce together would round one product more, each another, and
                # store unequal sums in one place.
                enable_fp_fusion=False,
            )


def _forward(call: _Call, bias: Tensor | None, with_moments: bool) -> tuple[Tensor, Tensor]:
    """The output and the moments of its tiles, see _mean_and_variance; of none without them."""
    inputs, weight = call.inputs, call.weight
    outputs = weight.shape[0]
    out = _layout.empty((call.batch, outputs, call.height, call.width), inputs[0])
    wide = need_wide_offsets([out, *inputs])
    config = call.config("forward", outputs, wide)
    moments = call.accumulators(call.tiles(config) if with_moments else 0, 4, outputs)
    if out.numel() == 0:
        return out, moments
    pieces = call.blocks([outputs])
    blocks = -(-outputs // sum(pieces))
    prepared = call.prepare(config.channels)
    sources, _ = call.sources(1, range(len(inputs)), prepared.starts)
    ready = weight.new_zeros((*weight.shape[2:], prepared.pitch, blocks * sum(pieces)))
    for source in sources:
        at, width = source.prepared_start, source.view.channels
        group = weight.narrow(1, source.start, width).permute(2, 3, 1, 0)
        ready[:, :, at : at + width, :outputs].copy_(group)
    view = View.of(out)
    call.launch(
        forward_kernel,
        (call.tiles(config), blocks),
        config,
        pieces,
        out,
        moments,
        ready,
        out if bias is None else bias.contiguous(),
        prepared.data,
        packed_sources([source.numbers() for source in sources]),
        len(sources),
        call.height,
        call.width,
        outputs,
        prepared.pitch,
        view.stride_n,
        view.stride_c,
        view.stride_w,
        *call.radii,
        WIDE=wide or need_wide_offsets([prepared.image]),
        BIAS=bias is not None,
        MOMENTS=with_moments,
        CHUNK=config.channels,
    )
    return out, moments


def _mean_and_variance(moments: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Those of all tiles, put together from each one's `moments` (tiles, 4, K)."""
    tiles, _, outputs = moments.shape
    mean, var = (moments.new_full((outputs,), torch.nan) for _ in range(2))
    if out.numel() == 0:
        return mean, var
    with torch.cuda.device(out.device if out.is_cuda else -1):
        finish_moments_kernel[(-(-outputs // _FINISHED[1]),)](
            moments,
            mean,
            var,
            tiles,
            outputs,
            TILES=_FINISHED[0],
            CHANNELS=_FINISHED[1],
            num_warps=4,
            enable_fp_fusion=False,
        )
    return mean, var


def _precision(dtype: torch.dtype, allowed: int) -> str:
    """Of products: TF32 where that is allowed, else all bits of float32.

    Never on AMD's GPUs, most of which have no such type: Triton would refuse to compile.
    """
    may = allowed >= PRECISIONS["high"] and torch.version.hip is None
    return "tf32" if dtype == torch.float32 and may else "ieee"
