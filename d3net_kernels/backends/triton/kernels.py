"""The three kernels: what one program computes. The host side is in launch.py.

All are implicit matrix products over pixels. In the forward pass and the data gradient a program
owns a tile of pixels of one image, which runs along the rows, flattened, so that any map fills it.
Per source it walks over chunks of channels and, within one, over those taps that reach into the map
from at least one pixel of the tile. In the weight gradient a program owns a block of channels at one
tap and walks over a slab of rows, those only whose tap is inside the map.

Outputs are covered by one block of a power of two, BLOCK, and optionally a smaller one behind it,
REST: 36 outputs are 32 + 8 and not 64.

Numbers that belong to a source come as one tuple per source. They are packed so that Triton does not
compile anew for each of their values (see launch.py), and chosen at run time, so that the code does
not grow with the number of sources.
"""

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
FIRST_BLOCK = tl.constexpr(9)  # the first program whose block of channels is its
# In the data gradient also its dense gradient, a null pointer where that is not wanted.
GRAD = tl.constexpr(10)
GRAD_STRIDE_N = tl.constexpr(11)
GRAD_STRIDE_C = tl.constexpr(12)
GRAD_STRIDE_W = tl.constexpr(13)

# How all sources lie in memory.
PLANES = tl.constexpr(0)  # the pixels of a channel are adjacent
CHANNELS_LAST = tl.constexpr(1)  # the channels of a pixel are adjacent, and its pixels evenly spaced
STRIDED = tl.constexpr(2)

# Sizes that differ from layer to layer, and whose alignment or being 1 helps nothing.
UNSPECIALIZED = ["num_sources", "H", "W", "K", "total_channels", "radius_h", "radius_w"]

INTERPRETED = triton.knobs.runtime.interpret

PACKED_OFFSET = tl.constexpr(1 << 62)


@triton.jit
def _number(tuples, s, field: tl.constexpr):
    """Number `field` of tuple `s`, which is known at run time only; undoes launch.packed."""
    packed = tuples[0][field]
    for i in tl.static_range(1, len(tuples)):
        packed = tl.where(s == i, tuples[i][field], packed)
    return (packed - PACKED_OFFSET) >> 1


@triton.jit
def _source_of(sources, block):
    """The source that this block of channels belongs to."""
    s = 0
    for i in tl.static_range(1, len(sources)):
        first = (sources[i][FIRST_BLOCK] - PACKED_OFFSET) >> 1
        s += (block >= first).to(tl.int32)
    return s


