"""Mean and variance of all pixels out of those of the tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _of_tiles(parts, first, tiles, k, K, TILES: tl.constexpr):
    """What forward.py wrote of TILES tiles, zeros behind the last one: all that adds nothing."""
    t = first + tl.arange(0, TILES)
    there = (t < tiles)[:, None] & (k < K)[None, :]
    at = parts + (t.to(tl.int64) * 4 * K)[:, None] + k[None, :]
    pivot = tl.load(at, mask=there, other=0).to(tl.float64)
    rest = tl.load(at + K, mask=there, other=0).to(tl.float64)
    squares = tl.load(at + 2 * K, mask=there, other=0).to(tl.float64)
    count = tl.load(at + 3 * K, mask=there, other=0).to(tl.float64)
    return pivot, rest, squares, count


@triton.jit(do_not_specialize=["tiles", "K"])
def finish_moments(parts, mean, var, tiles, K, TILES: tl.constexpr, CHANNELS: tl.constexpr):
    """The mean first, then the squares about it; program (block of channels).

    `parts` is (tiles, 4, K); see forward.py.
    """
    k = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((TILES, CHANNELS), tl.float64)
    counts = tl.zeros((TILES, CHANNELS), tl.float64)
    for first in range(0, tiles, TILES):
        pivot, rest, squares, count = _of_tiles(parts, first, tiles, k, K, TILES)
        total += count * pivot + rest
        counts += count
    pixels = tl.maximum(tl.sum(counts, 0), 1)  # none behind the last channel
    average = tl.sum(total, 0) / pixels
    deviations = tl.zeros((TILES, CHANNELS), tl.float64)
    for first in range(0, tiles, TILES):
        pivot, rest, squares, count = _of_tiles(parts, first, tiles, k, K, TILES)
        away = pivot - average[None, :]
        deviations += squares + away * (2 * rest + count * away)
    tl.store(mean + k, average.to(mean.dtype.element_ty), mask=k < K)
    variance = tl.sum(deviations, 0) / pixels
    tl.store(var + k, variance.to(var.dtype.element_ty), mask=k < K)
