"""The forward pass."""

from __future__ import annotations

import triton
import triton.language as tl

from .add_source import add_source
from .parts import (
    CHANNELS,
    DILATION_H,
    DILATION_W,
    PREPARED_START,
    UNALIGNED,
    UNSPECIALIZED,
    area_of,
    number,
)


@triton.jit
def _write_output(
    out,
    moments,
    bias,
    acc,
    p,
    k,
    K,
    inside,
    out_stride_c,
    out_stride_w,
    BIAS: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """One block of outputs; with MOMENTS also of each (pivot, sum and sum of squares of the
    distances from it, count): the pivot is the mean as rounded, so that no mean, however large,
    cancels."""
    there = k < K
    if BIAS:
        acc += tl.load(bias + k, mask=there, other=0).to(acc.dtype)[None, :]
    values = acc.to(out.dtype.element_ty)
    offsets = p[:, None] * out_stride_w + k.to(p.dtype)[None, :] * out_stride_c
    tl.store(out + offsets, values, mask=inside[:, None] & there[None, :])
    if MOMENTS:
        kept = tl.where(inside[:, None], values.to(acc.dtype), tl.zeros_like(acc))
        count = tl.sum(inside.to(acc.dtype), 0)
        pivot = tl.sum(kept, 0) / count
        away = tl.where(inside[:, None], kept - pivot[None, :], tl.zeros_like(acc))
        tl.store(moments + k, pivot, mask=there)
        tl.store(moments + K + k, tl.sum(away, 0), mask=there)
        tl.store(moments + 2 * K + k, tl.sum(away * away, 0), mask=there)
        tl.store(moments + 3 * K + k, count, mask=there)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def forward(
    out,
    moments,
    weight,
    bias,
    prepared,
    sources,
    num_sources,
    H,
    W,
    K,
    pitch,
    out_stride_n,
    out_stride_c,
    out_stride_w,
    radius_h,
    radius_w,
    WIDE: tl.constexpr,
    BIAS: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The forward pass; program (tile of pixels, block of outputs).

    `prepared` is (N, H, W, pitch), psi of all sources as prepare.py writes it. `weight` is
    (kh, kw, pitch, K), zeros at the channels that fill up sources and behind the last K to whole
    blocks. `moments` is (programs of axis 0, 4, K).
    """
    area = area_of(H, W, WIDE)
    tiles = tl.cdiv(area, PIXELS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles  # 64 bits where the area has them
    first *= PIXELS
    p = first + tl.arange(0, PIXELS)
    k = tl.program_id(1) * (BLOCK + REST) + tl.arange(0, BLOCK)
    k_rest = tl.program_id(1) * (BLOCK + REST) + BLOCK + tl.arange(0, REST if REST > 0 else 1)

    pitch = tl.multiple_of(pitch, CHUNK)
    prepared += n * H * W * pitch
    weight_stride_c = tl.num_programs(1) * (BLOCK + REST)
    weight_stride_w = pitch.to(tl.int64) * weight_stride_c
    weight_stride_h = (2 * radius_w + 1) * weight_stride_w
    weight += radius_h * weight_stride_h + radius_w * weight_stride_w
    acc = tl.zeros((PIXELS, BLOCK), ACCUMULATOR)
    rest = tl.zeros((PIXELS, REST if REST > 0 else 1), ACCUMULATOR)
    for s in range(num_sources):
        start = tl.multiple_of(number(sources, s, PREPARED_START).to(tl.int32), CHUNK)
        acc, rest = add_source(
            acc,
            rest,
            prepared + start,
            tl.cdiv(number(sources, s, CHANNELS).to(tl.int32), CHUNK),
            pitch,
            number(sources, s, DILATION_H).to(tl.int32),
            number(sources, s, DILATION_W).to(tl.int32),
            p,
            first,
            H,
            W,
            weight + start * weight_stride_c,
            weight_stride_c,
            weight_stride_h,
            weight_stride_w,
            k,
            k_rest,
            radius_h,
            radius_w,
            PRECISION,
            UPCAST,
            PIXELS,
            CHUNK,
            REST,
            STAGES,
        )

    inside = p < area
    out += n * out_stride_n
    moments += tl.program_id(0).to(tl.int64) * 4 * K
    _write_output(
        out, moments, bias, acc, p, k, K, inside, out_stride_c, out_stride_w, BIAS, MOMENTS
    )
    if REST > 0:
        _write_output(
            out,
            moments,
            bias,
            rest,
            p,
            k_rest,
            K,
            inside,
            out_stride_c,
            out_stride_w,
            BIAS,
            MOMENTS,
        )
