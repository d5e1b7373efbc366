"""D3Net for music: the magnitudes of one source from those of the mixture.

Takahashi & Mitsufuji, CVPR 2021, section 6.2 and Table 5, in the form of the official release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3net import checks, initialise
from d3net.blocks import Dilation, Norm, SumD3Block, Upsample, d2_core, set_checkpointing
from d3net.pretrained import Pretrained
from d3net_kernels import NormConv2d
from d3net_kernels.checks import positive_int, positive_ints

SEPARATION_SIZES = (
    "split",
    "final_growth_rate",
    "final_layers",
    "gate_kernel",
    "channels",
    "bins",
    "modelled_bins",
)
SCALE_FLOOR = 1e-4  # of the largest deviation, so that silent bins are not blown up


@dataclass(frozen=True)
class BandConfig:
    """A branch: growth rates k and layers L of its D3 blocks, down, bottom and up.

    Both have the same odd length 2 n + 1 for n poolings. num_blocks: M, the same in all.
    """

    init_channels: int
    growth_rates: Sequence[int]
    num_layers: Sequence[int]
    num_blocks: int = 2

    def __post_init__(self) -> None:
        for name in ("init_channels", "num_blocks"):
            positive_int(name, getattr(self, name))
        for name in ("growth_rates", "num_layers"):
            values = tuple(positive_ints(name, getattr(self, name)))
            object.__setattr__(self, name, values)  # what comes back from a saved config
        if len(self.growth_rates) != len(self.num_layers) or len(self.growth_rates) % 2 == 0:
            raise ValueError(
                f"growth_rates has {len(self.growth_rates)} entries and num_layers "
                f"{len(self.num_layers)}; accepted are equal odd numbers of entries"
            )

    @property
    def poolings(self) -> int:
        return len(self.growth_rates) // 2


@dataclass(frozen=True)
class SeparationConfig:
    """The architecture for one source.

    target: its name, which is the scope of its official parameters. split: the first bin of the
    high band. modelled_bins: those above are copied from the mixture. final_growth_rate,
    final_layers: of the D2 block that joins the branches. gate_kernel: side of the kernels that
    make the result.
    """

    target: str
    split: int
    low: BandConfig
    high: BandConfig
    full: BandConfig
    final_growth_rate: int = 12
    final_layers: int = 3
    gate_kernel: Literal[1, 3] = 1
    channels: int = 2
    bins: int = 2049
    modelled_bins: int = 1600
    dilation: Dilation = "multi"
    norm: Norm = "per_source"

    def __post_init__(self) -> None:
        if not isinstance(self.target, str):
            raise TypeError(f"target is {self.target!r}; accepted is a name")
        for name in ("low", "high", "full"):
            band = getattr(self, name)
            if not isinstance(band, BandConfig):
                raise TypeError(f"{name} is {band!r}; accepted is a BandConfig")
        for name in SEPARATION_SIZES:
            positive_int(name, getattr(self, name))
        for name, (width, band) in self.branches.items():
            step = 1 << band.poolings
            if width < step or width % step:
                raise ValueError(
                    f"{name} is {width}; accepted are positive multiples of {step}, since the "
                    f"branch halves its bins {band.poolings} times"
                )
        if self.modelled_bins > self.bins:
            raise ValueError(
                f"modelled_bins is {self.modelled_bins}, more than bins, which is {self.bins}"
            )
        if self.gate_kernel % 2 == 0:
            raise ValueError(f"gate_kernel is {self.gate_kernel}; accepted are odd numbers")

    @property
    def branches(self) -> dict[str, tuple[int, BandConfig]]:
        """How many bins each branch reads, by the words for that number, and its architecture."""
        return {
            "split": (self.split, self.low),
            "modelled_bins - split": (self.modelled_bins - self.split, self.high),
            "modelled_bins": (self.modelled_bins, self.full),
        }

    @property
    def frame_step(self) -> int:
        """The number of frames must be a multiple of this."""
        return 1 << max(band.poolings for _, band in self.branches.values())


class BandUNet(nn.Module):
    """A U of D3 blocks: mean pooling on the way down, concatenated skips on the way up."""

    def __init__(
        self,
        in_channels: int,
        config: BandConfig,
        *,
        norm: Norm = "per_source",
        dilation: Dilation = "multi",
    ) -> None:
        super().__init__()
        n, ks = config.poolings, config.growth_rates

        def block(channels: int, index: int) -> SumD3Block:
            return SumD3Block(
                channels,
                ks[index],
                config.num_layers[index],
                config.num_blocks,
                norm=norm,
                dilation=dilation,
            )

        self.down = nn.ModuleList(block(ks[i - 1] if i else in_channels, i) for i in range(n))
        self.bottom = block(ks[n - 1] if n else in_channels, n)
        self.upsamples = nn.ModuleList(Upsample(k) for k in ks[n:-1])
        self.up = nn.ModuleList(
            block(ks[i - 1] + ks[2 * n - i], i) for i in range(n + 1, 2 * n + 1)
        )
        self.out_channels = ks[-1]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, F) -> (N, k of the last D3 block, T, F); T and F multiples of 2**n."""
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.bottom(x)
        for upsample, block in zip(self.upsamples, self.up, strict=True):
            x = block([upsample(x), skips.pop()])
        return x


