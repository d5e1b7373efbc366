"""The weight gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import (
    CHANNELS,
    DILATION_H,
    DILATION_W,
    FIRST_BLOCK,
    START,
    STRIDE_C,
    STRIDE_H,
    STRIDE_N,
    STRIDE_W,
    UNSPECIALIZED,
    X,
    channel_offsets,
    dot,
    number,
    patch_offsets,
    psi,
    source_of,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_weight(
    partial,
    scale,
    shift,
    outputs,
    sources,
    N,
    H,
    W,
    K,
    total_channels,
    radius_h,
    radius_w,
    LAYOUT: tl.constexpr,
    SOURCE_LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
    AFFINE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    DTYPE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PIXELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The weight gradient; program (slab of rows, block of channels at one tap, block of outputs).

    The tap decides which rows and columns of the output see the map at all; the slabs divide these
    rows, of all images. `partial` is (slabs, kh, kw, sum C_i, padded K): the host sums the slabs in
    this order, so that the result does not depend on which program ends first.
    """
    taps_w = 2 * radius_w + 1
    taps = (2 * radius_h + 1) * taps_w
    tap = tl.program_id(1) % taps
    block = tl.program_id(1) // taps
    s = source_of(sources, block)
    channels = number(sources, s, CHANNELS).to(tl.int32)
    c = (block - number(sources, s, FIRST_BLOCK).to(tl.int32)) * CHANNELS_BLOCK
    c += tl.arange(0, CHANNELS_BLOCK)
    here = c < channels
    k = tl.program_id(2) * (BLOCK + REST) + tl.arange(0, BLOCK)
    k_rest = tl.program_id(2) * (BLOCK + REST) + BLOCK + tl.arange(0, REST if REST > 0 else 1)

    # Output row h reads row h + step_h: rows above..above + rows - 1 see the map, likewise columns.
    step_h = (tap // taps_w - radius_h) * number(sources, s, DILATION_H)
    step_w = (tap % taps_w - radius_w) * number(sources, s, DILATION_W)
    above = tl.maximum(-step_h, 0)
    before = tl.maximum(-step_w, 0)
    rows = tl.maximum(H - tl.abs(step_h), 0)
    columns = tl.maximum(W - tl.abs(step_w), 0).to(tl.int32)
    patch_rows: tl.constexpr = PIXELS // COLUMNS
    strips = tl.cdiv(rows, patch_rows)
    share = tl.cdiv(N * strips, tl.num_programs(0))
    strip = tl.program_id(0) * share
    end = tl.minimum(strip + share, N * strips)

    stride_n = number(sources, s, STRIDE_N)
    stride_h = number(sources, s, STRIDE_H)
    stride_w = number(sources, s, STRIDE_W)
    g_stride_n = number(outputs, 0, STRIDE_N)
    g_stride_h = number(outputs, 0, STRIDE_H)
    g_stride_w = number(outputs, 0, STRIDE_W)
    x = number(sources, s, X).to(tl.pointer_type(DTYPE))
    x += (above + step_h) * stride_h + (before + step_w) * stride_w
    g = number(outputs, 0, X).to(tl.pointer_type(DTYPE)) + above * g_stride_h + before * g_stride_w

    row = tl.arange(0, PIXELS) // COLUMNS
    column = tl.arange(0, PIXELS) % COLUMNS
    index = tl.int64 if WIDE else tl.int32
    x_offsets = (
        channel_offsets(c.to(index), number(sources, s, STRIDE_C), SOURCE_LAYOUT)[:, None]
        + patch_offsets(row.to(index), column, stride_h, stride_w, SOURCE_LAYOUT)[None, :]
    )
    g_pixels = patch_offsets(row.to(index), column, g_stride_h, g_stride_w, LAYOUT)[:, None]
    g_stride_c = number(outputs, 0, STRIDE_C)
    g_offsets = g_pixels + channel_offsets(k.to(index), g_stride_c, LAYOUT)[None, :]
    g_rest_offsets = g_pixels + channel_offsets(k_rest.to(index), g_stride_c, LAYOUT)[None, :]
    factor = 0
    summand = 0
    if AFFINE:
        start = number(sources, s, START)
        factor = tl.load(scale + start + c, mask=here, other=0).to(ACCUMULATOR)[:, None]
        summand = tl.load(shift + start + c, mask=here, other=0).to(ACCUMULATOR)[:, None]

    acc = tl.zeros((CHANNELS_BLOCK, BLOCK), ACCUMULATOR)
    rest = tl.zeros((CHANNELS_BLOCK, REST if REST > 0 else 1), ACCUMULATOR)
    patches = tl.cdiv(columns, COLUMNS)  # of a strip of rows
    patch = 0
    steps = tl.maximum(end - strip, 0).to(tl.int32) * patches
    for _ in tl.range(steps, num_stages=STAGES):
        n = strip // strips
        h = strip % strips * patch_rows
        w = patch * COLUMNS
        there = (h + row < rows) & (w + column < columns)
        y = tl.load(
            x + n * stride_n + h * stride_h + w * stride_w + x_offsets,
            mask=here[:, None] & there[None, :],
            other=0,
        )
        if AFFINE or RELU:
            y = y.to(ACCUMULATOR)
            y = psi(y, factor, summand, AFFINE, RELU).to(DTYPE)
        from_g = g + n * g_stride_n + h * g_stride_h + w * g_stride_w
        grads = tl.load(from_g + g_offsets, mask=there[:, None] & (k < K)[None, :], other=0)
        acc = dot(y, grads, acc, PRECISION, UPCAST)
        if REST > 0:
            mask = there[:, None] & (k_rest < K)[None, :]
            grads_rest = tl.load(from_g + g_rest_offsets, mask=mask, other=0)
            rest = dot(y, grads_rest, rest, PRECISION, UPCAST)
        patch += 1
        strip_done = patch == patches
        patch = tl.where(strip_done, 0, patch)
        strip += strip_done.to(tl.int64)

    padded_k = tl.num_programs(2) * (BLOCK + REST)
    at = (tl.program_id(0) * taps + tap).to(tl.int64) * total_channels
    partial += (at + number(sources, s, START)) * padded_k
    tl.store(partial + c[:, None] * padded_k + k[None, :], acc, mask=here[:, None])
    if REST > 0:
        tl.store(partial + c[:, None] * padded_k + k_rest[None, :], rest, mask=here[:, None])
