"""`dk.d2_block` as one function: right on the whole grid, in every mode torch can run it.

How it lives with the rest of torch is in test_d2_block_torch.py, and what the modules add
(checkpointing, SyncBatchNorm, official numbers) in test_modules.py.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import block_grid
import pytest
import torch
from block_grid import LARGE, NORMS, Case, X, assert_right, ours, random_module, results_of
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import d3net_kernels as dk
from d3net_kernels import reference

pytestmark = pytest.mark.filterwarnings(
    "ignore:d3net_kernels runs on plain torch", "ignore::DeprecationWarning"
)


@pytest.mark.parametrize("case", block_grid.CASES, ids=lambda case: case.name)
def test_right(case: Case, generator: torch.Generator) -> None:
    block = case.block(generator)
    assert_right(block, ours(block))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_right_on_a_large_block(
    norm: str, layout: str, mode: str, generator: torch.Generator
) -> None:
    block = replace(LARGE, norm=norm, layout=layout, mode=mode).block(generator)
    assert_right(block, ours(block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *block_grid.HALVES])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize(
    ("channels", "growth", "layers", "parts"),
    [
        (2, 2, 1, ()),
        (4, 4, 1, ()),
        (8, 2, 3, ()),
        (6, 2, 3, (2, 4)),
        (5, 1, 7, (3, 2)),
        (17, 7, 1, ()),
    ],
)
def test_right_on_few_channels_without_gradients(
    channels: int,
    growth: int,
    layers: int,
    parts: tuple[int, ...],
    layout: str,
    mode: str,
    norm: str,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    """Vectors run along rows: shorter than one, and of several with a rest."""
    for size in ((2, 7, 9), (1, 5, 53)):
        case = Case("", channels, growth, layers, size, dtype, norm, mode=mode, layout=layout)
        block = replace(case, parts=parts, needs=(), out_layers=(layers + 1) // 2).block(generator)
        with torch.no_grad():
            assert_right(block, ours(block))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_truth_by_its_definition(norm: str, mode: str, generator: torch.Generator) -> None:
    """Eq. 2 layer by layer on the outputs of the truth; a layer is checked in test_reference.py."""
    case = Case("", layers=4, size=(2, 5, 6), dtype=torch.float64, norm=norm, mode=mode, needs=())
    block = case.block(generator)
    params, k = block.params(), case.growth
    out = reference.d2_block(block.tensors["x"], params, **block.options())
    sources = [block.tensors["x"], *out.split(k, 1)]
    for layer in range(1, case.layers + 1):
        read = torch.cat(sources[:layer], 1)
        read_by = list(enumerate(params.convs[:layer]))
        scales, shifts = [], []
        for i in range(layer) if norm == "per_source" else [layer - 1]:
            values = sources[i] if norm == "per_source" else read
            n, t = params.norms[i], block.tensors
            mean = values.mean((0, 2, 3)) if mode == "train" else t[f"mean[{i}]"]
            var = values.var((0, 2, 3), correction=0) if mode == "train" else t[f"var[{i}]"]
            scales.append(n.weight / (var + n.eps).sqrt())
            shifts.append(n.bias - mean * scales[-1])
        expected = reference.multidilated_conv2d(
            sources[:layer],
            torch.cat([conv.weight.split(k)[layer - 1 - i] for i, conv in read_by], 1),
            sum(conv.bias.split(k)[layer - 1 - i] for i, conv in read_by),
            scale=torch.cat(scales),
            shift=torch.cat(shifts),
            relu=True,
        )
        torch.testing.assert_close(sources[layer], expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("needs", [block_grid.ALL, ("x",), ("weight", "gamma", "beta")])
def test_derivatives_of_both_orders(
    norm: str, mode: str, needs: tuple[str, ...], generator: torch.Generator
) -> None:
    case = Case("", 2, 1, 2, (2, 2, 3), torch.float64, norm, mode=mode, needs=needs, out_layers=1)
    block = case.block(generator)
    names = list(block.needed())

    def function(*values: Tensor) -> Tensor:
        given = replace(block, tensors=block.tensors | dict(zip(names, values, strict=True)))
        return dk.d2_block(given.tensors["x"], given.params(), **given.options())

    arguments = tuple(block.needed().values())
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)


@pytest.mark.parametrize("norm", NORMS)
def test_double_backward_through_some(norm: str, generator: torch.Generator) -> None:
    """A gradient penalty: the second order of everything, where the first was of x alone."""
    block = Case("", dtype=torch.float64, norm=norm).block(generator)

    def penalty(operation: Callable[..., Tensor]) -> dict[str, Tensor]:
        out = operation(block.tensors["x"], block.params(), **block.options())
        (grad,) = torch.autograd.grad(out.sin().sum(), block.tensors["x"], create_graph=True)
        grads = torch.autograd.grad(
            grad.square().sum(), list(block.needed().values()), allow_unused=True
        )
        return dict(zip(block.needed(), grads, strict=True))

    for name, expected in penalty(reference.d2_block).items():
        result = penalty(dk.d2_block)[name]
        zero = torch.zeros_like(block.tensors[name])
        torch.testing.assert_close(
            zero if result is None else result, zero if expected is None else expected, msg=name
        )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nothing_is_modified(norm: str, mode: str, generator: torch.Generator) -> None:
    block = Case("", norm=norm, mode=mode).block(generator)
    before = block.map(torch.clone)
    ours(block)
    for name, t in block.tensors.items():
        assert torch.equal(t, before.tensors[name]), name


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_backward_twice_and_accumulation(mode: str, generator: torch.Generator) -> None:
    block = Case("", mode=mode).block(generator)
    out = dk.d2_block(block.tensors["x"], block.params(), **block.options())
    out.backward(block.tensors["grad_output"], retain_graph=True)
    once = {name: t.grad.clone() for name, t in block.needed().items()}
    out.backward(block.tensors["grad_output"])
    for name, t in block.needed().items():
        assert torch.equal(t.grad, 2 * once[name]), name


@pytest.mark.parametrize("changed", ["out", "x", "weight[1]", "gamma[0]"])
@pytest.mark.parametrize("out_layers", [1, None])
def test_change_in_place_before_backward(
    changed: str, out_layers: int | None, generator: torch.Generator
) -> None:
    """Gradients of what was computed, or torch's error; never those of other numbers."""
    block = Case("", out_layers=out_layers).block(generator)
    expected = ours(block)
    leaves = block.needed()
    inputs = {name: 1 * t for name, t in leaves.items()}  # a leaf cannot change in place
    changing = replace(block, tensors=block.tensors | inputs)
    out = dk.d2_block(inputs["x"], changing.params(), **block.options())
    seen = 1 * out
    (out if changed == "out" else inputs[changed]).mul_(2)
    try:
        grads = torch.autograd.grad(seen, list(leaves.values()), block.tensors["grad_output"])
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return
    for name, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(grad, expected[f"grad {name}"], msg=name)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nan_is_seen_where_it_should_be(norm: str, mode: str, generator: torch.Generator) -> None:
    """Batch statistics spread it over their channel, running ones leave the other maps alone."""
    case = replace(LARGE, norm=norm, mode=mode, needs=(), layers=3, size=(2, 18, 35))
    block = case.block(generator)
    block.tensors["x"][0, 2, 4, 5] = torch.nan
    expected = results_of(reference.d2_block, block)
    for name, result in ours(block).items():
        assert torch.equal(result.isnan(), expected[name].isnan()), name


