"""Tensors as the kernels see them: pointers, strides and layouts, packed for the launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .kernels import parts

_LONGEST_NARROW = 1 << 30  # elements; leaves room for what blocks reach beyond a tensor


class View(NamedTuple):
    """A tensor (N, C, H, W); strides of dimensions of size 1 are what suits the kernels best."""

    pointer: int
    channels: int
    stride_n: int
    stride_c: int
    stride_h: int
    stride_w: int

    @staticmethod
    def of(t: Tensor) -> View:
        """The view of `t`."""
        _, c, h, w = t.shape
        stride_n, stride_c, stride_h, stride_w = t.stride()
        if w == 1:
            stride_w = stride_h if h > 1 else 1
        if h == 1:
            stride_h = stride_w * w
        return View(t.data_ptr(), c, stride_n, stride_c if c > 1 else 1, stride_h, stride_w)


class Source(NamedTuple):
    """What a kernel is told about one source; the order is that of parts.py."""

    view: View
    dilation: tuple[int, int]
    start: int  # its first channel among those of all sources
    prepared_start: int  # its first channel in the workspace of all sources
    first_block: int = 0  # the first block of channels that is its

    def numbers(self) -> tuple[int, ...]:
        """All of it in one row."""
        return (*self.view, *self.dilation, self.start, self.prepared_start, self.first_block)


def layout_of(views: Sequence[View], width: int) -> Any:
    """The layout that all of `views` have, by its name in parts.py."""
    if all(v.stride_w == 1 and v.stride_h == width for v in views):
        return parts.PLANES
    if all(v.stride_c == 1 and v.stride_h == width * v.stride_w for v in views):
        return parts.CHANNELS_LAST
    return parts.STRIDED


def alignment(views: Sequence[View], layout: Any, pixels: int, itemsize: int) -> int:
    """How many adjacent elements one load may take: a power of two, to 16 bytes.

    It divides the length and the place of every run of them: the channels of a pixel, or the
    `pixels` of a channel. The stride of an only channel is multiplied by nothing but 0.
    """
    if layout is parts.STRIDED:
        return 1
    elements = 16 // itemsize

    def divided(v: View) -> bool:
        planes = (pixels, v.stride_n, v.stride_c if v.channels > 1 else 0)
        last = (v.channels, v.stride_n, v.stride_h, v.stride_w)
        numbers = planes if layout is parts.PLANES else last
        return not v.pointer % (elements * itemsize) and not any(n % elements for n in numbers)

    while not all(map(divided, views)):
        elements //= 2
    return elements


def need_wide_offsets(tensors: Sequence[Tensor]) -> bool:
    """Whether offsets inside an image of any of `tensors` (N, C, H, W) may not fit 32 bits."""
    return any(
        sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
        >= _LONGEST_NARROW
        for t in tensors
    )


def packed(numbers: Sequence[int]) -> tuple[int, ...]:
    """Odd numbers beyond 32 bits, which Triton treats all alike; parts.number undoes it.

    A number in a tuple that is 1, divisible by 16 or beyond 32 bits otherwise makes a kernel of
    its own: there would be one for every list of channels, dilations and strides.
    """
    return tuple(int(parts.PACKED_OFFSET.value) + 2 * number + 1 for number in numbers)


def packed_sources(rows: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Rows of sources, packed; as many as the next power of two, so that few numbers of sources
    make a kernel of their own. Those behind the last own no block."""
    no_block = 1 << 40
    at = int(parts.FIRST_BLOCK.value)
    unused = (*rows[-1][:at], no_block, *rows[-1][at + 1 :])
    missing = (1 << (len(rows) - 1).bit_length()) - len(rows)
    return tuple(packed(row) for row in (*rows, *[unused] * missing))
