"""The operators inside torch: opcheck, compile, export, autocast, vmap."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import grid
import pytest
import torch
from torch import Tensor

import d3net_kernels as dk
from d3net_kernels import backends, ops, reference
from d3net_kernels.numerics import Problem

pytestmark = pytest.mark.filterwarnings(
    "ignore:d3net_kernels runs on plain torch", "ignore::DeprecationWarning"
)

_CASES = [
    grid.Case("float32"),
    grid.Case("float64", dtype=torch.float64),
    grid.Case("channels_last", layout="channels_last"),
    grid.Case("slice", layout="slice_last", channels=(3, 1)),
    grid.Case("one_channel", channels=(1, 2), layout="channels_last", size=(2, 1, 7)),
    grid.Case("bfloat16", dtype=torch.bfloat16, psi="float32"),
    grid.Case("plain", psi=None, relu=False, bias=False),
    grid.Case("partly", needs=("inputs[1]", "weight", "shift")),
]


def _arguments(op: Any, problem: Problem) -> tuple[Any, ...]:
    """The arguments of one of the three operators."""
    dilations = [d for pair in problem.dilations for d in pair]
    options = (dilations, problem.scale, problem.shift, problem.relu, 0)
    if op is ops.multidilated_conv2d:
        return (problem.inputs, problem.weight, problem.bias, *options)
    arguments = (problem.grad_output, problem.inputs, problem.weight, *options)
    return (*arguments, [1, 0, 1][: len(problem.inputs)]) if op is ops.backward_data else arguments


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "op", [ops.multidilated_conv2d, ops.backward_data, ops.backward_weight], ids=str
)
def test_opcheck(op: Any, case: grid.Case, generator: torch.Generator) -> None:
    torch.library.opcheck(op, _arguments(op, case.problem(generator)))


def _layer(x: Tensor, y: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return dk.multidilated_conv2d([x.sin(), y], weight, scale=scale, shift=shift, relu=True).cos()


def _layer_arguments(*size: int) -> list[Tensor]:
    shapes = ((size[0], 3, *size[1:]), (size[0], 2, *size[1:]), (4, 5, 3, 3), (5,), (5,))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def test_compile_with_dynamic_shapes() -> None:
    """One graph serves every size: no break, no recompilation, right gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(_layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((7, 8, 9), (6, 10, 12), (9, 11, 13)):  # unequal, or they are taken as one
            arguments = _layer_arguments(*size)
            out, expected = compiled(*arguments), _layer(*arguments)
            torch.testing.assert_close(out, expected)
            for g, e in zip(
                torch.autograd.grad(out.sum(), arguments),
                torch.autograd.grad(expected.sum(), arguments),
                strict=True,
            ):
                torch.testing.assert_close(g, e)


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compile_with_inductor(memory_format: torch.memory_format) -> None:
    torch._dynamo.reset()
    arguments = _layer_arguments(2, 8, 9)
    for i in (0, 1):
        given = arguments[i].detach().contiguous(memory_format=memory_format)
        arguments[i] = given.requires_grad_()
    out, expected = torch.compile(_layer, fullgraph=True)(*arguments), _layer(*arguments)
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()
    for g, e in zip(
        torch.autograd.grad(out.sum(), arguments),
        torch.autograd.grad(expected.sum(), arguments),
        strict=True,
    ):
        torch.testing.assert_close(g, e)


def test_compiled_function_follows_the_backend() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_layer, fullgraph=True, backend="eager")
    arguments = _layer_arguments(2, 8, 9)
    fused = compiled(*arguments)
    with dk.use_backend("reference"):
        plain = compiled(*arguments)
    assert "CppFunction" not in type(fused.grad_fn).__name__
    torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize("training", [True, False])
