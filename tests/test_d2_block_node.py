"""What only a D2 block that is one node of the autograd graph can do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from block_grid import NORMS, Block, Case
from torch import Tensor

import d3net_kernels as dk

pytestmark = pytest.mark.skipif(
    dk.why_not("cpu") is not None, reason=f"no cpu backend: {dk.why_not('cpu')}"
)


def _kept_bytes(block: Block) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once, but for the parameters."""
    parameters = {
        t.untyped_storage().data_ptr() for name, t in block.needed().items() if name != "x"
    }
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        # `out` stays alive meanwhile, so that no address is used twice.
        out = dk.d2_block(block.tensors["x"], block.params(), **block.options())
    assert out.requires_grad
    return sum(size for address, size in kept.items() if address not in parameters)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("out_layers", [1, 2, None])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kept_for_backward(
    norm: str, mode: str, out_layers: int | None, layout: str, generator: torch.Generator
) -> None:
    """x_0, the features and a few vectors per norm; no copy of a weight, nothing normalised."""
    case = Case("", 24, 16, 4, (2, 8, 12), norm=norm, mode=mode, layout=layout)
    block = replace(case, out_layers=out_layers).block(generator)
    itemsize, pixels = 4, 2 * 8 * 12
    maps = (case.channels + case.layers * case.growth) * pixels * itemsize
    vectors = 4 * sum(case.norm_widths) * 8  # mean, rstd, scale and shift, as doubles at most
    rounding_up = 64 * (case.layers * 4 + 2)  # each allocation to a cache line
    assert _kept_bytes(block) <= maps + vectors + rounding_up


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_one_node(norm: str, mode: str, generator: torch.Generator) -> None:
    """The parameters and x feed the node of the result itself."""
    block = Case("", norm=norm, mode=mode, out_layers=1).block(generator)
    out = dk.d2_block(block.tensors["x"], block.params(), **block.options())
    leaves = {edge.variable for edge, _ in _edges(out) if hasattr(edge, "variable")}
    assert leaves == set(block.needed().values())


def _edges(out: Tensor) -> list[Any]:
    """Where the node of `out` leads, past a view that selects the returned layers."""
    node = out.grad_fn
    while len(edges := [edge for edge in node.next_functions if edge[0] is not None]) == 1:
        node = edges[0][0]
    return edges
