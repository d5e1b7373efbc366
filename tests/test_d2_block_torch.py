"""D2 blocks with the rest of torch: changing weights, copies, threads, compile, export, vmap."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from block_grid import LARGE, NORMS, Case, X, ours, random_module
from torch import Tensor, nn
from torch.nn.utils import parametrize

import d3net_kernels as dk

pytestmark = pytest.mark.filterwarnings(
    "ignore:d3net_kernels runs on plain torch", "ignore::DeprecationWarning"
)


def _replace_parameter(block: dk.D2Block) -> None:
    block.convs[0].weight = nn.Parameter(1.5 * block.convs[0].weight.detach())


def _load_own_state(block: dk.D2Block, assign: bool = False) -> None:
    block.load_state_dict({k: 1.5 * v for k, v in block.state_dict().items()}, assign=assign)


def _optimise(block: dk.D2Block) -> None:
    for p in block.parameters():
        p.grad = p.detach().sign()
    torch.optim.SGD(block.parameters(), lr=0.1).step()
    torch.optim.AdamW(block.parameters(), lr=0.1, foreach=True).step()


def _without_grad(block: dk.D2Block) -> None:
    with torch.no_grad():
        for p in block.parameters():
            p.mul_(1.5)


class _Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


CHANGES: dict[str, Callable[[dk.D2Block], Any]] = {
    "data_copy": lambda b: b.convs[1].weight.data.copy_(1.5 * b.convs[1].weight.data),
    "data_of_one_kernel": lambda b: b.convs[2].weight.data[4].add_(1),
    "data_assigned": lambda b: setattr(b.convs[0].weight, "data", 1.5 * b.convs[0].weight.data),
    "detached": lambda b: b.convs[0].weight.detach().mul_(1.5),
    "numpy": lambda b: b.convs[0].weight.detach().numpy().__imul__(1.5),
    "bias_data": lambda b: b.convs[1].bias.data.add_(1),
    "gamma_data": lambda b: b.norms[1].weight.data.mul_(1.5),
    "beta_data": lambda b: b.norms[2].bias.data.add_(1),
    "running_mean": lambda b: b.norms[1].running_mean.sub_(1),
    "running_var": lambda b: b.norms[1].running_var.data.mul_(2),
    "eps": lambda b: setattr(b.norms[0], "eps", 0.5),
    "no_grad": _without_grad,
    "optimizer": _optimise,
    "load_state_dict": _load_own_state,
    "load_and_assign": lambda b: _load_own_state(b, assign=True),
    "parameter_replaced": _replace_parameter,
    "parametrized": lambda b: parametrize.register_parametrization(b.convs[0], "weight", _Scaled()),
    "trained": lambda b: (b.train()(X), b.eval()),
    "channels_last": lambda b: b.to(memory_format=torch.channels_last).convs[0].weight.data.mul_(2),
    "freed_and_allocated": lambda b: [_replace_parameter(b) or b(X) for _ in range(5)],
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_never_a_stale_result(change: Callable[[dk.D2Block], Any], grad: bool) -> None:
    """Whatever is kept from call to call, such as packed weights, follows every change."""
    torch.manual_seed(0)  # some draws have sources that the ReLU shuts off
    block = random_module().eval().requires_grad_(grad)
    for _ in range(3):
        before = block(X).detach().clone()
        change(block)
        out = block(X)
        with dk.use_backend("reference"):
            expected = block(X)
        deviation = expected.std()
        assert (out - expected).abs().max() <= 1e-4 * deviation
        assert (out - before).abs().max() >= 1e-2 * deviation, "the change is meant to be seen"
        if parametrize.is_parametrized(block.convs[0]) or block.norms[0].eps == 0.5:
            break  # a second one changes nothing


def test_functional_call_uses_what_it_is_given() -> None:
    block = random_module().eval()
    state = {name: 1.5 * t for name, t in block.state_dict().items()}
    out = torch.func.functional_call(block, state, X)
    other = random_module().eval()
    other.load_state_dict(state)
    assert torch.equal(out, other(X))
    assert not torch.allclose(out, block(X))


def test_copies_and_saved_files_have_their_own_weights() -> None:
    block = random_module().eval()
    out = block(X)
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    other = random_module().eval()
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block)), other]
    with torch.no_grad():
        for p in block.parameters():
            p.add_(1)
    assert all(torch.equal(c(X), out) for c in copies)
    assert not torch.allclose(block(X), out)
    assert {k: v.shape for k, v in block.state_dict().items()} == {
        k: v.shape for k, v in other.state_dict().items()
    }


@pytest.mark.parametrize("size", [LARGE.size, (2, 24, 180)])  # the second: weights in slices
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_for_any_threads_and_runs(
    norm: str, mode: str, size: tuple[int, int, int], generator: torch.Generator
) -> None:
    case = replace(LARGE, norm=norm, mode=mode, size=size, layout="channels_last")
    block = case.draw(generator)
    once = ours(block)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        for name, result in ours(block).items():
            assert torch.equal(result, once[name]), f"{name} differs with {threads} threads"
    torch.use_deterministic_algorithms(True)
    try:
        for name, result in ours(block).items():
            assert torch.equal(result, once[name]), f"{name} differs when asked for determinism"
    finally:
        torch.use_deterministic_algorithms(False)


def test_same_bits_in_python_threads(generator: torch.Generator) -> None:
    """Calls side by side, which share whatever the library keeps, do not see each other."""
    blocks = [replace(LARGE, channels=c, size=(1, 9, 14)).block(generator) for c in (5, 17, 18, 40)]
    once = [ours(block) for block in blocks]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for expected, results in zip(once, pool.map(ours, blocks), strict=True):
                assert all(torch.equal(results[name], t) for name, t in expected.items())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(norm: str, mode: str, layout: torch.memory_format, backend: str) -> None:
    """No graph break; results, gradients, buffers and strides as without."""
    torch._dynamo.reset()
    block = random_module(norm=norm).train(mode == "train")
    other = copy.deepcopy(block)
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    outs = []
    for module in (block, compiled):
        x = X.clone(memory_format=layout).requires_grad_()
        out = module(x)
        out.square().sum().backward()
        outs.append((out, x.grad))
    torch.testing.assert_close(outs[1], outs[0])
    assert outs[1][0].stride() == outs[0][0].stride()
    for p, q in zip(other.parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for b, c in zip(other.buffers(), block.buffers(), strict=True):
        torch.testing.assert_close(b, c)


@pytest.mark.parametrize("norm", NORMS)
def test_compile_with_dynamic_shapes(norm: str) -> None:
    torch._dynamo.reset()
    block = random_module(norm=norm)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((7, 8, 9), (6, 10, 12), (9, 11, 13)):  # unequal, or they are taken as one
            x = torch.randn(size[0], 17, *size[1:])
            torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("norm", NORMS)
def test_export(norm: str) -> None:
    block = random_module(norm=norm, out_layers=2).eval()
    exported = torch.export.export(block, (X,), dynamic_shapes={"x": {2: torch.export.Dim.DYNAMIC}})
    x = torch.randn(2, 17, 21, 14)
    torch.testing.assert_close(exported.module()(x), block(x))


@pytest.mark.parametrize("of_gradients", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_vmap(norm: str, of_gradients: bool, generator: torch.Generator) -> None:
    """One block over several inputs: as a loop, or a clear error."""
    case = Case("", dtype=torch.float64, norm=norm, mode="eval", needs=())
    block = case.block(generator)

    def call(x: Tensor) -> Tensor:
        return dk.d2_block(x, block.params(), **block.options())

    function = torch.func.grad(lambda x: call(x).square().sum()) if of_gradients else call
    xs = torch.stack([block.tensors["x"], 2 * block.tensors["x"]])
    try:
        result = torch.vmap(function)(xs)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        return
    torch.testing.assert_close(result, torch.stack([function(x) for x in xs]))
