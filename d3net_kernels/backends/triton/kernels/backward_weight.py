"""The weight gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import (
    CHANNELS,
    CHANNELS_LAST,
    DILATION_H,
    DILATION_W,
    FIRST_BLOCK,
    PLANES,
    START,
    STRIDE_C,
    STRIDE_H,
    STRIDE_N,
    STRIDE_W,
    STRIDED,
    UNSPECIALIZED,
    X,
    channel_offsets,
    dot,
    number,
    psi,
    source_of,
)


@triton.jit
def _normalised(
    x,
    c,
    channels,
    columns,
    stride_c,
    stride_w,
    inside,
    seen,
    scale,
    shift,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    AFFINE: tl.constexpr,
    RELU: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """psi of a block of channels (rows) at pixels of one row of the map (columns)."""
    offsets = columns
    if LAYOUT != PLANES:
        offsets = columns * tl.multiple_of(stride_w.to(columns.dtype), ALIGNED)
    offsets = (
        channel_offsets(c.to(columns.dtype), stride_c, LAYOUT, ALIGNED)[:, None] + offsets[None, :]
    )
    y = tl.load(x + offsets, mask=(c < channels)[:, None] & inside[None, :], other=0)
    if AFFINE or RELU:
        y = psi(y.to(ACCUMULATOR), scale, shift, AFFINE, RELU).to(y.dtype)
    return tl.where(seen[None, :], y, tl.zeros_like(y))


@triton.jit
def _coefficients(vector, c, channels, AFFINE: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """Those of psi for a block of channels, as a column."""
    if AFFINE:
        column = tl.load(vector + c, mask=c < channels, other=0).to(ACCUMULATOR)[:, None]
    else:
        column = 0
    return column


@triton.jit
def _row_of_tap(number):
    """0, -1, 1, -2, 2, ...: the middle row of the kernel first."""
    return tl.where(number % 2 == 0, number // 2, -(number // 2) - 1)


@triton.jit
def _zeros(
    TAPS: tl.constexpr,
    CHANNELS_BLOCK: tl.constexpr,
    CHANNELS_REST: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    dtype: tl.constexpr,
):
    """By tap, the sums of a program: of both blocks of channels with both of outputs."""
    c: tl.constexpr = CHANNELS_REST if CHANNELS_REST > 0 else 1
    k: tl.constexpr = REST if REST > 0 else 1
    sums = ()
    for _ in tl.static_range(TAPS):
        one = (
            tl.zeros((CHANNELS_BLOCK, BLOCK), dtype),
            tl.zeros((CHANNELS_BLOCK, k), dtype),
            tl.zeros((c, BLOCK), dtype),
            tl.zeros((c, k), dtype),
        )
        sums += (one,)
    return sums


@triton.jit
def _added(
    sums,
    y,
    y_rest,
    grads,
    grads_rest,
    CHANNELS_REST: tl.constexpr,
    REST: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The sums of a tap with one patch more."""
    whole, rest_k, rest_c, rest = sums
    whole = dot(y, grads, whole, PRECISION, UPCAST)
    if REST > 0:
        rest_k = dot(y, grads_rest, rest_k, PRECISION, UPCAST)
    if CHANNELS_REST > 0:
        rest_c = dot(y_rest, grads, rest_c, PRECISION, UPCAST)
        if REST > 0:
            rest = dot(y_rest, grads_rest, rest, PRECISION, UPCAST)
    return whole, rest_k, rest_c, rest


