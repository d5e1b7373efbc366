"""Every backend on the whole grid: output and gradients against float64, strides exactly."""

from __future__ import annotations

import grid
import pytest
import torch


@pytest.mark.parametrize("case", grid.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", grid.BACKENDS)
@pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")
def test_right(backend: str, case: grid.Case, generator: torch.Generator) -> None:
    problem = case.problem(generator)
    grid.assert_right(problem, grid.BACKENDS[backend](problem))


@pytest.mark.parametrize("backend", grid.BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")
def test_not_finite(backend: str, value: float, relu: bool, generator: torch.Generator) -> None:
    """NaN passes the ReLU and infinity stays, in the pixels that see them and in no other."""
    problem = grid.Case("", channels=(4, 3), relu=relu, needs=()).problem(generator)
    problem.inputs[0][0, 1, 3, 4] = value
    problem.inputs[1][1, 2, 0, 0] = value
    grid.assert_right(problem, grid.BACKENDS[backend](problem))


@pytest.mark.parametrize("backend", grid.BACKENDS)
@pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")
def test_nothing_is_modified(backend: str, generator: torch.Generator) -> None:
    problem = grid.Case("").problem(generator)
    before = problem.map(torch.clone)
    grid.BACKENDS[backend](problem)
    for name, t in before.tensors().items():
        assert torch.equal(t, problem.tensors()[name]), name
    assert torch.equal(before.grad_output, problem.grad_output)
