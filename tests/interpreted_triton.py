"""The Triton kernels on CPU tensors, beyond the grid; test_triton.py sets TRITON_INTERPRET=1."""

from __future__ import annotations

import threading
from typing import Any

import block_grid
import grid
import pytest
import torch
from torch._subclasses import FakeTensorMode

import d3net_kernels as dk
from d3net_kernels import numerics, ops, reference
from d3net_kernels.backends.triton import configs, launch, prepared

SMALL = grid.Case("", channels=(3, 2), out_channels=4, size=(2, 5, 6))


def test_is_served() -> None:
    assert dk.why_not("triton", torch.zeros(1, 1, 1, 1)) is None
    assert "meta" in str(dk.why_not("triton", torch.zeros(1, 1, 1, 1, device="meta")))
    assert "65 sources" in str(dk.why_not("triton", *[torch.zeros(1, 1, 1, 1)] * 65))


def test_backward_pass_stays_with_triton(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also outside of use_backend and in another thread."""
    problem = SMALL.problem(generator)
    dilations = problem.dilations
    with dk.use_backend("triton"):
        out = dk.multidilated_conv2d(problem.inputs, problem.weight, dilations=dilations)
    called = []
    for name in ("backward_data", "backward_weight"):
        original = getattr(launch, name)

        def spy(*arguments: object, name: str = name, original: object = original) -> object:
            called.append(name)
            return original(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(launch, name, spy)
    thread = threading.Thread(target=lambda: out.backward(problem.grad_output))
    thread.start()
    thread.join()
    assert sorted(called) == ["backward_data", "backward_weight"]
    assert problem.weight.grad is not None


def test_second_derivatives(generator: torch.Generator) -> None:
    """As those of the default operators, which gradgradcheck holds to the definition."""
    case = grid.Case("", channels=(2, 1), out_channels=2, size=(1, 3, 4), dtype=torch.float64)
    problem = case.problem(generator)
    tensors = list(problem.tensors().values())
    grad_output = problem.grad_output.requires_grad_()

    def derivatives(operators: ops.Operators) -> tuple[torch.Tensor, ...]:
        out = operators.multidilated_conv2d(
            problem.inputs,
            problem.weight,
            problem.bias,
            [1, 1, 2, 2],
            problem.scale,
            problem.shift,
            True,
            0,
        )
        first = torch.autograd.grad(out, tensors, grad_output, create_graph=True)
        total = sum((g * g.cos()).sum() for g in first)
        return torch.autograd.grad(total, [grad_output, *tensors[:3], *tensors[4:]])

    torch.testing.assert_close(derivatives(ops.TRITON), derivatives(ops.DEFAULT))


def test_opcheck(generator: torch.Generator) -> None:
    """Strides and dtypes of fake and real kernels agree, and autograd through torch.compile's."""
    problem = SMALL.problem(generator)
    arguments = (
        problem.inputs,
        problem.weight,
        problem.bias,
        [1, 1, 2, 2],
        problem.scale,
        problem.shift,
        True,
        0,
    )
    torch.library.opcheck(ops.TRITON.multidilated_conv2d, arguments)


def test_compiled_as_one_node(generator: torch.Generator) -> None:
    problem = SMALL.problem(generator)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(backend=keep, fullgraph=True)
    def layer(*inputs: torch.Tensor) -> torch.Tensor:
        return dk.multidilated_conv2d(list(inputs), problem.weight, relu=True)

    with dk.use_backend("triton"):
        out = layer(*problem.inputs)
        expected = dk.multidilated_conv2d(problem.inputs, problem.weight, relu=True)
    assert torch.equal(out, expected)
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called == [ops.TRITON.multidilated_conv2d]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_training_step(dynamic: bool, generator: torch.Generator) -> None:
    """Gradients through torch.compile's own tracing of the operators, twice, at two widths."""

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    def layer(inputs: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
        return dk.multidilated_conv2d(inputs, weight, relu=True)

    for width in (6, 9):
        case = grid.Case("", channels=(3, 2), out_channels=4, size=(2, 5, width), psi=None)
        problem = case.problem(generator)
        tensors = [*problem.inputs, problem.weight]
        with dk.use_backend("triton"):
            compiled = layer(problem.inputs, problem.weight)
            plain = dk.multidilated_conv2d(problem.inputs, problem.weight, relu=True)
        assert torch.equal(compiled, plain)
        gradients = torch.autograd.grad(compiled, tensors, problem.grad_output)
        expected = torch.autograd.grad(plain, tensors, problem.grad_output)
        assert all(map(torch.equal, gradients, expected))


def test_compiled_function_follows_use_backend(generator: torch.Generator) -> None:
    problem = SMALL.problem(generator)
    targets: list[object] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        targets.extend(n.target for n in graph.graph.nodes if n.op == "call_function")
        return graph

    @torch.compile(backend=keep, fullgraph=True)
    def layer(*inputs: torch.Tensor) -> torch.Tensor:
        return dk.multidilated_conv2d(list(inputs), problem.weight)

    layer(*problem.inputs)
    with dk.use_backend("triton"):
        layer(*problem.inputs)
    layer(*problem.inputs)
    default, triton = ops.DEFAULT.multidilated_conv2d, ops.TRITON.multidilated_conv2d
    assert targets == [default, triton]


def test_fake_cuda_tensors(generator: torch.Generator) -> None:
    """What torch.compile sees of a GPU's tensors: shapes, devices and strides, here without one."""
    with FakeTensorMode():
        inputs = [torch.empty(2, c, 8, 9, device="cuda:0") for c in (4, 3)]
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        weight = torch.empty(5, 7, 3, 3, device="cuda:0")
        options = ([1, 1, 2, 2], None, None, True, 0)
        out = ops.TRITON.multidilated_conv2d(inputs, weight, None, *options)
        (to_x, not_wanted), _, _ = ops.TRITON.backward_data(out, inputs, weight, *options, [1, 0])
        to_weight, to_bias = ops.TRITON.backward_weight(out, inputs, weight, *options)
    assert (out.shape, out.stride()) == ((2, 5, 8, 9), (360, 1, 45, 5))
    assert (to_x.shape, to_x.stride(), not_wanted.numel()) == (inputs[0].shape, (288, 1, 36, 4), 0)
    assert (to_weight.shape, to_bias.shape) == (weight.shape, (5,))
    assert {t.device.type for t in (out, to_x, to_weight, to_bias)} == {"cuda"}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 3), (1, 3)])
