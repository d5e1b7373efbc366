"""The workspace in which psi of all sources lies as the kernels read it (kernels/prepare.py)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ... import _layout
from .kernels.prepare import prepare as kernel
from .views import Source, View, alignment, layout_of, need_wide_offsets, packed_sources

_PIXELS, _PIXELS_SCATTERED, _WARPS = 512, 128, 4  # of a program; see configs.Key


class Prepared(NamedTuple):
    """psi of sources: (N, H, W, pitch), and the first channel of each source in it.

    Zeros fill up every source to whole chunks of channels, and the last one to the pitch.
    """

    data: Tensor
    starts: list[int]

    @property
    def pitch(self) -> int:
        return self.data.shape[3]

    @property
    def image(self) -> Tensor:
        """The data as (N, pitch, H, W)."""
        return self.data.permute(0, 3, 1, 2)


def prepare(
    inputs: Sequence[Tensor],
    chunk: int,
    at_least: int = 0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
) -> Prepared:
    """psi of `inputs`, each in whole chunks of channels, with a pitch of `at_least` so many."""
    n, _, height, width = inputs[0].shape
    views = [View.of(x) for x in inputs]
    starts = [0, *itertools.accumulate(view.channels for view in views)]
    blocks = [0, *itertools.accumulate(-(-view.channels // chunk) for view in views)]
    total = max(blocks[-1], -(-at_least // chunk))
    data = inputs[0].new_empty((n, height, width, total * chunk))
    prepared = Prepared(data, [block * chunk for block in blocks[:-1]])
    sources = [
        Source(view, (1, 1), start, at, block).numbers()
        for view, start, at, block in zip(views, starts, prepared.starts, blocks, strict=False)
    ]
    layout = layout_of(views, width)
    aligned = alignment(views, layout, height * width, data.element_size())
    accumulator = _layout.dtype_for(data)
    wide = need_wide_offsets([prepared.image, *inputs])
    pixels = _PIXELS_SCATTERED if wide or aligned == 1 else _PIXELS
    with torch.cuda.device(data.device if data.is_cuda else -1):
        kernel[(n * -(-height * width // pixels), total)](
            data,
            # The kernel takes some tensor for what is not there, and does not touch it.
            data if scale is None else scale.contiguous(),
            data if shift is None else shift.contiguous(),
            packed_sources(sources),
            height,
            width,
            prepared.pitch,
            LAYOUT=layout,
            ALIGNED=aligned,
            WIDE=wide,
            AFFINE=scale is not None,
            RELU=relu,
            ACCUMULATOR=tl.float64 if accumulator == torch.float64 else tl.float32,
            PIXELS=pixels,
            CHANNELS_BLOCK=chunk,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return prepared
