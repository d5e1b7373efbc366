"""Every instruction set of this machine on a part of the grid; the same bits for any threads."""

from __future__ import annotations

from collections.abc import Iterator

import grid
import pytest
import torch
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


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """One instruction set in force; skipped where the machine lacks it."""
    cpu_isa = torch.ops.d3net_kernels.cpu_isa
    before = cpu_isa("")
    try:
        forced = cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield forced
    cpu_isa(before)


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_right(isa: str, case: grid.Case, generator: torch.Generator) -> None:
    assert torch.ops.d3net_kernels.cpu_isa("") == isa
    problem = case.problem(generator)
    grid.assert_right(problem, grid.BACKENDS["default"](problem))


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
