"""Ways to compute one layer: ours, and every form in which plain torch can write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import d3net_kernels
from benchmarks.shapes import Shape

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
OURS = "ours"


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer in one layout; the weight also split by source, for torch."""

    shape: Shape
    inputs: list[Tensor]
    weight: Tensor
    weights: list[Tensor]
    bias: Tensor

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, layout: str) -> Layer:
        """Numbers of size 1 whose sums have size 1, the same for every layout and dtype."""
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            values = torch.randn(size, generator=generator).to(dtype)
            return values.contiguous(memory_format=LAYOUTS[layout]) if len(size) == 4 else values

        channels = sum(shape.group_channels)
        inputs = [normal(1, c, shape.height, shape.width) for c in shape.group_channels]
        weight = normal(shape.c_out, channels, 3, 3) / (9 * channels) ** 0.5
        weights = [
            part.contiguous(memory_format=LAYOUTS[layout])
            for part in weight.split(shape.group_channels, dim=1)
        ]
        return cls(shape, inputs, weight, weights, normal(shape.c_out))


def ours(layer: Layer) -> Tensor:
    return d3net_kernels.multidilated_conv2d(
        layer.inputs, layer.weight, layer.bias, dilations=layer.shape.dilations
    )


def reference(layer: Layer) -> Tensor:
    """Per-source convolutions and a running sum, as anyone would write it."""
    return d3net_kernels.reference.multidilated_conv2d(
        layer.inputs, layer.weight, layer.bias, dilations=layer.shape.dilations
    )


def sum_in_place(layer: Layer) -> Tensor:
    """The same with what a careful writer would add: weights split beforehand, one sum in place."""
    out = None
    for x, weight, d in zip(layer.inputs, layer.weights, layer.shape.dilations, strict=True):
        if out is None:
            out = F.conv2d(x, weight, layer.bias, padding=d, dilation=d)
        else:
            out += F.conv2d(x, weight, padding=d, dilation=d)
    assert out is not None
    return out


def one_convolution(layer: Layer) -> Tensor:
    """Concatenate and convolve once: right only where all dilations are equal."""
    d = layer.shape.dilations[0]
    x = layer.inputs[0] if len(layer.inputs) == 1 else torch.cat(layer.inputs, dim=1)
    return F.conv2d(x, layer.weight, layer.bias, padding=d, dilation=d)


def forms_of(shape: Shape) -> dict[str, Callable[[Layer], Tensor]]:
    """The forms that compute this shape, by name. With one source the sum is one convolution."""
    if len(set(shape.dilations)) == 1:
        return {OURS: ours, "reference": reference, "one convolution": one_convolution}
    return {OURS: ours, "reference": reference, "sum in place": sum_in_place}


def candidates(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
    """(form, layout, call) of everything to be timed for one shape."""
    for layout in LAYOUTS:
        layer = Layer.random(shape, dtype, layout)
        for name, form in forms_of(shape).items():
            yield name, layout, lambda form=form, layer=layer: form(layer)  # type: ignore[misc]
