"""What a network costs: parameters and multiplications."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d3net.blocks import ConvNorm
from d3net.heads import FCNHead
from d3net.registry import create_model, find, list_models
from d3net_kernels import D2Block, NormConv2d

# Modules whose every weight is applied once at each position of the result; none calls another.
COUNTED = (nn.Conv2d, nn.ConvTranspose2d, D2Block, NormConv2d, ConvNorm, FCNHead)


@dataclass(frozen=True)
class Cost:
    """Trainable parameters, multiply-accumulates of the convolutions, and for which input.

    As the network is defined: the heads, for one, convolve before they resize and take fewer.
    """

    parameters: int
    macs: int
    input_shape: tuple[int, ...]


def cost(name: str) -> Cost:
    """The cost of a network by its name; only shapes are followed, nothing is computed.

    Raises:
        ValueError: there is no such network.
    """
    shape = find(name).input_shape
    with torch.device("meta"), torch.no_grad():
        model = create_model(name)  # in training mode, which folds no convolution into another
        macs = 0

        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal macs
            # A transposed convolution of stride 2 and size 2 reads every input once per weight.
            positions = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            weights = sum(p.numel() for p in module.parameters() if p.dim() == 4)
            macs += positions.shape[0] * positions.shape[2] * positions.shape[3] * weights

        for module in model.modules():
            if isinstance(module, COUNTED):
                module.register_forward_hook(count)
        model(torch.empty(shape))
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(parameters, macs, shape)


def table() -> str:
    """All networks: name, parameters, GMACs, input."""
    rows = [("model", "parameters", "GMACs", "input")]
    for name in list_models():
        c = cost(name)
        rows.append(
            (name, f"{c.parameters:,}", f"{c.macs / 1e9:.2f}", " x ".join(map(str, c.input_shape)))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                row[1].rjust(widths[1]),
                row[2].rjust(widths[2]),
                row[3],
            ]
        )
        for row in rows
    )
