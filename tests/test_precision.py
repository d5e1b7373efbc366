"""What torch allows in place of float32, on its way to the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import grid
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import d3net_kernels as dk
from d3net_kernels import numerics, ops, reference
from d3net_kernels.functional import multidilated_conv2d_with_moments
from d3net_kernels.precision import PRECISIONS, allowed_precision

HIGHEST, HIGH, MEDIUM = PRECISIONS.values()
SMALL = grid.Case("", channels=(2, 1), out_channels=2, size=(1, 4, 5))


@contextmanager
def switched(convolutions: Any, precision: str) -> Iterator[None]:
    """torch's switch for the convolutions of one backend."""
    before = convolutions.fp32_precision
    convolutions.fp32_precision = precision
    try:
        yield
    finally:
        convolutions.fp32_precision = before


class Seen(TorchDispatchMode):
    """Keeps the precision that each call of the three operators has."""

    def __init__(self) -> None:
        super().__init__()
        self.precisions: list[tuple[str, int]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in ops.DEFAULT:
            self.precisions.append((op.name().partition("::")[2], args[7]))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(("switch", "expected"), [("tf32", HIGH), ("ieee", HIGHEST)])
def test_gpus_follow_cudnn(switch: str, expected: int) -> None:
    with switched(torch.backends.cudnn.conv, switch):
        assert allowed_precision("cuda") == expected


@pytest.mark.parametrize(
    ("switch", "expected"), [("tf32", HIGH), ("ieee", HIGHEST), ("bf16", MEDIUM)]
)
def test_cpus_follow_mkldnn(switch: str, expected: int) -> None:
    with switched(torch.backends.mkldnn.conv, switch):
        assert allowed_precision("cpu") == expected


@pytest.mark.parametrize(("allowed", "expected"), [(True, HIGH), (False, HIGHEST)])
def test_a_torch_with_the_older_switch(
    allowed: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(allow_tf32=allowed))
    assert allowed_precision("cuda") == expected


@pytest.mark.parametrize(
    ("in_forward", "in_backward", "expected"), [("tf32", "ieee", HIGH), ("ieee", "tf32", HIGHEST)]
)
def test_derivatives_keep_that_of_the_forward_pass(
    in_forward: str, in_backward: str, expected: int, generator: torch.Generator
) -> None:
    """Whatever the switch says by then; of second order too."""
    problem = SMALL.problem(generator)
    tensors = list(problem.tensors().values())
    grad_output = problem.grad_output.requires_grad_()
    convolutions = torch.backends.mkldnn.conv
    with Seen() as seen:
        with switched(convolutions, in_forward):
            arguments = (problem.inputs, problem.weight, problem.bias)
            psi: Any = {"scale": problem.scale, "shift": problem.shift, "relu": True}
            same, mean, _ = multidilated_conv2d_with_moments(*arguments, **psi)
            out = dk.multidilated_conv2d(*arguments, **psi) + same * mean[:, None, None]
        with switched(convolutions, in_backward):
            first = torch.autograd.grad(out, tensors, grad_output, create_graph=True)
            total = sum((g * g.cos()).sum() for g in first)
            torch.autograd.grad(total, [grad_output, *tensors], allow_unused=True)
    names, precisions = zip(*seen.precisions, strict=True)
    assert set(names) == {op.name().partition("::")[2] for op in ops.DEFAULT}
    assert set(precisions) == {expected}


def test_a_batch_of_gradients_keeps_it(generator: torch.Generator) -> None:
    problem = SMALL.problem(generator)
    options = ([1, 1, 2, 2], problem.scale, problem.shift, True, HIGH)
    grads = torch.stack([problem.grad_output, 2 * problem.grad_output])

    def gradients(g: Tensor) -> Any:
        data = ops.backward_data(g, problem.inputs, problem.weight, *options, [1, 1])
        return data, ops.backward_weight(g, problem.inputs, problem.weight, *options)

    with torch.no_grad(), Seen() as seen:
        torch.vmap(gradients)(grads)
    assert {precision for _, precision in seen.precisions} == {HIGH}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_as_the_switch_was_when_traced(dynamic: bool) -> None:
    traced: list[int] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        for node in graph.graph.nodes:
            if node.target is ops.multidilated_conv2d:
                traced.append(node.args[7])
        return graph

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return dk.multidilated_conv2d([x], weight).cos()

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=keep)
    x, weight = torch.randn(1, 2, 6, 7), torch.randn(3, 2, 3, 3)
    with switched(torch.backends.mkldnn.conv, "tf32"):
        compiled(x, weight)
    compiled(x, weight)
    assert traced == [HIGH]


# Of adjacent channels: those are convolved on tiles.
LAYER = grid.Case(
    "", (48, 36), 36, (1, 24, 70), layout="channels_last", grad_layout="channels_last"
)


@pytest.mark.skipif(dk.why_not("cpu") is not None, reason="no compiled kernels")
def test_high_on_cpus(generator: torch.Generator) -> None:
    """Larger tiles in single layers too: other bits, within five times plain torch's error."""
    problem = LAYER.problem(generator)
    exact = numerics.results_of(dk.multidilated_conv2d, problem)
    with switched(torch.backends.mkldnn.conv, "tf32"):
        results = numerics.results_of(dk.multidilated_conv2d, problem)
    assert max(numerics.error_ratios(problem, results).values()) <= 5
    transformed = ("out", "grad inputs[0]", "grad weight")
    assert all(not torch.equal(results[name], exact[name]) for name in transformed)


@pytest.mark.skipif(dk.why_not("cpu") is not None, reason="no compiled kernels")
def test_medium_on_cpus(generator: torch.Generator) -> None:
    """No further from the truth than exact arithmetic from bfloat16 numbers to bfloat16 numbers.

    Not than plain torch in bfloat16: its gradient of the weight has been NaN, once.
    """

    def rounded(t: Tensor) -> Tensor:
        return t.bfloat16().double()

    problem = LAYER.problem(generator)
    truth = numerics.results_of(reference.multidilated_conv2d, problem.map(Tensor.double))
    coarse = numerics.results_of(reference.multidilated_conv2d, problem.map(rounded))
    with switched(torch.backends.mkldnn.conv, "bf16"):
        results = numerics.results_of(dk.multidilated_conv2d, problem)
    for name, result in results.items():
        assert result.dtype == torch.float32
        found, allowed = (
            (t.double() - truth[name]).norm() for t in (result, rounded(coarse[name]))
        )
        assert found <= allowed, name