def test_not_finite_in_the_weight_gradient(
    value: float, kernel: tuple[int, int], generator: torch.Generator
) -> None:
    """It reaches the taps that see it and no other: the corners are hidden from most."""
    case = grid.Case("", (4, 3), size=(2, 6, 9), kernel=kernel, relu=False, needs=("weight",))
    problem = case.problem(generator)
    problem.inputs[0][0, 1, 0, 0] = value
    problem.inputs[1][1, 2, 5, 8] = value
    results = grid.BACKENDS["triton"](problem)
    grid.assert_right(problem, results)
    gradient = results["grad weight"][:, 1]
    assert not gradient.isfinite().all()
    assert gradient.isfinite().any()


@pytest.mark.parametrize("norm", block_grid.NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block(
    dtype: torch.dtype,
    norm: str,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A D2 block that trains; every layer but the last measures what it makes."""
    measured = []
    original = launch.forward_with_moments

    def spy(*arguments: Any) -> Any:
        measured.append(len(arguments[0]))
        return original(*arguments)

    monkeypatch.setattr(launch, "forward_with_moments", spy)
    block = block_grid.Case("", 5, 3, 3, (2, 6, 7), dtype, norm).block(generator)
    with dk.use_backend("triton"):
        results = block_grid.ours(block)
    block_grid.assert_right(block, results)
    assert measured == [1, 2]


def test_same_bits_for_every_number_of_slabs_twice(generator: torch.Generator) -> None:
    problem = SMALL.problem(generator)
    with dk.use_backend("triton"):
        first = numerics.results_of(dk.multidilated_conv2d, problem)
        second = numerics.results_of(dk.multidilated_conv2d, problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("slabs", [1, 3, 10])
def test_slabs(slabs: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows, more slabs than patches, one slab."""
    monkeypatch.setattr(configs, "slabs", lambda *_: slabs)
    problem = grid.Case("", needs=("weight", "bias"), size=(2, 5, 6)).problem(generator)
    grid.assert_right(problem, grid.BACKENDS["triton"](problem))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_other"])
def test_wide_offsets(
    layout: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 64-bit variant, which only tensors of more than 2**30 elements choose."""
    for module in (launch, prepared):
        monkeypatch.setattr(module, "need_wide_offsets", lambda _: True)
    case = grid.Case("", channels=(3, 2), size=(2, 5, 6), layout=layout, grad_layout=layout)
    problem = case.problem(generator)
    grid.assert_right(problem, grid.BACKENDS["triton"](problem))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_other", "mixed"])
def test_prepared(layout: str, generator: torch.Generator) -> None:
    """psi of the sources pixel by pixel, whole chunks of channels, zeros behind each source."""
    case = grid.Case("", channels=(17, 3), size=(2, 5, 7), layout=layout)
    problem = case.problem(generator)
    psi = (problem.scale, problem.shift, problem.relu)
    found = prepared.prepare(problem.inputs, 16, 70, *psi)
    assert (found.starts, found.pitch) == ([0, 32], 80)
    first = 0
    expected = torch.zeros_like(found.image)
    for start, x in zip(found.starts, problem.inputs, strict=True):
        own = slice(first, first := first + x.shape[1])
        scale, shift = problem.scale[own], problem.shift[own]
        expected[:, start : start + x.shape[1]] = reference.psi(x, scale, shift, problem.relu)
    torch.testing.assert_close(found.image, expected)
