"""The convolution with moments inside torch, and the D2 blocks that it serves."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import block_grid
import grid
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import d3net_kernels as dk
from d3net_kernels import block_layers
from d3net_kernels.functional import multidilated_conv2d
from d3net_kernels.statistics import batch_statistics

pytestmark = pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")

_SMALL = grid.Case("", (2, 1), 2, (2, 3, 4), dtype=torch.float64)


@pytest.mark.parametrize("results", [(0, 1, 2), (1,), (2,), (1, 2)], ids=str)
@pytest.mark.parametrize("changes", [{}, {"psi": None}, {"bias": False, "relu": False}], ids=str)
def test_derivatives_of_both_orders(
    results: tuple[int, ...], changes: dict[str, Any], generator: torch.Generator
) -> None:
    problem = replace(_SMALL, **changes).problem(generator)
    names = list(problem.tensors())

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        all_three = grid.with_moments(problem, **dict(zip(names, values, strict=True)))
        return tuple(all_three[i] for i in results)

    arguments = tuple(problem.tensors().values())
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_is_that_of_batch_statistics(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    """One formula: without a gradient of the output itself even the same bits."""
    case = grid.Case("", (4, 3), 6, dtype=dtype, psi="float32")
    problem = case.problem(generator)
    weights = torch.randn(2, 6, generator=generator)
    tensors = list(problem.tensors().values())

    def gradients(mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((weights[0] * mean + weights[1] * var).sum(), tensors)

    out, mean, var = grid.with_moments(problem)
    expected = gradients(*batch_statistics(out)[:2])
    _, mean, var = grid.with_moments(problem)
    assert all(map(torch.equal, gradients(mean, var), expected))


def test_only_raw_tensors_are_kept(generator: torch.Generator) -> None:
    """Besides the arguments the output, which its readers keep too, and the mean."""
    problem = grid.Case("").problem(generator)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out, mean, _ = grid.with_moments(problem)
    known = {t.data_ptr() for t in (*problem.tensors().values(), out, mean)}
    assert len(kept) == len(problem.inputs) + 5
    assert all(t.data_ptr() in known for t in kept)


def test_nothing_is_recorded_without_need(generator: torch.Generator) -> None:
    problem = grid.Case("").problem(generator)
    with torch.no_grad():
        assert not any(t.requires_grad for t in grid.with_moments(problem))
    frozen = grid.Case("", needs=()).problem(generator)
    assert not any(t.requires_grad for t in grid.with_moments(frozen))


def test_autocast(generator: torch.Generator) -> None:
    problem = grid.Case("", needs=()).problem(generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, mean, var = grid.with_moments(problem)
    assert out.dtype == torch.bfloat16
    grid.assert_moments(out, mean, var)


@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap_grad", "hessian"])
def test_func_transforms(transform: str, generator: torch.Generator) -> None:
    problem = replace(_SMALL, needs=()).problem(generator)

    def loss(weight: Tensor) -> Tensor:
        out, mean, var = grid.with_moments(problem, weight=weight)
        return out.pow(3).sum() + (mean * var).sum()

    def plain(weight: Tensor) -> Tensor:
        with dk.use_backend("reference"):
            return loss(weight)

    def derivative(function: Callable[[Tensor], Tensor]) -> Tensor:
        gradient = torch.func.grad(function)
        if transform == "hessian":
            return torch.func.jacrev(gradient)(problem.weight)
        if transform.startswith("vmap"):
            mapped = torch.vmap(gradient if transform == "vmap_grad" else function)
            return mapped(torch.stack([problem.weight, 2 * problem.weight]))
        return gradient(problem.weight)

    torch.testing.assert_close(derivative(loss), derivative(plain))


class _Counted(TorchDispatchMode):
    """Counts this library's operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, name = func.name().split("::")
        if namespace == "d3net_kernels":
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def _layers(
    x: Tensor,
    params: dk.D2Params,
    norm: Any,
    out_layers: int | None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """A D2 block layer by layer, as on GPUs."""
    return block_layers.d2_block([x], params, norm, out_layers or len(params.convs), group)


_BLOCKS = [
    block_grid.Case("train", layers=4),
    block_grid.Case("last_alone", layers=3, out_layers=1),
    block_grid.Case("eval", layers=4, mode="eval"),
    block_grid.Case("frozen_some", layers=4, frozen=(1, 3)),
    block_grid.Case("frozen_all_but_the_last", layers=4, frozen=(0, 1, 2)),
    block_grid.Case("frozen_all", layers=3, frozen=(0, 1, 2)),
    block_grid.Case("no_running", layers=3, running=False, mode="eval"),
    block_grid.Case("one_layer", layers=1),
    block_grid.Case("no_batch", layers=3, size=(0, 4, 5)),
]


def _expected_calls(case: block_grid.Case) -> Counter[str]:
    taking = [
        not case.running or (case.mode == "train" and i not in case.frozen and case.size[0] > 0)
        for i in range(case.layers)
    ]
    if case.norm == "per_layer":
        taking = [any(taking[i:]) for i in range(case.layers)]
    expected = {
        "channel_moments": int(taking[0]),
        "multidilated_conv2d_with_moments": sum(taking[1:]),
        "multidilated_conv2d": case.layers - sum(taking[1:]),
    }
    return Counter({name: calls for name, calls in expected.items() if calls})


@pytest.mark.parametrize("norm", block_grid.NORMS)
@pytest.mark.parametrize("case", _BLOCKS, ids=lambda case: case.name)
def test_no_feature_is_read_for_its_statistics(
    case: block_grid.Case, norm: str, generator: torch.Generator
) -> None:
    """Only x_0 is; and where no batch statistics are asked for, nothing measures."""
    block = replace(case, norm=norm).draw(generator)
    with _Counted() as counted:
        out = _layers(block.tensors["x"], block.params(), **block.options())
    assert counted.calls == _expected_calls(replace(case, norm=norm))
    assert out.shape == block.tensors["grad_output"].shape


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch is built without torch.distributed and gloo",
)
@pytest.mark.parametrize("norm", block_grid.NORMS)
def test_nor_with_a_process_group(norm: str, generator: torch.Generator, tmp_path: Path) -> None:
    """What a process measures of its own batch is the part it gives to the others."""
    case = block_grid.Case("", layers=4, norm=norm, frozen=(2,))
    block = case.draw(generator)
    expected = block_grid.results_of(_layers, block)
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting_point", rank=0, world_size=1)
    try:
        with _Counted() as counted:
            results = block_grid.results_of(
                functools.partial(_layers, group=dist.group.WORLD), block
            )
    finally:
        dist.destroy_process_group()
    forward = {name: n for name, n in counted.calls.items() if "backward" not in name}
    assert forward == _expected_calls(case)
    for name, t in expected.items():
        torch.testing.assert_close(results[name], t, msg=name)


