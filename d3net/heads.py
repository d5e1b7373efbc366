"""Decode heads: from the features of four scales to one map of classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3net.blocks import ConvNorm, Parts
from d3net_kernels.modules import norm_then_conv

OCR_CHANNELS = 512
OCR_KEY_CHANNELS = 256


class MixedScales(ConvNorm):
    """A 1x1 convolution of several scales, normalisation, ReLU: each pixel reads all of them.

    It is defined on features resized bilinearly to the finest scale and concatenated. But a 1x1
    convolution and a resizing whose weights add up to 1 commute, so every scale is convolved as
    small as it is, and the sum of the resized results is all that is made at the finest scale.
    """

    def raw(self, features: Sequence[Tensor]) -> Tensor:
        """Features (N, C_s, H_s, W_s), finest first -> (N, K, H_1, W_1) before normalisation."""
        weights = self.conv.weight.split([f.shape[1] for f in features], 1)
        mixed = F.conv2d(features[0], weights[0], self.conv.bias)
        for feature, weight in zip(features[1:], weights[1:], strict=True):
            mixed += resized(F.conv2d(feature, weight), mixed)
        return mixed

    def forward(self, features: Parts) -> Tensor:
        """Features (N, C_s, H_s, W_s), finest first -> (N, K, H_1, W_1)."""
        return F.relu(self.norm(self.raw(list(features))), inplace=True)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, height and width of `like`), bilinearly."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


class FCNHead(nn.Module):
    """A 1x1 convolution that mixes the scales, and a 1x1 convolution to the classes.

    Takahashi & Mitsufuji, CVPR 2021, section 6.1, "Model architecture". `mix` and `classify` hold
    the parameters; with the norm they were made with they are not called themselves.
    """

    def __init__(self, feature_channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        channels = sum(feature_channels)
        self.mix = MixedScales(channels, channels)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features, finest first -> logits (N, num_classes, H_1, W_1)."""
        return norm_then_conv(self.mix.raw(features), self.mix.norm, self.classify)


class OCRHead(nn.Module):
    """Object-contextual representations on the mixed scales.

    Yuan, Chen & Wang, Object-contextual representations for semantic segmentation, ECCV 2020: a
    coarse map of classes gathers one vector per class from the pixels, and every pixel attends to
    these vectors. The D3Net paper prints only the size of D3Net-L with it, 42.3M (Table 2). That
    number fits this wiring: the 1x1 mixing convolution goes to 512 channels and feeds both a 1x1
    classifier for the coarse map and a 3x3 convolution for the pixels; keys have 256 channels.
    """

    def __init__(self, feature_channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        wide, keys = OCR_CHANNELS, OCR_KEY_CHANNELS
        self.mix = MixedScales(sum(feature_channels), wide)
        self.coarse = nn.Conv2d(wide, num_classes, 1)
        self.pixels = ConvNorm(wide, wide, 3)
        self.query = nn.Sequential(ConvNorm(wide, keys), ConvNorm(keys, keys))
        self.key = nn.Sequential(ConvNorm(wide, keys), ConvNorm(keys, keys))
        self.value = ConvNorm(wide, keys)
        self.expand = ConvNorm(keys, wide)
        self.fuse = ConvNorm(2 * wide, wide)
        self.classify = nn.Conv2d(wide, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features, finest first -> logits (N, num_classes, H_1, W_1)."""
        return self.with_coarse(features)[0]

    def with_coarse(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and the coarse logits, which the training has to supervise too."""
        mixed = self.mix(features)
        coarse = self.coarse(mixed)
        pixels = self.pixels(mixed)
        objects = _gather(coarse, pixels)
        context = self.expand(_attend(self.query(pixels), self.key(objects), self.value(objects)))
        return self.classify(self.fuse([context, pixels])), coarse


def _gather(coarse: Tensor, pixels: Tensor) -> Tensor:
    """One vector per class, the mean of `pixels` weighted by its softmax over the map.

    (N, classes, H, W), (N, C, H, W) -> (N, C, classes, 1).
    """
    weights = coarse.flatten(2).softmax(2)
    return torch.einsum("nkp,ncp->nck", weights, pixels.flatten(2)).unsqueeze(3)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every pixel attends to the classes: (N, C, H, W), two of (N, C, K, 1) -> (N, C, H, W)."""
    scores = torch.einsum("nchw,nck->nkhw", query, key.squeeze(3)) * query.shape[1] ** -0.5
    return torch.einsum("nkhw,nck->nchw", scores.softmax(1), value.squeeze(3))
