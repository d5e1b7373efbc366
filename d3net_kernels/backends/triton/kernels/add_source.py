"""One source's share of a tile: the loop that both convolving kernels spend their time in."""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import (
    CHANNELS_LAST,
    channel_offsets,
    dot,
    pixel_offsets,
    psi,
)


@triton.jit
def add_source(
    acc,
    rest,
    x,
    channels,
    stride_c,
    stride_h,
    stride_w,
    dilation_h,
    dilation_w,
    p,
    first,
    H,
    W,
    weight,
    weight_stride_c,
    weight_stride_h,
    weight_stride_w,
    k,
    k_rest,
    radius_h,
    radius_w,
    scale,
    shift,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    AFFINE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    REST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add conv(psi(x), weight) at the pixels `p` of an image `x` to the accumulators.

    `first` is the first of `p`, `weight` points to the tap in the middle of this source's first
    channel. The tap (i, j) steps away reads pixel (h + i dilation_h, w + j dilation_w).
    """
    h, w = p // W, p % W
    inside = p < H * W
    # The rows and columns that the tile has pixels in, and how many taps these can step each way.
    last = tl.minimum(first + PIXELS, H * W) - 1
    h_first, h_last = first // W, last // W
    one_row = h_first == h_last
    w_first = tl.where(one_row, first % W, 0)
    w_last = tl.where(one_row, last % W, W - 1)
    up = tl.minimum(radius_h, (h_last // dilation_h).to(tl.int32))
    down = tl.minimum(radius_h, ((H - 1 - h_first) // dilation_h).to(tl.int32))
    left = tl.minimum(radius_w, (w_last // dilation_w).to(tl.int32))
    right = tl.minimum(radius_w, ((W - 1 - w_first) // dilation_w).to(tl.int32))
    taps = (up + down + 1) * (left + right + 1)

    c = tl.arange(0, CHUNK)
    offsets = (
        pixel_offsets(p, W, stride_h, stride_w, LAYOUT, ALIGNED)[:, None]
        + channel_offsets(c.to(p.dtype), stride_c, LAYOUT)[None, :]
    )
    i = -up
    j = -left
    start = 0
    for _ in tl.range(taps * tl.cdiv(channels, CHUNK), num_stages=STAGES):
        remaining = channels - start
        if LAYOUT == CHANNELS_LAST:
            remaining = tl.multiple_of(remaining, ALIGNED)
        here = c < remaining
        step_h, step_w = i * dilation_h, j * dilation_w
        source = h + step_h
        column = w + step_w
        seen = inside & (source >= 0) & (source < H) & (column >= 0) & (column < W)
        pointer = x + (
            start.to(tl.int64) * stride_c
            + step_h.to(tl.int64) * stride_h
            + step_w.to(tl.int64) * stride_w
        )
        if LAYOUT == CHANNELS_LAST:
            item_bits: tl.constexpr = x.dtype.element_ty.primitive_bitwidth
            pointer = tl.multiple_of(pointer, ALIGNED * item_bits // 8)
        y = tl.load(pointer + offsets, mask=seen[:, None] & here[None, :], other=0)
        if AFFINE or RELU:
            factor = 0
            summand = 0
            if AFFINE:
                factor = tl.load(scale + start + c, mask=here, other=0).to(acc.dtype)[None, :]
                summand = tl.load(shift + start + c, mask=here, other=0).to(acc.dtype)[None, :]
            y = psi(y.to(acc.dtype), factor, summand, AFFINE, RELU)
            if AFFINE:  # what is padded is zero after psi
                y = tl.where(seen[:, None], y, tl.zeros_like(y))
            y = y.to(weight.dtype.element_ty)
        tap = (
            weight
            + start * weight_stride_c
            + i * weight_stride_h
            + j * weight_stride_w
            + c[:, None] * weight_stride_c
        )
        acc = dot(y, tl.load(tap + k[None, :], mask=here[:, None], other=0), acc, PRECISION, UPCAST)
        if REST > 0:
            more = tl.load(tap + k_rest[None, :], mask=here[:, None], other=0)
            rest = dot(y, more, rest, PRECISION, UPCAST)
        j += 1
        row_done = j > right
        j = tl.where(row_done, -left, j)
        i += row_done.to(tl.int32)
        all_done = i > down
        i = tl.where(all_done, -up, i)
        start += tl.where(all_done, CHUNK, 0)
    return acc, rest
