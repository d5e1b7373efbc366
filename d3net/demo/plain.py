"""The D2 block as a careful writer computes it in plain torch: the fused one's measure."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from d3net_kernels import D2Block, use_backend


class PlainD2Block(D2Block):
    """`D2Block` without any fused kernel; the same parameters and results.

    See :func:`d3net_kernels.reference.d2_block`.
    """

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """(N, C_0, H, W) -> (N, k * out_layers, H, W)."""
        with use_backend("reference"):
            return super().forward(x)