@triton.jit
def _pixel_offsets(p, W, stride_h, stride_w, LAYOUT: tl.constexpr):
    """Element offsets of the pixels `p` of an image, in the type of `p`."""
    if LAYOUT == PLANES:
        return p
    if LAYOUT == CHANNELS_LAST:
        return p * stride_w.to(p.dtype)
    return (p // W) * stride_h.to(p.dtype) + (p % W) * stride_w.to(p.dtype)


@triton.jit
def _patch_offsets(row, column, stride_h, stride_w, LAYOUT: tl.constexpr):
    """Element offsets of the pixels of a patch."""
    if LAYOUT == PLANES:
        return row * stride_h.to(row.dtype) + column
    return row * stride_h.to(row.dtype) + column * stride_w.to(row.dtype)


@triton.jit
def _channel_offsets(c, stride_c, LAYOUT: tl.constexpr):
    if LAYOUT == CHANNELS_LAST:
        return c
    return c * stride_c.to(c.dtype)


@triton.jit
def _aligned(pointer, LAYOUT: tl.constexpr, ALIGNED: tl.constexpr):
    """Let loads of channels_last sources be vectors where the host found every pixel aligned."""
    if LAYOUT == CHANNELS_LAST and ALIGNED > 1:
        return tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _psi(x, scale, shift, AFFINE: tl.constexpr, RELU: tl.constexpr):
    if AFFINE:
        x = x * scale + shift
    if RELU:
        x = tl.maximum(x, tl.zeros_like(x), propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b; UPCAST because the interpreter multiplies the raw bits of bfloat16."""
    if UPCAST:
        a, b = a.to(acc.dtype), b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _add_source(
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
        _pixel_offsets(p, W, stride_h, stride_w, LAYOUT)[:, None]
        + _channel_offsets(c.to(p.dtype), stride_c, LAYOUT)[None, :]
    )
    i = -up
    j = -left
    start = 0
    for _ in tl.range(taps * tl.cdiv(channels, CHUNK), num_stages=STAGES):
        here = start + c < channels
        step_h, step_w = i * dilation_h, j * dilation_w
        source = h + step_h
        column = w + step_w
        seen = inside & (source >= 0) & (source < H) & (column >= 0) & (column < W)
        pointer = x + (
            start.to(tl.int64) * stride_c
            + step_h.to(tl.int64) * stride_h
            + step_w.to(tl.int64) * stride_w
        )
        pointer = _aligned(pointer, LAYOUT, ALIGNED)
        y = tl.load(pointer + offsets, mask=seen[:, None] & here[None, :], other=0)
        if AFFINE or RELU:
            y = y.to(acc.dtype)
            if AFFINE:
                factor = tl.load(scale + start + c, mask=here, other=0).to(acc.dtype)
                summand = tl.load(shift + start + c, mask=here, other=0).to(acc.dtype)
                y = _psi(y, factor[None, :], summand[None, :], AFFINE, RELU)
                y = tl.where(seen[:, None], y, tl.zeros_like(y))
            else:
                y = _psi(y, 0, 0, AFFINE, RELU)
            y = y.to(weight.dtype.element_ty)
        tap = (
            weight
            + start * weight_stride_c
            + i * weight_stride_h
            + j * weight_stride_w
            + c[:, None] * weight_stride_c
        )
        acc = _dot(y, tl.load(tap + k[None, :], mask=here[:, None], other=0), acc, PRECISION, UPCAST)
        if REST > 0:
            more = tl.load(tap + k_rest[None, :], mask=here[:, None], other=0)
            rest = _dot(y, more, rest, PRECISION, UPCAST)
        j += 1
        row_done = j > right
        j = tl.where(row_done, -left, j)
        i += row_done.to(tl.int32)
        all_done = i > down
        i = tl.where(all_done, -up, i)
        start += tl.where(all_done, CHUNK, 0)
    return acc, rest


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
    """One block of outputs; with MOMENTS also each channel's sum and sum of squared deviations."""
    there = k < K
    if BIAS:
        acc += tl.load(bias + k, mask=there, other=0).to(acc.dtype)[None, :]
    values = acc.to(out.dtype.element_ty)
    offsets = p[:, None] * out_stride_w + k.to(p.dtype)[None, :] * out_stride_c
    tl.store(out + offsets, values, mask=inside[:, None] & there[None, :])
    if MOMENTS:
        kept = tl.where(inside[:, None], values.to(acc.dtype), tl.zeros_like(acc))
        total = tl.sum(kept, 0)
        mean = total / tl.sum(inside.to(acc.dtype), 0)
        away = tl.where(inside[:, None], kept - mean[None, :], tl.zeros_like(acc))
        tl.store(moments + k, total, mask=there)
        tl.store(moments + K + k, tl.sum(away * away, 0), mask=there)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward(
    out,
    moments,
    weight,
    bias,
    scale,
    shift,
    sources,
    num_sources,
    H,
    W,
    K,
    total_channels,
    out_stride_n,
    out_stride_c,
    out_stride_w,
    radius_h,
    radius_w,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    AFFINE: tl.constexpr,
    RELU: tl.constexpr,
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

    `weight` is (kh, kw, sum C_i, K), zeros behind the last K to whole blocks. `moments` is
    (programs of axis 0, 2, K).
    """
    tiles = tl.cdiv(H * W, PIXELS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles
    if WIDE:
        first = first.to(tl.int64)
    first *= PIXELS
    p = first + tl.arange(0, PIXELS)
    k = tl.program_id(1) * (BLOCK + REST) + tl.arange(0, BLOCK)
    k_rest = tl.program_id(1) * (BLOCK + REST) + BLOCK + tl.arange(0, REST if REST > 0 else 1)

    weight_stride_c = tl.cdiv(K, BLOCK + REST).to(tl.int64) * (BLOCK + REST)
    weight_stride_w = total_channels * weight_stride_c
    weight_stride_h = (2 * radius_w + 1) * weight_stride_w
    weight += radius_h * weight_stride_h + radius_w * weight_stride_w
    acc = tl.zeros((PIXELS, BLOCK), ACCUMULATOR)
    rest = tl.zeros((PIXELS, REST if REST > 0 else 1), ACCUMULATOR)
    for s in range(num_sources):
        x = _number(sources, s, X).to(tl.pointer_type(weight.dtype.element_ty))
        channels = _number(sources, s, CHANNELS).to(tl.int32)
        acc, rest = _add_source(
            acc,
            rest,
            x + n * _number(sources, s, STRIDE_N),
            channels,
            _number(sources, s, STRIDE_C),
            _number(sources, s, STRIDE_H),
            _number(sources, s, STRIDE_W),
            _number(sources, s, DILATION_H),
            _number(sources, s, DILATION_W),
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
            LAYOUT,
            ALIGNED,
            AFFINE,
            RELU,
            PRECISION,
            UPCAST,
            PIXELS,
            CHUNK,
            REST,
            STAGES,
        )
        weight += channels * weight_stride_c
        if AFFINE:
            scale += channels
            shift += channels

    inside = p < H * W
    out += n * out_stride_n
    moments += tl.program_id(0).to(tl.int64) * 2 * K
    _write_output(
        out, moments, bias, acc, p, k, K, inside, out_stride_c, out_stride_w, BIAS, MOMENTS
    )
    if REST > 0:
        _write_output(
            out, moments, bias, rest, p, k_rest, K, inside, out_stride_c, out_stride_w, BIAS, MOMENTS
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
    p,
    c,
    channels,
    total_channels,
    inside,
    offsets,
    stride_c,
    grad_stride_c,
    grad_stride_w,
    LAYOUT: tl.constexpr,
    AFFINE: tl.constexpr,
    RELU: tl.constexpr,
):
    """From the gradient of psi(x) to that of x, and this tile's share of those of scale, shift."""
    there = c < channels
    mask = inside[:, None] & there[None, :]
    if AFFINE or RELU:
        at = offsets[:, None] + _channel_offsets(c.to(offsets.dtype), stride_c, LAYOUT)[None, :]
        values = tl.load(x + at, mask=mask, other=0).to(acc.dtype)
        if AFFINE:
            factor = tl.load(scale + c, mask=there, other=0).to(acc.dtype)
            summand = tl.load(shift + c, mask=there, other=0).to(acc.dtype)
            y = values * factor[None, :] + summand[None, :]
        else:
            y = values
        if RELU:  # what is NaN passes
            acc = tl.where(y <= 0, tl.zeros_like(acc), acc)
        if AFFINE:
            tl.store(sums + c, tl.sum(acc * values, 0), mask=there)
            tl.store(sums + total_channels + c, tl.sum(acc, 0), mask=there)
            acc *= factor[None, :]
    if wanted:
        to = p[:, None] * grad_stride_w.to(p.dtype) + c.to(p.dtype)[None, :] * grad_stride_c.to(p.dtype)
        tl.store(grad + to, acc.to(grad.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_data(
    sums,
    weight,
    scale,
    shift,
    outputs,
    sources,
    H,
    W,
    K,
    total_channels,
    radius_h,
    radius_w,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOURCE_LAYOUT: tl.constexpr,
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

    It is the convolution once more: the gradient of the output, which `outputs` holds, is the only
    source, and the taps come in reverse. `weight` is (kh, kw, K, channels), where every source fills
    whole blocks with zeros. `sums` is (programs of axis 0, 2, sum C_i): of m x gy and of m gy.
    """
    tiles = tl.cdiv(H * W, PIXELS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles
    if WIDE:
        first = first.to(tl.int64)
    first *= PIXELS
    p = first + tl.arange(0, PIXELS)
    inside = p < H * W

    block = tl.program_id(1)
    s = _source_of(sources, block)
    channels = _number(sources, s, CHANNELS).to(tl.int32)
    start = _number(sources, s, START)
    c = (block - _number(sources, s, FIRST_BLOCK).to(tl.int32)) * (BLOCK + REST)
    c_rest = c + BLOCK + tl.arange(0, REST if REST > 0 else 1)
    c += tl.arange(0, BLOCK)

    dtype: tl.constexpr = weight.dtype.element_ty
    weight_stride_k = tl.num_programs(1).to(tl.int64) * (BLOCK + REST)
    weight_stride_w = K * weight_stride_k
    weight_stride_h = (2 * radius_w + 1) * weight_stride_w
    weight += radius_h * weight_stride_h + radius_w * weight_stride_w + block * (BLOCK + REST)
    acc, rest = _add_source(
        tl.zeros((PIXELS, BLOCK), ACCUMULATOR),
        tl.zeros((PIXELS, REST if REST > 0 else 1), ACCUMULATOR),
        _number(outputs, 0, X).to(tl.pointer_type(dtype)) + n * _number(outputs, 0, STRIDE_N),
        K,
        _number(outputs, 0, STRIDE_C),
        _number(outputs, 0, STRIDE_H),
        _number(outputs, 0, STRIDE_W),
        _number(sources, s, DILATION_H),
        _number(sources, s, DILATION_W),
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
        scale,
        shift,
        LAYOUT,
        ALIGNED,
        False,
        False,
        PRECISION,
        UPCAST,
        PIXELS,
        CHUNK,
        REST,
        STAGES,
    )

    x = _number(sources, s, X).to(tl.pointer_type(dtype)) + n * _number(sources, s, STRIDE_N)
    grad = _number(sources, s, GRAD)
    wanted = grad != 0
    grad = grad.to(tl.pointer_type(dtype)) + n * _number(sources, s, GRAD_STRIDE_N)
    grad_stride_c = _number(sources, s, GRAD_STRIDE_C)
    grad_stride_w = _number(sources, s, GRAD_STRIDE_W)
    stride_c = _number(sources, s, STRIDE_C)
    offsets = _pixel_offsets(
        p, W, _number(sources, s, STRIDE_H), _number(sources, s, STRIDE_W), SOURCE_LAYOUT
    )
    if AFFINE:
        scale += start
        shift += start
        sums += tl.program_id(0).to(tl.int64) * 2 * total_channels + start
    _write_gradient(
        acc,
        x,
        grad,
        wanted,
        sums,
        scale,
        shift,
        p,
        c,
        channels,
        total_channels,
        inside,
        offsets,
        stride_c,
        grad_stride_c,
        grad_stride_w,
        SOURCE_LAYOUT,
        AFFINE,
        RELU,
    )
    if REST > 0:
        _write_gradient(
            rest,
            x,
            grad,
            wanted,
            sums,
            scale,
            shift,
            p,
            c_rest,
            channels,
            total_channels,
            inside,
            offsets,
            stride_c,
            grad_stride_c,
            grad_stride_w,
            SOURCE_LAYOUT,
            AFFINE,
            RELU,
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
    """The weight gradient; program (slab of rows, block of one source's channels at one tap, block
    of outputs).

    The tap decides which rows and columns of the output see the map at all; the slabs divide these
    rows, of all images. `partial` is (slabs, kh, kw, sum C_i, padded K): the slabs are summed by the
    host, in this order, so that the result does not depend on which program ends first.
    """
    taps_w = 2 * radius_w + 1
    taps = (2 * radius_h + 1) * taps_w
    tap = tl.program_id(1) % taps
    block = tl.program_id(1) // taps
    s = _source_of(sources, block)
    channels = _number(sources, s, CHANNELS).to(tl.int32)
    c = (block - _number(sources, s, FIRST_BLOCK).to(tl.int32)) * CHANNELS_BLOCK
    c += tl.arange(0, CHANNELS_BLOCK)
    here = c < channels
    k = tl.program_id(2) * (BLOCK + REST) + tl.arange(0, BLOCK)
    k_rest = tl.program_id(2) * (BLOCK + REST) + BLOCK + tl.arange(0, REST if REST > 0 else 1)

    # Output row h reads row h + step_h: rows above..above + rows - 1 see the map, likewise columns.
    step_h = (tap // taps_w - radius_h) * _number(sources, s, DILATION_H)
    step_w = (tap % taps_w - radius_w) * _number(sources, s, DILATION_W)
    above = tl.maximum(-step_h, 0)
    before = tl.maximum(-step_w, 0)
    rows = tl.maximum(H - tl.abs(step_h), 0)
    columns = tl.maximum(W - tl.abs(step_w), 0).to(tl.int32)
    patch_rows: tl.constexpr = PIXELS // COLUMNS
    strips = tl.cdiv(rows, patch_rows)
    share = tl.cdiv(N * strips, tl.num_programs(0))
    strip = tl.program_id(0) * share
    end = tl.minimum(strip + share, N * strips)

    stride_n = _number(sources, s, STRIDE_N)
    stride_h = _number(sources, s, STRIDE_H)
    stride_w = _number(sources, s, STRIDE_W)
    g_stride_n = _number(outputs, 0, STRIDE_N)
    g_stride_h = _number(outputs, 0, STRIDE_H)
    g_stride_w = _number(outputs, 0, STRIDE_W)
    x = _number(sources, s, X).to(tl.pointer_type(DTYPE))
    x += (above + step_h) * stride_h + (before + step_w) * stride_w
    g = _number(outputs, 0, X).to(tl.pointer_type(DTYPE)) + above * g_stride_h + before * g_stride_w

    row = tl.arange(0, PIXELS) // COLUMNS
    column = tl.arange(0, PIXELS) % COLUMNS
    index = tl.int64 if WIDE else tl.int32
    x_offsets = (
        _channel_offsets(c.to(index), _number(sources, s, STRIDE_C), SOURCE_LAYOUT)[:, None]
        + _patch_offsets(row.to(index), column, stride_h, stride_w, SOURCE_LAYOUT)[None, :]
    )
    g_pixels = _patch_offsets(row.to(index), column, g_stride_h, g_stride_w, LAYOUT)[:, None]
    g_stride_c = _number(outputs, 0, STRIDE_C)
    g_offsets = g_pixels + _channel_offsets(k.to(index), g_stride_c, LAYOUT)[None, :]
    g_rest_offsets = g_pixels + _channel_offsets(k_rest.to(index), g_stride_c, LAYOUT)[None, :]
    if AFFINE:
        start = _number(sources, s, START)
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
            if AFFINE:
                y = _psi(y, factor, summand, AFFINE, RELU)
            else:
                y = _psi(y, 0, 0, AFFINE, RELU)
            y = y.to(DTYPE)
        from_g = g + n * g_stride_n + h * g_stride_h + w * g_stride_w
        grads = tl.load(from_g + g_offsets, mask=there[:, None] & (k < K)[None, :], other=0)
        acc = _dot(y, grads, acc, PRECISION, UPCAST)
        if REST > 0:
            mask = there[:, None] & (k_rest < K)[None, :]
            grads_rest = tl.load(from_g + g_rest_offsets, mask=mask, other=0)
            rest = _dot(y, grads_rest, rest, PRECISION, UPCAST)
        patch += 1
        strip_done = patch == patches
        patch = tl.where(strip_done, 0, patch)
        strip += strip_done.to(tl.int64)

    padded_k = tl.num_programs(2) * (BLOCK + REST)
    at = (tl.program_id(0) * taps + tap).to(tl.int64) * total_channels
    partial += (at + _number(sources, s, START)) * padded_k
    tl.store(partial + c[:, None] * padded_k + k[None, :], acc, mask=here[:, None])
    if REST > 0:
        tl.store(partial + c[:, None] * padded_k + k_rest[None, :], rest, mask=here[:, None])