class Gate(nn.Module):
    """Batch normalisation, then a convolution times the sigmoid of another one."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        padding = kernel_size // 2
        self.gate = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding)
        self.filter = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, T, F) -> (N, out_channels, T, F)."""
        x = self.norm(x)
        out: Tensor = torch.sigmoid(self.gate(x)) * self.filter(x)
        return out


class SeparationNet(Pretrained):
    """Magnitudes of the mixture (N, 2, T, 2049) -> those of one source, the same shape.

    Of the STFT with 4096 points. Convolutions run over frames and bins; T is a multiple of 16. The
    bins from 1600 up are those of the mixture. `in_offset`, `in_scale` (2049,) and `decode_scale`,
    `decode_bias` (1600,) are trainable.

    Raises:
        ValueError: the magnitudes have another shape.
        TypeError: they are no floating-point numbers.
    """

    Config = SeparationConfig

    def __init__(self, config: SeparationConfig) -> None:
        super().__init__(config)
        self.config: SeparationConfig = config
        self.in_offset = nn.Parameter(torch.empty(config.bins))
        self.in_scale = nn.Parameter(torch.empty(config.bins))
        self.decode_scale = nn.Parameter(torch.empty(config.modelled_bins))
        self.decode_bias = nn.Parameter(torch.empty(config.modelled_bins))
        self.init_low, self.init_high, self.init_full = (
            nn.Conv2d(config.channels, band.init_channels, 3, padding=1)
            for band in (config.low, config.high, config.full)
        )
        self.low, self.high, self.full = (
            BandUNet(band.init_channels, band, norm=config.norm, dilation=config.dilation)
            for band in (config.low, config.high, config.full)
        )
        joined = max(self.low.out_channels, self.high.out_channels)
        self.match_low, self.match_high = (
            NormConv2d(band.out_channels, joined, relu=False)
            if band.out_channels < joined
            else nn.Identity()
            for band in (self.low, self.high)
        )
        self.final = d2_core(
            joined + self.full.out_channels,
            config.final_growth_rate,
            config.final_layers,
            out_layers=1,
            norm=config.norm,
            dilation=config.dilation,
        )
        self.gate = Gate(config.final_growth_rate, config.channels, config.gate_kernel)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew as the official release does, from torch's random numbers."""
        initialise.glorot_normal(self)
        nn.init.zeros_(self.in_offset)
        for ones in (self.in_scale, self.decode_scale, self.decode_bias):
            nn.init.ones_(ones)

    @torch.no_grad()
    def set_input_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Start the input normalisation from the training mixtures, as the official release does.

        mean, std (2049,): per bin, over all frames, of the magnitudes averaged over the channels.
        Deviations below 1e-4 of the largest are raised to it.

        Raises:
            ValueError: another shape, a value that is not finite, or no deviation above zero.
            TypeError: one is no tensor.
        """
        checks.input_statistics(mean, std, self.config.bins)
        self.in_offset.copy_(mean)
        self.in_scale.copy_(std.clamp(min=SCALE_FLOOR * float(std.max())))

    def forward(self, magnitudes: Tensor) -> Tensor:
        """(N, 2, T, 2049) -> (N, 2, T, 2049)."""
        checks.magnitudes(magnitudes, self.in_offset, self.config, self.training)
        split, top = self.config.split, self.config.modelled_bins
        x = ((magnitudes - self.in_offset) / self.in_scale)[..., :top]
        low = self.match_low(self.low(self.init_low(x[..., :split])))
        high = self.match_high(self.high(self.init_high(x[..., split:])))
        full = self.full(self.init_full(x))
        source = self.gate(self.final([torch.cat([low, high], 3), full]))
        source = F.relu(source * self.decode_scale + self.decode_bias)
        return torch.cat([source, magnitudes[..., top:].to(source.dtype)], 3)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether D2 blocks are computed again in backward instead of keeping what they make."""
        set_checkpointing(self, enable)
