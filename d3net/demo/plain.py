"""The D2 block as a careful writer computes it in plain torch: the fused one's measure."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3net_kernels import D2Block


class PlainD2Block(D2Block):
    """`D2Block` (norm="per_source") without any fused kernel; the same parameters and results.

    Every source is normalised once for all its layers, then each layer adds up one convolution a
    source. Of the forms plain torch allows this one keeps the least for backward, and in the faster
    memory layout none was faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_0, H, W) -> (N, k * out_layers, H, W)."""
        k = self.growth_rate
        layers: list[Tensor] = []
        normalised: list[Tensor] = []
        for layer, norm in enumerate(self.norms):
            normalised.append(F.relu(norm(layers[-1] if layers else x)))
            parts = []
            for i, (source, conv) in enumerate(zip(normalised, self.convs, strict=False)):
                assert isinstance(conv, nn.Conv2d)
                assert conv.bias is not None
                slot = slice((layer - i) * k, (layer - i + 1) * k)
                parts.append(
                    F.conv2d(source, conv.weight[slot], conv.bias[slot], 1, 1 << i, 1 << i)
                )
            layers.append(sum(parts[1:], start=parts[0]))
        return torch.cat(layers[-self.out_layers :], dim=1)
