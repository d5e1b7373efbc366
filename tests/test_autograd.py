"""Derivatives of first and second order, exactly and only where they are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import grid
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import d3net_kernels as dk
from d3net_kernels import ops, reference
from d3net_kernels.numerics import Problem

pytestmark = pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")

_SMALL = {
    "channels": (2, 1),
    "out_channels": 2,
    "size": (2, 3, 4),
    "dtype": torch.float64,
}
_FLAGS = list(itertools.product(("same", None), (True, False), (True, False)))


def _as_function(problem: Problem, names: list[str]) -> Callable[..., Tensor]:
    """The op as a function of the named arguments."""

    def function(*values: Tensor) -> Tensor:
        changes = dict(zip(names, values, strict=True))
        out: Tensor = grid.call(dk.multidilated_conv2d, problem, **changes)
        return out

    return function


@pytest.mark.parametrize(("psi", "relu", "bias"), _FLAGS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(
    psi: str | None, relu: bool, bias: bool, layout: str, generator: torch.Generator
) -> None:
    problem = grid.Case("", **_SMALL, psi=psi, relu=relu, bias=bias, layout=layout).problem(
        generator
    )
    arguments = problem.tensors()
    function = _as_function(problem, list(arguments))
    assert gradcheck(function, tuple(arguments.values()))
    assert gradgradcheck(function, tuple(arguments.values()))


@pytest.mark.parametrize(
    "names",
    [
        ["inputs[0]"],
        ["inputs[1]", "scale"],
        ["weight"],
        ["bias"],
        ["scale"],
        ["shift"],
        ["inputs[0]", "weight"],
        ["weight", "shift"],
    ],
    ids="+".join,
)
def test_gradgradcheck_of_subsets(names: list[str], generator: torch.Generator) -> None:
    problem = grid.Case("", **_SMALL, needs=tuple(names)).problem(generator)
    values = tuple(problem.tensors()[name] for name in names)
    assert gradgradcheck(_as_function(problem, names), values)


def test_third_order(generator: torch.Generator) -> None:
    """The derivatives of the operators are made of the operators, hence of every order."""
    problem = grid.Case("", **_SMALL).problem(generator)
    names = ["inputs[0]", "weight", "scale"]
    values = [problem.tensors()[name] for name in names]

    def thrice(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        result = function(*values).pow(4).sum()
        for _ in range(2):
            result = sum(g.square().sum() for g in _grad(result, values))
        return torch.autograd.grad(result, values)

    def truth(*given: Tensor) -> Tensor:
        with dk.use_backend("reference"):
            return _as_function(problem, names)(*given)

    for result, expected in zip(thrice(_as_function(problem, names)), thrice(truth), strict=True):
        torch.testing.assert_close(result, expected)


def _grad(result: Tensor, values: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(result, values, create_graph=True)


@pytest.mark.parametrize("wanted", [(1, 0), (0, 1), (0, 0)])
def test_gradients_not_wanted_are_empty(
    wanted: tuple[int, int], generator: torch.Generator
) -> None:
    problem = grid.Case("", channels=(2, 1), psi=None).problem(generator)
    grads, scale, shift = ops.backward_data(
        problem.grad_output,
        problem.inputs,
        problem.weight,
        [1, 1, 2, 2],
        None,
        None,
        True,
        0,
        list(wanted),
    )
    for grad, x, want in zip(grads, problem.inputs, wanted, strict=True):
        assert grad.shape == (x.shape if want else (0,))
    assert scale.shape == shift.shape == (0,)


def _calls_in_backward(out: Tensor) -> list[str]:
    with torch.profiler.profile() as profile:
        out.sum().backward()
    return [event.key for event in profile.key_averages() if "d3net_kernels::" in event.key]


@pytest.mark.parametrize(
    ("needs", "absent"),
    [
        (("inputs",), "backward_weight"),
        (("scale",), "backward_weight"),
        (("weight",), "backward_data"),
        (("bias",), "backward_data"),
    ],
)
def test_only_what_is_needed_runs(
    needs: tuple[str, ...], absent: str, generator: torch.Generator
) -> None:
    problem = grid.Case("", needs=needs).problem(generator)
    out = _as_function(problem, [])()
    calls = _calls_in_backward(out)
    assert calls
    assert not any(absent in call for call in calls)


def test_only_raw_tensors_are_kept(generator: torch.Generator) -> None:
    """No normalised copy and no mask: what autograd saves are the arguments themselves."""
    problem = grid.Case("").problem(generator)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        _as_function(problem, [])()
    arguments = {t.data_ptr() for t in problem.tensors().values()}
    assert len(kept) == len(problem.inputs) + 3
    assert all(t.data_ptr() in arguments for t in kept)


def test_nothing_is_recorded_without_need(generator: torch.Generator) -> None:
    problem = grid.Case("").problem(generator)
    with torch.no_grad():
        assert not _as_function(problem, [])().requires_grad
    assert not _as_function(problem.map(lambda t: t).map(torch.clone), [])().is_leaf
    frozen = grid.Case("", needs=()).problem(generator)
    assert not _as_function(frozen, [])().requires_grad


def test_an_argument_changed_in_between_is_noticed(generator: torch.Generator) -> None:
    problem = grid.Case("").problem(generator)
    out = _as_function(problem, [])()
    with torch.no_grad():
        problem.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("transform", ["grad", "vmap_grad", "grad_grad", "hessian"])
def test_func_transforms(transform: str, generator: torch.Generator) -> None:
    problem = grid.Case("", **_SMALL, needs=()).problem(generator)

    def loss(operation: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda weight: (
            operation(problem.inputs, weight, scale=problem.scale, shift=problem.shift, relu=True)
            .pow(3)
            .sum()
        )

    def derivative(function: Callable[[Tensor], Tensor]) -> Tensor:
        gradient = torch.func.grad(function)
        if transform == "vmap_grad":
            return torch.func.vmap(gradient)(torch.stack([problem.weight, 2 * problem.weight]))
        if transform == "grad_grad":
            gradient = torch.func.grad(lambda weight: torch.func.grad(function)(weight).sum())
        if transform == "hessian":
            gradient = torch.func.jacrev(gradient)
        return gradient(problem.weight)

    torch.testing.assert_close(
        derivative(loss(dk.multidilated_conv2d)),
        derivative(loss(reference.multidilated_conv2d)),
    )
