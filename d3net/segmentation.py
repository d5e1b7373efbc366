"""D3Net for images: backbones of four scales, and networks for semantic segmentation.

Takahashi & Mitsufuji, CVPR 2021, section 6.1. Where the paper is silent or does not fit its own
parameter counts, the official release decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from d3net import checks, initialise
from d3net.blocks import (
    ConcatD3Block,
    ConvNorm,
    Dilation,
    Norm,
    Transition,
    folded_norm,
    set_checkpointing,
)
from d3net.heads import FCNHead, OCRHead, resized
from d3net.pretrained import Pretrained
from d3net_kernels.checks import positive_int, positive_ints


@dataclass(frozen=True)
class BackboneConfig:
    """The architecture of a backbone; all four stages are alike.

    growth_rate: k. num_blocks: M, D2 blocks in a D3 block. num_layers: L, layers in a D2 block.
    compression: c, None for none. feature_channels: widths of the four features, finest first.
    always_bottleneck: a bottleneck before every D2 block. bias: of bottlenecks and D2 layers;
    DenseNet-BC has the former and not the latter. dilation: "multi", or the ablations "standard"
    and "none". norm: "per_source", or "per_layer" (eq. 1 and 2 literally).
    """

    growth_rate: int
    num_blocks: int
    num_layers: int
    feature_channels: Sequence[int]
    compression: float | None = 0.2
    always_bottleneck: bool = False
    bias: bool = True
    in_channels: int = 3
    stem_channels: int = 64
    dilation: Dilation = "multi"
    norm: Norm = "per_source"

    def __post_init__(self) -> None:
        for name in ("growth_rate", "num_blocks", "num_layers", "in_channels", "stem_channels"):
            positive_int(name, getattr(self, name))
        for name in ("always_bottleneck", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; accepted are True and False")
        widths = tuple(positive_ints("feature_channels", self.feature_channels))
        object.__setattr__(self, "feature_channels", widths)  # what comes back from a saved config
        made = self.growth_rate * self.num_layers
        c = self.compression
        if not isinstance(c, (int, float, type(None))):
            raise TypeError(f"compression is {c!r}; accepted is a number below 1, or None")
        if c is not None and not (c < 1 and int(made * c) >= 1):
            raise ValueError(
                f"compression is {c} of k L = {made} channels; accepted are numbers below 1 that "
                "leave at least one channel, or None"
            )
        if len(self.feature_channels) != 4:
            raise ValueError(
                f"feature_channels is {self.feature_channels!r}; accepted are four widths, one for "
                "each of the scales 1/4, 1/8, 1/16, 1/32"
            )


@dataclass(frozen=True)
class SegmentationConfig:
    """A backbone and a decode head; `head` is "fcn" or "ocr"."""

    backbone: BackboneConfig
    num_classes: int = 19
    head: Literal["fcn", "ocr"] = "fcn"

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, BackboneConfig):
            raise TypeError(f"backbone is {self.backbone!r}; accepted is a BackboneConfig")
        positive_int("num_classes", self.num_classes)
        if self.head not in tuple(HEADS):
            raise ValueError(f"head is {self.head!r}; accepted are {', '.join(map(repr, HEADS))}")
        if self.head == "ocr" and self.num_classes == 1:
            raise ValueError("num_classes is 1; the OCR head chooses among at least two")


HEADS: dict[str, type[FCNHead] | type[OCRHead]] = {"fcn": FCNHead, "ocr": OCRHead}


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2, normalised in between; raw, for the psi that follows."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, ceil(H / 4), ceil(W / 4)).

        In eval `conv1` and `norm` are one convolution, and not called themselves.
        """
        folded = folded_norm(self.conv1, self.norm)
        if folded is None:
            made = self.norm(self.conv1(x))
        else:
            made = F.conv2d(x, *folded, stride=2, padding=1)
        out: Tensor = self.conv2(F.relu(made, inplace=True))
        return out


class D3NetBackbone(Pretrained):
    """Four D3 blocks at 1/4, 1/8, 1/16 and 1/32 of the image, and one feature of each.

    `feature_info` describes the features as timm does: num_chs, reduction, module.

    Raises:
        ValueError: the images are not (N, in_channels, H, W) with H and W of at least 29.
        TypeError: they are no floating-point numbers.
    """

    Config = BackboneConfig

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        self.config: BackboneConfig = config
        channels = config.stem_channels
        self.stem = Stem(config.in_channels, channels)
        self.stages, self.features, self.transitions = (nn.ModuleList() for _ in range(3))
        self.feature_info: list[dict[str, Any]] = []
        for scale, width in enumerate(config.feature_channels):
            if scale > 0:
                self.transitions.append(Transition(channels))
                channels //= 2
            stage = ConcatD3Block(
                channels,
                config.num_blocks,
                config.growth_rate,
                config.num_layers,
                compression=config.compression,
                always_bottleneck=config.always_bottleneck,
                bias=config.bias,
                norm=config.norm,
                dilation=config.dilation,
            )
            channels = stage.out_channels
            self.stages.append(stage)
            self.features.append(ConvNorm(channels, width, bias=True))
            self.feature_info.append(
                {"num_chs": width, "reduction": 4 << scale, "module": f"features.{scale}"}
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew as the official release does, from torch's random numbers."""
        initialise.glorot_uniform(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (N, in_channels, H, W) -> four features (N, C_s, H_s, W_s), finest first.

        H_1 = ceil(H / 4), and H_s = H_{s-1} // 2; W likewise.
        """
        checks.images(images, self.stem.conv1.weight, self.training)
        x = self.stem(images)
        features = []
        for scale, (stage, feature) in enumerate(zip(self.stages, self.features, strict=True)):
            x = stage(self.transitions[scale - 1](x) if scale else x)
            features.append(feature(x))
        return features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether D2 blocks are computed again in backward instead of keeping what they make."""
        set_checkpointing(self, enable)


class SegmentationNet(Pretrained):
    """A backbone and a decode head: images (N, 3, H, W) -> logits (N, num_classes, H, W).

    Logits in training and evaluation alike. H and W are at least 29, odd ones included.

    Raises:
        ValueError, TypeError: as :class:`D3NetBackbone`.
    """

    Config = SegmentationConfig

    def __init__(self, config: SegmentationConfig) -> None:
        super().__init__(config)
        self.config: SegmentationConfig = config
        self.backbone = D3NetBackbone(config.backbone)
        self.head = HEADS[config.head](config.backbone.feature_channels, config.num_classes)
        initialise.small_normal(self.head)

    def reset_parameters(self) -> None:
        """Draw the parameters anew as the official release does, from torch's random numbers."""
        self.backbone.reset_parameters()
        initialise.small_normal(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) -> logits (N, num_classes, H, W)."""
        return resized(self.head(self.backbone(images)), images)

    def forward_with_coarse(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, and those of the OCR head's coarse map, both (N, num_classes, H, W).

        Raises:
            TypeError: the head is another one.
        """
        if not isinstance(self.head, OCRHead):
            raise TypeError(
                f"the head is {self.config.head!r}; only 'ocr' has coarse logits, call the model"
            )
        logits, coarse = self.head.with_coarse(self.backbone(images))
        return resized(logits, images), resized(coarse, images)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether D2 blocks are computed again in backward instead of keeping what they make."""
        set_checkpointing(self, enable)