def test_compile_block(training: bool) -> None:
    torch._dynamo.reset()
    block = dk.D2Block(4, 3, 3).train(training)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 6, 7)
    torch.testing.assert_close(compiled(x), block(x))
    for buffer, expected in zip(compiled.buffers(), block.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


def test_export_with_dynamic_size() -> None:
    block = dk.D2Block(4, 3, 3, out_layers=1).eval()
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    exported = torch.export.export(
        block,
        (torch.randn(2, 4, 6, 7),),
        dynamic_shapes={"x": {2: height, 3: width}},
    )
    x = torch.randn(2, 4, 13, 5)
    torch.testing.assert_close(exported.module()(x), block(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, generator: torch.Generator) -> None:
    """inputs, weight and bias are cast; scale and shift are not."""
    p = grid.Case("").problem(generator)
    psi = {"scale": p.scale, "shift": p.shift, "relu": True}
    with torch.autocast("cpu", dtype=dtype):
        out = dk.multidilated_conv2d(p.inputs, p.weight, p.bias, **psi)
        mixed = dk.multidilated_conv2d(
            [p.inputs[0].to(dtype), *p.inputs[1:]], p.weight, p.bias, **psi
        )
    expected = dk.multidilated_conv2d(
        [x.to(dtype) for x in p.inputs], p.weight.to(dtype), p.bias.to(dtype), **psi
    )
    assert torch.equal(out, expected)
    assert torch.equal(mixed, expected)
    out.float().sum().backward()
    assert p.weight.grad.dtype == p.scale.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone(generator: torch.Generator) -> None:
    p = grid.Case("", dtype=torch.float64).problem(generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dk.multidilated_conv2d(p.inputs, p.weight, p.bias).dtype == torch.float64


@pytest.mark.parametrize("training", [True, False])
def test_autocast_block(training: bool) -> None:
    block = dk.D2Block(4, 3, 3).train(training)
    x = torch.randn(2, 4, 6, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(x)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32


_VMAPPED = {
    "inputs": ("inputs[0]", "inputs[1]"),
    "one_input": ("inputs[1]",),
    "weight": ("weight",),
    "scale": ("scale", "shift"),
    "everything": ("inputs[0]", "inputs[1]", "weight", "bias", "scale", "shift"),
}


@pytest.mark.parametrize("batched", _VMAPPED.values(), ids=_VMAPPED)
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("psi", ["same", None])
def test_vmap(
    batched: tuple[str, ...], dim: int, psi: str | None, generator: torch.Generator
) -> None:
    problem = grid.Case("", channels=(2, 3), dtype=torch.float64, psi=psi, needs=()).problem(
        generator
    )
    names = [name for name in batched if name in problem.tensors()]
    if not names:
        pytest.skip(reason="there is no scale to batch")
    single = [problem.tensors()[name] for name in names]
    stacked = [torch.stack([t, 2 * t, -t], dim) for t in single]

    def values_and_gradients(operation: Callable[..., Tensor]) -> Callable[..., Any]:
        def loss(*values: Tensor) -> tuple[Tensor, Tensor]:
            given = problem.tensors() | dict(zip(names, values, strict=True))
            out = operation(
                [given["inputs[0]"], given["inputs[1]"]],
                given["weight"],
                given["bias"],
                scale=given.get("scale"),
                shift=given.get("shift"),
                relu=True,
            )
            return out.square().sum(), out

        return torch.func.grad(loss, argnums=tuple(range(len(names))), has_aux=True)

    result = torch.vmap(values_and_gradients(dk.multidilated_conv2d), in_dims=dim)(*stacked)
    expected = torch.vmap(values_and_gradients(reference.multidilated_conv2d), in_dims=dim)(
        *stacked
    )
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("op", [ops.backward_data, ops.backward_weight], ids=str)
@pytest.mark.parametrize("psi", ["same", None])
def test_vmap_of_backward(op: Any, psi: str | None, generator: torch.Generator) -> None:
    problem = grid.Case("", psi=psi, needs=()).problem(generator)
    grad, *others = _arguments(op, problem)
    grads = torch.stack([grad, 2 * grad])
    result = torch.vmap(lambda g: op(g, *others))(grads)
    singles = [op(g, *others) for g in grads]
    flat = torch.utils._pytree.tree_leaves(result)
    for i, t in enumerate(flat):
        parts = [torch.utils._pytree.tree_leaves(single)[i] for single in singles]
        assert t.shape[0] == 2 or t.numel() == 0
        torch.testing.assert_close(t, torch.stack(parts))


def test_forced_backend_that_is_absent() -> None:
    with pytest.raises(RuntimeError, match="cuda backend is not available: "):
        dk.use_backend("cuda")
    with pytest.raises(ValueError, match="accepted are cpu, cuda, triton, reference"):
        dk.use_backend("cudnn")
    assert dk.why_not("reference", torch.randn(1)) is None
    if not torch.cuda.is_available():
        assert "no GPU" in str(dk.why_not("triton"))


def test_backends_nest_and_return_after_an_error() -> None:
    outer = dk.use_backend("reference")

    def fail_inside() -> None:
        with outer, outer:
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert backends._forced is None
    with outer:
        with outer:
            pass
        assert backends._forced == "reference"
    assert backends._forced is None


def test_modules_survive_pickle_and_deepcopy() -> None:
    x = torch.randn(2, 5, 6, 7)
    for module in (dk.D2Block(5, 3, 2).eval(), dk.MultidilatedConv2d([2, 3], 4)):
        for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            assert torch.equal(other(x), module(x))
            assert repr(other) == repr(module)