def test_nan_in_the_gradient(generator: torch.Generator) -> None:
    block = replace(LARGE, layers=3, mode="eval").block(generator)
    block.tensors["grad_output"][0, 5, 6, 7] = torch.nan
    expected = results_of(reference.d2_block, block)
    for name, result in ours(block).items():
        assert torch.equal(result.isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
def test_autocast(norm: str, mode: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """As near to the truth as plain torch under autocast; gradients in the parameters' dtype."""
    block = replace(LARGE, norm=norm, mode=mode, size=(2, 10, 14)).block(generator)
    with torch.autocast("cpu", dtype=dtype):
        results = ours(block)
    assert_right(block, results, autocast=dtype)


def test_autocast_leaves_float64_alone(generator: torch.Generator) -> None:
    block = Case("", dtype=torch.float64).block(generator)
    expected = ours(block)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, result in ours(block).items():
            assert torch.equal(result, expected[name]), name


@pytest.fixture(params=["float32_matmul_precision", "mkldnn"])
def switch(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Either of torch's switches of float32 precision, as a function of "high" or "medium"."""
    conv = torch.backends.mkldnn.conv
    before = torch.get_float32_matmul_precision(), getattr(conv, "fp32_precision", None)

    def turn(precision: str) -> None:
        if request.param == "float32_matmul_precision":
            torch.set_float32_matmul_precision(precision)
        else:
            conv.fp32_precision = {"high": "tf32", "medium": "bf16"}[precision]

    if request.param == "mkldnn" and before[1] is None:
        pytest.skip(reason="this torch has no torch.backends.mkldnn.conv.fp32_precision")
    yield turn
    torch.set_float32_matmul_precision(before[0])
    if before[1] is not None:
        conv.fp32_precision = before[1]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_high_precision(
    norm: str, mode: str, switch: Callable[[str], None], generator: torch.Generator
) -> None:
    """Five times plain torch's error under "highest", and 2e-5 of the output's deviation."""
    block = replace(LARGE, norm=norm, mode=mode).block(generator)
    truth = reference.d2_block(
        block.tensors["x"].double(), block.map(Tensor.double).params(), **block.options()
    )
    switch("high")
    results = ours(block)
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends.mkldnn.conv, "fp32_precision"):
        torch.backends.mkldnn.conv.fp32_precision = "ieee"
    assert_right(block, results, factor=5)
    assert (results["out"].double() - truth).abs().max() <= 2e-5 * truth.std()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_medium_precision(
    norm: str, mode: str, switch: Callable[[str], None], generator: torch.Generator
) -> None:
    """No further from the truth than plain torch in bfloat16, on average of several draws and of
    the sources: in a single one a ReLU's input may round to the other side of zero for one of them
    alone, which moves a gradient of few numbers by much. Half as much again is for the luck that is
    left (the ratio's median is .8, its 999th of 1000 draws 1.3)."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for _ in range(9):
        block = replace(LARGE, norm=norm, mode=mode, size=(2, 10, 14)).block(generator)
        truth = results_of(reference.d2_block, block.map(Tensor.double))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain = results_of(reference.d2_block, block)
        switch("medium")
        results = ours(block)
        switch("high")
        for name, result in results.items():
            assert result.dtype == torch.float32
            size = float(truth[name].norm()) or 1
            found, allowed = (float((t - truth[name]).norm()) for t in (result, plain[name]))
            kind = name.partition("[")[0]
            errors.setdefault(kind, []).append((found / size, allowed / size))
    for name, pairs in errors.items():
        found, allowed = (statistics.fmean(column) for column in zip(*pairs, strict=True))
        assert found <= 1.5 * allowed + 8 * torch.finfo(torch.float32).eps, name


@pytest.mark.parametrize("momentum", [0.1, None])
def test_tensor_momentum_and_counting(momentum: float | None) -> None:
    """Three steps: the moving average, or with momentum None the plain one."""
    block = random_module(momentum=momentum)
    other = copy.deepcopy(block)
    for step in range(3):
        x = X.roll(step, 3) + step
        out = block(x)
        with dk.use_backend("reference"):
            torch.testing.assert_close(out, other(x))
    for (name, b), c in zip(block.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=name)
    assert block.norms[0].num_batches_tracked == 3


def test_no_graph_is_kept_without_gradients() -> None:
    block = random_module()
    with torch.no_grad():
        assert block(X).grad_fn is None
    assert block.requires_grad_(False)(X).grad_fn is None
    assert block(X.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"x": torch.zeros(2, 4, 7, 9)},
            ValueError,
            "4 channels, but the weights were made for 5",
        ),
        ({"x": torch.zeros(5, 7, 9)}, ValueError, r"shape \(5, 7, 9\); accepted is \(N, C, H, W\)"),
        ({"x": torch.zeros(2, 5, 7, 9).int()}, TypeError, "dtype torch.int32; accepted are"),
        ({"x": torch.zeros(2, 5, 7, 9).double()}, TypeError, "must be equal"),
        ({"x": [1]}, TypeError, r"x\[0\] is of type int; accepted is a torch.Tensor"),
        ({"x": []}, ValueError, "x is an empty list"),
        ({"x": [torch.zeros(2, 2, 7, 9)] * 2}, ValueError, "4 channels, but the weights"),
        ({"x": [torch.zeros(2, 2, 7, 9), torch.zeros(2, 3, 7, 8)]}, ValueError, "share N, H and W"),
        ({"x": [torch.zeros(2, 5, 7, 9), torch.zeros(2, 0, 7, 9)]}, ValueError, "0 channels"),
        ({"x": torch.zeros(1, 5, 1, 1)}, ValueError, "more than one value per channel"),
        ({"norm": "batch"}, ValueError, "'per_source' and 'per_layer'"),
        ({"out_layers": 4}, ValueError, r"accepted are 1\.\.3"),
        ({"out_layers": 0}, ValueError, "integers >= 1"),
        ({"out_layers": True}, TypeError, "an int >= 1"),
    ],
    ids=str,
)
def test_bad_input(
    change: dict[str, Any], error: type[Exception], words: str, generator: torch.Generator
) -> None:
    block = Case("").block(generator)
    arguments: dict[str, Any] = {"x": block.tensors["x"], **block.options(), **change}
    params = block.params()
    means = [norm.running_mean.clone() for norm in params.norms]
    with pytest.raises(error, match=words):
        dk.d2_block(arguments.pop("x"), params, **arguments)
    for norm, mean in zip(params.norms, means, strict=True):
        assert torch.equal(norm.running_mean, mean), "a refused call counts in the statistics"
