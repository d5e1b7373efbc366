"""A small separator in the manner of D3Net: one D2 block at each of three scales, up and down."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3net_kernels import D2Block


class Join(nn.Sequential):
    """BN, ReLU and a 1x1 convolution: compresses the raw outputs of a D2 block."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.BatchNorm2d(in_channels), nn.ReLU(), nn.Conv2d(in_channels, out_channels, 1)
        )


class Stage(nn.Module):
    """A D2 block, of which the last two layers leave, and the join behind it."""

    def __init__(
        self, d2: type[D2Block], in_channels: int, growth_rate: int, layers: int, out_channels: int
    ) -> None:
        super().__init__()
        self.d2 = d2(in_channels, growth_rate, layers, out_layers=2)
        self.join = Join(2 * growth_rate, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        joined: Tensor = self.join(self.d2(x))
        return joined


class SmallSeparator(nn.Module):
    """Magnitudes of the mixture (N, 2, frames, bins) -> of each stem (N, stems, 2, frames, bins).

    The estimates are masks in (0, 1) times the mixture. Frames and bins are multiples of 4. The
    smallest scale sees dilations up to ``2 ** layers`` on a map that is 4 times coarser. ``d2``
    says how the D2 blocks are computed, which changes neither parameters nor results.
    """

    def __init__(
        self,
        d2: type[D2Block],
        *,
        stems: int = 4,
        width: int = 24,
        growth_rate: int = 12,
        layers: int = 4,
    ) -> None:
        super().__init__()
        self.stems = stems
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.down = nn.ModuleList(Stage(d2, width, growth_rate, layers, width) for _ in range(2))
        self.bottom = Stage(d2, width, growth_rate, layers + 1, width)
        self.up = nn.ModuleList(Stage(d2, 2 * width, growth_rate, layers, width) for _ in range(2))
        self.head = nn.Conv2d(width, 2 * stems, 1)

    def forward(self, mixture: Tensor) -> Tensor:
        # log1p tames the range of music; the masks act on the magnitudes themselves.
        x = self.stem(torch.log1p(mixture))
        skips = []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.bottom(x)
        for stage in self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = stage(torch.cat([x, skips.pop()], dim=1))
        masks: Tensor = torch.sigmoid(self.head(x)).unflatten(1, (self.stems, 2))
        return masks * mixture.unsqueeze(1)