@triton.jit
def _store(partial, sums, c, channels, padded_k, k):
    at = partial + c[:, None] * padded_k + k[None, :]
    tl.store(at, sums, mask=(c < channels)[:, None])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_weight(
    partial,
    scale,
    shift,
    prepared_grad,
    sources,
    N,
    H,
    W,
    total_channels,
    grad_pitch,
    radius_h,
    radius_w,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    AFFINE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PIXELS: tl.constexpr,
    TAPS: tl.constexpr,
    COLUMN: tl.constexpr,
    CHANNELS_BLOCK: tl.constexpr,
    CHANNELS_REST: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The weight gradient; program (block of channels at TAPS taps of a column, slab, outputs).

    Only live taps have programs, and the slabs divide the rows of all images. psi is evaluated on
    load, and a tile of the sources serves all taps of the program: the gradient of the output is
    what moves, `prepared_grad` (N, H, W, grad_pitch) as prepare.py writes it. `partial` is
    (slabs, kh, kw, sum C_i, padded K): the host sums the slabs in this order, so that the result
    does not depend on which program ends first.

    Nothing that a tap does not see may reach its sum, not even times zero: it may be NaN.
    """
    s = source_of(sources, tl.program_id(0))
    channels = number(sources, s, CHANNELS).to(tl.int32)
    dilation_h = number(sources, s, DILATION_H).to(tl.int32)
    dilation_w = number(sources, s, DILATION_W).to(tl.int32)
    live_h = tl.minimum(radius_h, (H - 1) // dilation_h)
    live_w = tl.minimum(radius_w, (W - 1) // dilation_w)
    groups_h = tl.cdiv(2 * live_h + 1, TAPS)
    groups = (2 * live_w + 1) * groups_h
    local = tl.program_id(0) - number(sources, s, FIRST_BLOCK).to(tl.int32)
    first_tap = local % groups // (2 * live_w + 1) * TAPS
    j = local % groups % (2 * live_w + 1) - live_w
    c = local // groups * (CHANNELS_BLOCK + CHANNELS_REST)
    c_rest = c + CHANNELS_BLOCK + tl.arange(0, CHANNELS_REST if CHANNELS_REST > 0 else 1)
    c += tl.arange(0, CHANNELS_BLOCK)
    k = tl.program_id(2) * (BLOCK + REST) + tl.arange(0, BLOCK)
    k_rest = tl.program_id(2) * (BLOCK + REST) + BLOCK + tl.arange(0, REST if REST > 0 else 1)

    # Column w of the sources meets column w - step_w of the gradient.
    step_w = j * dilation_w
    patches = tl.cdiv(W, PIXELS)  # of a row
    share = tl.cdiv(N.to(tl.int64) * H, tl.num_programs(1))
    line = tl.program_id(1) * share
    end = tl.minimum(line + share, N.to(tl.int64) * H)

    start = number(sources, s, START)
    dtype: tl.constexpr = prepared_grad.dtype.element_ty
    item_bits: tl.constexpr = dtype.primitive_bitwidth
    x = number(sources, s, X).to(tl.pointer_type(dtype))
    stride_n, stride_c = number(sources, s, STRIDE_N), number(sources, s, STRIDE_C)
    stride_h, stride_w = number(sources, s, STRIDE_H), number(sources, s, STRIDE_W)
    factor = _coefficients(scale + start, c, channels, AFFINE, ACCUMULATOR)
    summand = _coefficients(shift + start, c, channels, AFFINE, ACCUMULATOR)
    factor_rest = _coefficients(scale + start, c_rest, channels, AFFINE, ACCUMULATOR)
    summand_rest = _coefficients(shift + start, c_rest, channels, AFFINE, ACCUMULATOR)

    grad_pitch = tl.multiple_of(grad_pitch, GRAIN)
    index = tl.int64 if WIDE else tl.int32
    columns = tl.arange(0, PIXELS).to(index)
    width = W
    if LAYOUT == PLANES:
        width = W // ALIGNED * ALIGNED
    if LAYOUT == CHANNELS_LAST:
        channels = channels // ALIGNED * ALIGNED
    grad_offsets = (columns * grad_pitch)[:, None]

    sums = _zeros(TAPS, CHANNELS_BLOCK, CHANNELS_REST, BLOCK, REST, ACCUMULATOR)
    patch = 0
    n, h = (line // H).to(tl.int32), (line % H).to(tl.int32)
    steps = tl.maximum(end - line, 0).to(tl.int32) * patches
    for _ in tl.range(steps, num_stages=STAGES, disable_licm=True):
        w = patch * PIXELS
        away = w + tl.arange(0, PIXELS) - step_w
        # Left of the image is, without a sign, far right of it.
        inside = w + tl.arange(0, PIXELS) < width
        seen = inside & (away.to(tl.uint32, bitcast=True) < W.to(tl.uint32, bitcast=True))
        at = x + n * stride_n + h * stride_h + w * stride_w
        if LAYOUT != STRIDED:
            at = tl.multiple_of(at, ALIGNED * item_bits // 8)
        y = _normalised(
            at,
            c,
            channels,
            columns,
            stride_c,
            stride_w,
            inside,
            seen,
            factor,
            summand,
            LAYOUT,
            ALIGNED,
            AFFINE,
            RELU,
            ACCUMULATOR,
        )
        y_rest = y
        if CHANNELS_REST > 0:
            y_rest = _normalised(
                at,
                c_rest,
                channels,
                columns,
                stride_c,
                stride_w,
                inside,
                seen,
                factor_rest,
                summand_rest,
                LAYOUT,
                ALIGNED,
                AFFINE,
                RELU,
                ACCUMULATOR,
            )
        grad = prepared_grad + n.to(tl.int64) * H * W * grad_pitch
        more = ()
        for t in tl.static_range(TAPS):
            row = (h - _row_of_tap(first_tap + t) * dilation_h).to(index)
            there = (row >= 0) & (row < H)
            pixel = (row * W + w - step_w).to(index)
            from_grad = grad + pixel * grad_pitch + grad_offsets
            mask = seen[:, None] & there
            grads = tl.load(from_grad + k[None, :], mask=mask, other=0)
            grads_rest = grads
            if REST > 0:
                grads_rest = tl.load(from_grad + k_rest[None, :], mask=mask, other=0)
            own = sums[t]
            # The middle tap's row is there always, which lets all taps share what it reads of y.
            if COLUMN and t == 0:
                own = _added(
                    own, y, y_rest, grads, grads_rest, CHANNELS_REST, REST, PRECISION, UPCAST
                )
            else:
                if there:  # else zeros would meet what may be NaN
                    own = _added(
                        own, y, y_rest, grads, grads_rest, CHANNELS_REST, REST, PRECISION, UPCAST
                    )
            more += (own,)
        sums = more
        patch += 1
        line_done = patch == patches
        patch = tl.where(line_done, 0, patch)
        h += line_done.to(tl.int32)
        image_done = h == H
        h = tl.where(image_done, 0, h)
        n += image_done.to(tl.int32)

    padded_k = tl.num_programs(2) * (BLOCK + REST)
    stride_tap = (2 * radius_w + 1) * total_channels.to(tl.int64) * padded_k
    partial += tl.program_id(1) * (2 * radius_h + 1) * stride_tap
    partial += (j + radius_w) * total_channels * padded_k + start * padded_k
    for t in tl.static_range(TAPS):
        i = _row_of_tap(first_tap + t)
        if first_tap + t <= 2 * live_h:
            to = partial + (i + radius_h) * stride_tap
            whole, rest_k, rest_c, rest = sums[t]
            _store(to, whole, c, channels, padded_k, k)
            if REST > 0:
                _store(to, rest_k, c, channels, padded_k, k_rest)
            if CHANNELS_REST > 0:
                _store(to, rest_c, c_rest, channels, padded_k, k)
                if REST > 0:
                    _store(to, rest, c_rest, channels, padded_k, k_rest)
