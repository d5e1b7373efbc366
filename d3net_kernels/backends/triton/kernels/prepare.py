"""psi of all sources, written once as the other kernels read it."""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import (
    CHANNELS,
    CHANNELS_LAST,
    FIRST_BLOCK,
    PLANES,
    PREPARED_START,
    START,
    STRIDE_C,
    STRIDE_H,
    STRIDE_N,
    STRIDE_W,
    STRIDED,
    UNSPECIALIZED,
    X,
    area_of,
    channel_offsets,
    number,
    pixel_offsets,
    psi,
    source_of,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prepare(
    out,
    scale,
    shift,
    sources,
    H,
    W,
    pitch,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    AFFINE: tl.constexpr,
    RELU: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_BLOCK: tl.constexpr,
):
    """Write psi(x); program (tile of pixels, block of channels of one source).

    `out` is (N, H, W, pitch). Each source starts at a multiple of CHANNELS_BLOCK, its last block is
    filled up with zeros.
    """
    area = area_of(H, W, WIDE)
    tiles = tl.cdiv(area, PIXELS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles  # 64 bits where the area has them
    p = first * PIXELS + tl.arange(0, PIXELS)

    block = tl.program_id(1)
    s = source_of(sources, block)
    channels = number(sources, s, CHANNELS).to(tl.int32)
    start = (block - number(sources, s, FIRST_BLOCK).to(tl.int32)) * CHANNELS_BLOCK
    c = start + tl.arange(0, CHANNELS_BLOCK)
    remaining = channels
    pixels = area
    if LAYOUT == CHANNELS_LAST:
        remaining = tl.multiple_of(remaining, ALIGNED)
    if LAYOUT == PLANES:
        pixels = area // ALIGNED * ALIGNED
    there = c < remaining
    inside = p < pixels

    x = number(sources, s, X).to(tl.pointer_type(out.dtype.element_ty))
    x += n * number(sources, s, STRIDE_N)
    if LAYOUT != STRIDED:
        item_bits: tl.constexpr = out.dtype.element_ty.primitive_bitwidth
        x = tl.multiple_of(x, ALIGNED * item_bits // 8)
    offsets = (
        pixel_offsets(
            p, W, number(sources, s, STRIDE_H), number(sources, s, STRIDE_W), LAYOUT, ALIGNED
        )[:, None]
        + channel_offsets(c.to(p.dtype), number(sources, s, STRIDE_C), LAYOUT, ALIGNED)[None, :]
    )
    y = tl.load(x + offsets, mask=inside[:, None] & there[None, :], other=0)
    if AFFINE or RELU:
        factor = 0
        summand = 0
        if AFFINE:
            own = number(sources, s, START) + c
            factor = tl.load(scale + own, mask=there, other=0).to(ACCUMULATOR)[None, :]
            summand = tl.load(shift + own, mask=there, other=0).to(ACCUMULATOR)[None, :]
        y = psi(y.to(ACCUMULATOR), factor, summand, AFFINE, RELU).to(out.dtype.element_ty)
    pitch = tl.multiple_of(pitch, CHANNELS_BLOCK)
    at = tl.multiple_of(number(sources, s, PREPARED_START).to(tl.int32), CHANNELS_BLOCK)
    out += n * H * W * pitch + at
    tl.store(out + (p * pitch)[:, None] + c.to(p.dtype)[None, :], y, mask=inside[:, None])
