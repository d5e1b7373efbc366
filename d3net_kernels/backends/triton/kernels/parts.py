"""What the kernels share: numbers of a source, its layout in memory, psi, the product."""

from __future__ import annotations

import triton
import triton.language as tl

# What the tuple of a source holds, by position.
X = tl.constexpr(0)
CHANNELS = tl.constexpr(1)
STRIDE_N = tl.constexpr(2)
STRIDE_C = tl.constexpr(3)
STRIDE_H = tl.constexpr(4)
STRIDE_W = tl.constexpr(5)
DILATION_H = tl.constexpr(6)
DILATION_W = tl.constexpr(7)
START = tl.constexpr(8)  # its first channel among those of all sources
PREPARED_START = tl.constexpr(9)  # its first channel in the workspace of prepare.py
FIRST_BLOCK = tl.constexpr(10)  # the first program whose block of channels is its
# In the data gradient also its dense gradient, a null pointer where that is not wanted.
GRAD = tl.constexpr(11)
GRAD_STRIDE_N = tl.constexpr(12)
GRAD_STRIDE_C = tl.constexpr(13)
GRAD_STRIDE_H = tl.constexpr(14)
GRAD_STRIDE_W = tl.constexpr(15)

# How all sources lie in memory.
PLANES = tl.constexpr(0)  # the pixels of a channel are adjacent
CHANNELS_LAST = tl.constexpr(
    1
)  # the channels of a pixel are adjacent, and its pixels evenly spaced
STRIDED = tl.constexpr(2)

# Sizes that differ from layer to layer, and whose alignment or being 1 helps nothing.
UNSPECIALIZED = ["num_sources", "N", "H", "W", "K", "total_channels", "radius_h", "radius_w"]
# Were outputs known to be aligned, threads would own runs of pixels to write them in one piece, and
# neighbours would read the sources of the data gradient from far apart.
UNALIGNED = ["out_stride_n", "out_stride_c", "out_stride_w"]

PACKED_OFFSET = tl.constexpr(1 << 62)


@triton.jit
def number(tuples, s, field: tl.constexpr):
    """Number `field` of tuple `s`, which is known at run time only; undoes views.packed."""
    packed = tuples[0][field]
    for i in tl.static_range(1, len(tuples)):
        packed = tl.where(s == i, tuples[i][field], packed)
    return (packed - PACKED_OFFSET) >> 1


@triton.jit
def source_of(sources, block):
    """The source that this block of channels belongs to."""
    s = 0
    for i in tl.static_range(1, len(sources)):
        first = (sources[i][FIRST_BLOCK] - PACKED_OFFSET) >> 1
        s += (block >= first).to(tl.int32)
    return s


@triton.jit
def area_of(H, W, WIDE: tl.constexpr):
    """Pixels of an image, in 64 bits where WIDE."""
    return (H.to(tl.int64) if WIDE else H) * W


@triton.jit
def pixel_offsets(p, W, stride_h, stride_w, LAYOUT: tl.constexpr, ALIGNED: tl.constexpr):
    """Element offsets of the pixels `p` of an image, in the type of `p`; multiples of ALIGNED."""
    if LAYOUT == PLANES:
        return p
    if LAYOUT == CHANNELS_LAST:
        return p * tl.multiple_of(stride_w.to(p.dtype), ALIGNED)
    return (p // W) * stride_h.to(p.dtype) + (p % W) * stride_w.to(p.dtype)


@triton.jit
def channel_offsets(c, stride_c, LAYOUT: tl.constexpr, ALIGNED: tl.constexpr):
    """Element offsets of the channels `c`; multiples of ALIGNED where not adjacent."""
    if LAYOUT == CHANNELS_LAST:
        return c
    return c * tl.multiple_of(stride_c.to(c.dtype), ALIGNED)


@triton.jit
def psi(x, scale, shift, AFFINE: tl.constexpr, RELU: tl.constexpr):
    if AFFINE:
        x = tl.fma(x, scale, shift)
    if RELU:
        x = tl.maximum(x, tl.zeros_like(x), propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b; UPCAST because the interpreter multiplies the raw bits of bfloat16."""
    if UPCAST:
        a, b = a.to(acc.dtype), b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
