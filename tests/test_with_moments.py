"""The convolution that measures what it makes: its moments and gradients on every backend.

test_triton.py runs this file a second time, in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import grid
import pytest
import torch
from torch import Tensor

import d3net_kernels as dk
from d3net_kernels import ops, reference
from d3net_kernels.backends import triton
from d3net_kernels.numerics import Problem

pytestmark = pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")

BACKENDS = ["triton"] if triton.interpreted() else [None]
if dk.why_not("cuda") is None:
    BACKENDS.append("cuda")

_CASES = [
    grid.Case("small"),
    grid.Case("wide", channels=(4, 3), size=(1, 3, 333)),
    grid.Case("tiles", channels=(5,), out_channels=36, size=(2, 30, 41), layout="channels_last"),
    grid.Case("one_pixel", size=(1, 1, 1)),
    grid.Case("slices", layout="slice", out_channels=9),
    grid.Case("plain", psi=None, relu=False, bias=False),
]


def _on(backend: str | None, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    if backend is None:
        return grid.with_moments(problem)
    with dk.use_backend(backend):
        if backend == "cuda":
            problem = problem.map(Tensor.cuda)
        out, mean, var = grid.with_moments(problem)
    return out.cpu(), mean.cpu(), var.cpu()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", grid.DTYPES, ids=str)
@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_right(
    case: grid.Case, dtype: torch.dtype, backend: str | None, generator: torch.Generator
) -> None:
    """The moments of the output as it is rounded."""
    problem = replace(case, dtype=dtype, needs=()).problem(generator)
    out, mean, var = _on(backend, problem)
    grid.assert_right(problem, {"out": out})
    grid.assert_moments(out, mean, var)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "offset"),
    [
        (torch.float32, 1e3),
        (torch.float32, 1e5),
        (torch.float64, 1e9),
        (torch.bfloat16, 1e3),
        (torch.bfloat16, 1e5),
        (torch.float16, 1e3),
    ],
)
def test_large_mean_does_not_cancel(
    dtype: torch.dtype, offset: float, backend: str | None, generator: torch.Generator
) -> None:
    """As it would if the square of the mean were taken from the mean of the squares."""
    case = grid.Case("", (4, 3), 6, (2, 23, 29), dtype=dtype, needs=())
    problem = case.problem(generator)
    assert problem.bias is not None
    problem.bias.fill_(offset)
    out, mean, var = _on(backend, problem)
    assert (mean - offset).abs().max() < offset / 10
    grid.assert_moments(out, mean, var)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite_stays_in_its_channel(backend: str | None, generator: torch.Generator) -> None:
    problem = grid.Case("", (4, 3), 6, needs=()).problem(generator)
    assert problem.bias is not None
    problem.bias[1], problem.bias[4] = torch.nan, torch.inf
    out, mean, var = _on(backend, problem)
    assert mean.isfinite().tolist() == [True, False, True, True, False, True]
    grid.assert_moments(out, mean, var)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(0, 5, 6), (2, 0, 6), (2, 6, 0)])
def test_nothing_to_average(
    size: tuple[int, int, int], backend: str | None, generator: torch.Generator
) -> None:
    problem = grid.Case("", size=size, needs=()).problem(generator)
    out, mean, var = _on(backend, problem)
    assert out.shape == (size[0], 5, *size[1:])
    assert mean.shape == var.shape == (5,)
    assert mean.isnan().all()
    assert var.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: str | None, generator: torch.Generator) -> None:
    """Of all three results at once, to the second order."""
    problem = grid.Case("", (2, 1), 3, (2, 3, 4), dtype=torch.float64).problem(generator)
    if backend == "cuda":
        problem = problem.map(Tensor.cuda)
    weights = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(problem.weight.device)
        for shape in (problem.grad_output.shape, (3,), (3,))
    ]

    def plain(p: Problem) -> Sequence[Tensor]:
        psi = {"scale": p.scale, "shift": p.shift, "relu": p.relu}
        out = reference.multidilated_conv2d(
            p.inputs, p.weight, p.bias, dilations=p.dilations, **psi
        )
        return out, out.mean((0, 2, 3)), out.var((0, 2, 3), correction=0)

    def gradients(operation: Callable[[Problem], Sequence[Tensor]]) -> list[Tensor]:
        results = operation(problem)
        tensors = list(problem.tensors().values())
        loss = sum((w * t).sum() for w, t in zip(weights, results, strict=True))
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        penalty = sum((g * g.cos()).sum() for g in first)
        return [*first, *torch.autograd.grad(penalty, [*problem.inputs, problem.weight])]

    with dk.use_backend(backend) if backend else contextlib.nullcontext():
        results = gradients(grid.with_moments)
    torch.testing.assert_close(results, gradients(plain))


def _arguments(problem: Problem) -> tuple[Any, ...]:
    dilations = [d for pair in problem.dilations for d in pair]
    options = (dilations, problem.scale, problem.shift, problem.relu, 0)
    return (problem.inputs, problem.weight, problem.bias, *options)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, layout: str, generator: torch.Generator) -> None:
    case = grid.Case("", (3, 2), 4, (2, 5, 6), dtype=dtype, psi="float32", layout=layout)
    op = (ops.TRITON if triton.interpreted() else ops.DEFAULT).with_moments
    torch.library.opcheck(op, _arguments(case.problem(generator)))