@pytest.mark.parametrize("norm", block_grid.NORMS)
@pytest.mark.parametrize("dtype", grid.DTYPES, ids=str)
def test_block_as_measured_afterwards(
    dtype: torch.dtype,
    norm: str,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same output and running statistics to the bit, the same gradients but for rounding."""
    block = block_grid.Case("", layers=4, norm=norm, dtype=dtype).draw(generator)
    results = block_grid.results_of(_layers, block)

    def afterwards(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        out = multidilated_conv2d(*arguments, **options)
        mean, var, _ = batch_statistics(out)
        return out, mean, var

    monkeypatch.setattr(block_layers, "multidilated_conv2d_with_moments", afterwards)
    expected = block_grid.results_of(_layers, block)
    for name, t in expected.items():
        if name.startswith("grad "):
            rounding = 8 * torch.finfo(dtype).eps
            assert (results[name] - t).norm() <= rounding * t.norm() + rounding, name
        else:
            assert torch.equal(results[name], t), name


@pytest.mark.parametrize("norm", block_grid.NORMS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_block(norm: str, dynamic: bool) -> None:
    """Layer by layer in one graph: features so narrow that the node does not serve them."""
    torch._dynamo.reset()
    block = dk.D2Block(3, 2, 3, norm=norm)
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((7, 8, 9), (6, 10, 12)):
        x = torch.randn(size[0], 3, *size[1:])
        out, expected = compiled(x), block(x)
        torch.testing.assert_close(out, expected)
        parameters = list(block.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(out.square().sum(), parameters),
            torch.autograd.grad(expected.square().sum(), parameters),
        )


def test_empty_batch_without_running_statistics(generator: torch.Generator) -> None:
    """Statistics of nothing are NaN, gradients those of nothing: zeros and no error."""
    case = block_grid.Case("", layers=2, size=(0, 4, 5), running=False)
    block = case.draw(generator)
    out = _layers(block.tensors["x"], block.params(), **block.options())
    (grad,) = torch.autograd.grad(out.sum(), block.tensors["x"])
    assert grad.shape == block.tensors["x"].shape
