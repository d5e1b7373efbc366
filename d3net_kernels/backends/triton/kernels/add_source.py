"""One source's share of a tile: the loop that both convolving kernels spend their time in."""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import dot


@triton.jit
def add_source(
    acc,
    rest,
    x,
    chunks,
    pitch,
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
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    REST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add conv(x, weight) at the pixels `p` of an image to the accumulators.

    `x` points to the first of the source's channels, `chunks` whole chunks, in the prepared image.
    `first` is the first of `p`, `weight` points to the tap in the middle of this source's first
    channel. The tap (i, j) steps away reads pixel (h + i dilation_h, w + j dilation_w); pixels
    behind the last of the image read something of it, and nobody stores their sums.
    """
    h, w = (p // W).to(tl.int32), (p % W).to(tl.int32)
    # The rows and columns that the tile has pixels in, and how many taps these can step each way.
    last = tl.minimum(first + PIXELS, H.to(p.dtype) * W) - 1
    h_first, h_last = (first // W).to(tl.int32), (last // W).to(tl.int32)
    one_row = h_first == h_last
    w_first = tl.where(one_row, (first % W).to(tl.int32), 0)
    w_last = tl.where(one_row, (last % W).to(tl.int32), W - 1)
    up = tl.minimum(radius_h, h_last // dilation_h)
    down = tl.minimum(radius_h, (H - 1 - h_first) // dilation_h)
    left = tl.minimum(radius_w, w_last // dilation_w)
    right = tl.minimum(radius_w, (W - 1 - w_first) // dilation_w)
    taps = (up + down + 1) * (left + right + 1)

    height, width = H.to(tl.uint32, bitcast=True), W.to(tl.uint32, bitcast=True)
    c = tl.arange(0, CHUNK)
    pixels = x + (p * pitch)[:, None] + c.to(p.dtype)[None, :]
    rows = weight + c[:, None] * weight_stride_c
    i = -up
    j = -left
    start = 0
    for _ in tl.range(taps * chunks, num_stages=STAGES):
        step_h, step_w = i * dilation_h, j * dilation_w
        # Above and left of the image is, without a sign, far below and right of it.
        row = (h + step_h).to(tl.uint32, bitcast=True)
        column = (w + step_w).to(tl.uint32, bitcast=True)
        seen = (row < height) & (column < width)
        away = tl.multiple_of((step_h * W + step_w).to(tl.int64) * pitch + start, CHUNK)
        y = tl.load(pixels + away, mask=seen[:, None], other=0)
        tap = rows + (start * weight_stride_c + i * weight_stride_h + j * weight_stride_w)
        acc = dot(y, tl.load(tap + k[None, :]), acc, PRECISION, UPCAST)
        if REST > 0:
            rest = dot(y, tl.load(tap + k_rest[None, :]), rest, PRECISION, UPCAST)
        j += 1
        row_done = j > right
        j = tl.where(row_done, -left, j)
        i += row_done.to(tl.int32)
        all_done = i > down
        i = tl.where(all_done, -up, i)
        start += tl.where(all_done, CHUNK, 0)
    return acc, rest
