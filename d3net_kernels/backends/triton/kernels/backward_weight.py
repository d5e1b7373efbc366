"""The weight gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import (
    CHANNELS,
    DILATION_H,
    DILATION_W,
    FIRST_BLOCK,
    PREPARED_START,
    START,
    UNSPECIALIZED,
    dot,
    number,
    source_of,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_weight(
    partial,
    prepared,
    prepared_grad,
    sources,
    N,
    H,
    W,
    total_channels,
    pitch,
    grad_pitch,
    radius_h,
    radius_w,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PIXELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS_BLOCK: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The weight gradient; program (slab of rows, block of channels at one tap, block of outputs).

    The tap decides which rows and columns of the output see the map at all; the slabs divide these
    rows, of all images. `prepared` (N, H, W, pitch) holds psi of all sources and `prepared_grad`
    (N, H, W, grad_pitch) the gradient of the output, as prepare.py writes them. `partial` is
    (slabs, kh, kw, sum C_i, padded K): the host sums the slabs in this order, so that the result
    does not depend on which program ends first.
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

    pitch, grad_pitch = tl.multiple_of(pitch, GRAIN), tl.multiple_of(grad_pitch, GRAIN)
    start = tl.multiple_of(number(sources, s, PREPARED_START).to(tl.int32), GRAIN)
    x = prepared + start + ((above + step_h) * W + before + step_w) * pitch
    grad = prepared_grad + (above * W + before) * grad_pitch
    filled = c < tl.cdiv(channels, GRAIN) * GRAIN  # what lies there belongs to the source
    row = tl.arange(0, PIXELS) // COLUMNS
    column = tl.arange(0, PIXELS) % COLUMNS
    index = tl.int64 if WIDE else tl.int32
    pixels = row.to(index) * W + column
    x_offsets = c.to(index)[:, None] + (pixels * pitch)[None, :]
    grad_offsets = (pixels * grad_pitch)[:, None]

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
        at = (n * H + h) * W + w
        from_x = x + at * pitch + x_offsets
        y = tl.load(from_x, mask=filled[:, None] & there[None, :], other=0)
        from_grad = grad + at * grad_pitch + grad_offsets
        grads = tl.load(from_grad + k[None, :], mask=there[:, None], other=0)
        acc = dot(y, grads, acc, PRECISION, UPCAST)
        if REST > 0:
            grads_rest = tl.load(from_grad + k_rest[None, :], mask=there[:, None], other=0)
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
