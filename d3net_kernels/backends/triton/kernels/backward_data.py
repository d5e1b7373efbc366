"""The data gradient, and those of scale and shift with it."""

from __future__ import annotations

import triton
import triton.language as tl

from .add_source import add_source
from .parts import (
    CHANNELS,
    CHANNELS_LAST,
    DILATION_H,
    DILATION_W,
    FIRST_BLOCK,
    GRAD,
    GRAD_STRIDE_C,
    GRAD_STRIDE_H,
    GRAD_STRIDE_N,
    GRAD_STRIDE_W,
    PLANES,
    START,
    STRIDE_C,
    STRIDE_H,
    STRIDE_N,
    STRIDE_W,
    UNSPECIALIZED,
    X,
    area_of,
    channel_offsets,
    number,
    pixel_offsets,
    psi,
    source_of,
)


@triton.jit
def _write_gradient(
    acc,
    x,
    grad,
    wanted,
    sums,
    scale,
    shift,
    c,
    channels,
    total_channels,
    inside,
    offsets,
    stride_c,
    grad_stride_c,
    pixels,
    LAYOUT: tl.constexpr,
    GRAD_LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    AFFINE: tl.constexpr,
    RELU: tl.constexpr,
):
    """From the gradient of psi(x) to that of x, and this tile's share of those of scale, shift."""
    there = c < channels
    mask = inside[:, None] & there[None, :]
    if AFFINE or RELU:
        at = (
            offsets[:, None]
            + channel_offsets(c.to(offsets.dtype), stride_c, LAYOUT, ALIGNED)[None, :]
        )
        values = tl.load(x + at, mask=mask, other=0).to(acc.dtype)
        factor = 0
        summand = 0
        if AFFINE:
            factor = tl.load(scale + c, mask=there, other=0).to(acc.dtype)[None, :]
            summand = tl.load(shift + c, mask=there, other=0).to(acc.dtype)[None, :]
        y = psi(values, factor, summand, AFFINE, False)
        if RELU:  # what is NaN passes
            acc = tl.where(y <= 0, tl.zeros_like(acc), acc)
        if AFFINE:
            acc = tl.where(inside[:, None], acc, tl.zeros_like(acc))
            tl.store(sums + c, tl.sum(acc * values, 0), mask=there)
            tl.store(sums + total_channels + c, tl.sum(acc, 0), mask=there)
            acc *= factor
    if wanted:
        columns = channel_offsets(c.to(pixels.dtype), grad_stride_c, GRAD_LAYOUT, ALIGNED)
        to = pixels[:, None] + columns[None, :]
        tl.store(grad + to, acc.to(grad.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_data(
    sums,
    weight,
    scale,
    shift,
    prepared,
    sources,
    H,
    W,
    total_channels,
    pitch,
    radius_h,
    radius_w,
    LAYOUT: tl.constexpr,
    GRAD_LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    AFFINE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The data gradient; program (tile of pixels, block of channels of one source).

    It is the convolution once more: the gradient of the output, which `prepared` (N, H, W, pitch)
    holds as prepare.py writes it, is the only source, and the taps come in reverse. `weight` is
    (kh, kw, pitch, channels), where zeros fill the last block of every source and the channels
    behind the last output. ALIGNED holds of the sources and of their gradients. `sums` is
    (programs of axis 0, 2, sum C_i): of m x gy and of m gy.
    """
    area = area_of(H, W, WIDE)
    tiles = tl.cdiv(area, PIXELS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles  # 64 bits where the area has them
    first *= PIXELS
    p = first + tl.arange(0, PIXELS)
    pixels_inside = area
    if LAYOUT == PLANES:
        pixels_inside = area // ALIGNED * ALIGNED
    inside = p < pixels_inside

    block = tl.program_id(1)
    s = source_of(sources, block)
    channels = number(sources, s, CHANNELS).to(tl.int32)
    if LAYOUT == CHANNELS_LAST:
        channels = tl.multiple_of(channels, ALIGNED)
    start = number(sources, s, START)
    c = (block - number(sources, s, FIRST_BLOCK).to(tl.int32)) * (BLOCK + REST)
    c_rest = c + BLOCK + tl.arange(0, REST if REST > 0 else 1)
    c += tl.arange(0, BLOCK)

    dtype: tl.constexpr = weight.dtype.element_ty
    pitch = tl.multiple_of(pitch, CHUNK)
    weight_stride_k = tl.num_programs(1) * (BLOCK + REST)
    weight_stride_w = pitch.to(tl.int64) * weight_stride_k
    weight_stride_h = (2 * radius_w + 1) * weight_stride_w
    weight += radius_h * weight_stride_h + radius_w * weight_stride_w + block * (BLOCK + REST)
    acc, rest = add_source(
        tl.zeros((PIXELS, BLOCK), ACCUMULATOR),
        tl.zeros((PIXELS, REST if REST > 0 else 1), ACCUMULATOR),
        prepared + n * H * W * pitch,
        pitch // CHUNK,
        pitch,
        number(sources, s, DILATION_H).to(tl.int32),
        number(sources, s, DILATION_W).to(tl.int32),
        p,
        first,
        H,
        W,
        weight,
        weight_stride_k,
        -weight_stride_h,
        -weight_stride_w,
        tl.arange(0, BLOCK),
        BLOCK + tl.arange(0, REST if REST > 0 else 1),
        radius_h,
        radius_w,
        PRECISION,
        UPCAST,
        PIXELS,
        CHUNK,
        REST,
        STAGES,
    )

    x = number(sources, s, X).to(tl.pointer_type(dtype)) + n * number(sources, s, STRIDE_N)
    grad = number(sources, s, GRAD)
    wanted = grad != 0
    grad = grad.to(tl.pointer_type(dtype)) + n * number(sources, s, GRAD_STRIDE_N)
    item_bits: tl.constexpr = dtype.primitive_bitwidth
    x = tl.multiple_of(x, ALIGNED * item_bits // 8)
    grad = tl.multiple_of(grad, ALIGNED * item_bits // 8)
    grad_stride_c = number(sources, s, GRAD_STRIDE_C)
    pixels = pixel_offsets(
        p,
        W,
        number(sources, s, GRAD_STRIDE_H),
        number(sources, s, GRAD_STRIDE_W),
        GRAD_LAYOUT,
        ALIGNED,
    )
    stride_c = number(sources, s, STRIDE_C)
    offsets = pixel_offsets(
        p, W, number(sources, s, STRIDE_H), number(sources, s, STRIDE_W), LAYOUT, ALIGNED
    )
    if AFFINE:
        scale += start
        shift += start
        sums += tl.program_id(0).to(tl.int64) * 2 * total_channels + start
    # The smaller block first: fewer registers are alive when the larger one needs most.
    if REST > 0:
        _write_gradient(
            rest,
            x,
            grad,
            wanted,
            sums,
            scale,
            shift,
            c_rest,
            channels,
            total_channels,
            inside,
            offsets,
            stride_c,
            grad_stride_c,
            pixels,
            LAYOUT,
            GRAD_LAYOUT,
            ALIGNED,
            AFFINE,
            RELU,
        )
    _write_gradient(
        acc,
        x,
        grad,
        wanted,
        sums,
        scale,
        shift,
        c,
        channels,
        total_channels,
        inside,
        offsets,
        stride_c,
        grad_stride_c,
        pixels,
        LAYOUT,
        GRAD_LAYOUT,
        ALIGNED,
        AFFINE,
        RELU,
    )
