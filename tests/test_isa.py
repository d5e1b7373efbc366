"""Every instruction set of this machine on a part of the grid; the same bits for any threads."""

from __future__ import annotations

import grid
import pytest
import torch
from block_grid import NORMS, assert_right, ours
from block_grid import Case as Block
from torch import Tensor

import d3net_kernels as dk
from d3net_kernels.numerics import Problem

pytestmark = pytest.mark.skipif(
    dk.why_not("cpu") is not None, reason=f"no cpu backend: {dk.why_not('cpu')}"
)

_CASES = [
    case
    for case in grid.CASES
    if case.name.startswith(
        ("growth", "layout", "large", "kernel", "dilation", "uneven", "float", "transformed")
    )
    or "bfloat16" in case.name
]


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_right(isa: str, case: grid.Case, generator: torch.Generator) -> None:
    assert torch.ops.d3net_kernels.cpu_isa("") == isa
    problem = case.problem(generator)
    grid.assert_right(problem, grid.BACKENDS["default"](problem))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block(
    isa: str, dtype: torch.dtype, norm: str, mode: str, generator: torch.Generator
) -> None:
    """Channels beyond a vector, rows beyond a task of the matrix unit, and what is left of both."""
    block = Block(
        "", channels=37, growth=19, layers=3, size=(2, 5, 67), dtype=dtype, norm=norm, mode=mode
    ).block(generator)
    assert_right(block, ours(block))


def _with_threads(threads: int, problem: Problem) -> dict[str, Tensor]:
    torch.set_num_threads(threads)
    return grid.BACKENDS["default"](problem)


@pytest.mark.parametrize(
    "case",
    [
        grid.Case("large", channels=(20, 12), out_channels=12, size=(2, 37, 53)),
        grid.Case("last", channels=(20, 12), size=(2, 37, 53), layout="channels_last"),
        grid.Case("half", channels=(20, 12), size=(2, 37, 53), dtype=torch.bfloat16),
        grid.Case("flat", channels=(8, 8, 8), size=(1, 3, 400)),
        grid.Case("transformed", channels=(33, 20), out_channels=13, size=(2, 9, 170)),
        grid.Case("small"),
    ],
    ids=lambda case: case.name,
)
def test_same_bits_for_any_threads(isa: str, case: grid.Case, generator: torch.Generator) -> None:
    problem = case.problem(generator)
    once = _with_threads(1, problem)
    for threads in (2, 3):
        for name, t in _with_threads(threads, problem).items():
            assert torch.equal(t, once[name]), f"{name} differs between 1 and {threads} threads"


def test_unknown_isa() -> None:
    with pytest.raises(RuntimeError, match="cpu_isa"):
        torch.ops.d3net_kernels.cpu_isa("mmx")
