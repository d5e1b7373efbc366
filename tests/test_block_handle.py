"""Calls without gradients on the same parameters build on each other: nothing is stale, nothing is
kept for longer than its user, and what is wrong is explained as in the first call."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import d3net_kernels as dk

pytestmark = pytest.mark.skipif(
    dk.why_not("cpu") is not None, reason=f"no cpu backend: {dk.why_not('cpu')}"
)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _handles() -> int:
    return int(torch.ops.d3net_kernels.d2_block_handles())


def _block(**options: Any) -> dk.D2Block:
    """With statistics that are not those of a new block."""
    block = dk.D2Block(6, 4, 3, **options)
    block(torch.randn(2, 6, 5, 7))
    return block.eval()


def _with_handle(**options: Any) -> tuple[dk.D2Block, Tensor]:
    block, x = _block(**options), torch.randn(1, 6, 5, 7)
    before = _handles()
    block(x), block(x)
    assert _handles() == before + 1
    return block, x


def _usual(block: dk.D2Block, x: Any) -> Tensor:
    """The result of a block that was never called."""
    out: Tensor = copy.deepcopy(block)(x)
    return out


@pytest.mark.parametrize("norm", ["per_source", "per_layer"])
@pytest.mark.parametrize("out_layers", [None, 1, 2])
@pytest.mark.parametrize("how", ["float32", "float64", "bfloat16", "float16", "autocast"])
def test_the_same_bits(norm: Any, out_layers: int | None, how: str) -> None:
    dtype = torch.float32 if how == "autocast" else getattr(torch, how)
    block = _block(norm=norm, out_layers=out_layers).to(dtype)
    x = torch.randn(2, 6, 5, 7, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        usual = _usual(block, x)
        for inputs in (x, x, x, [x[:, :2], x[:, 2:]], x.to(memory_format=torch.channels_last)):
            out = block(inputs)
            assert out.dtype == usual.dtype
            assert out.stride() == usual.stride()
            assert torch.equal(out, _usual(block, inputs))
    assert _handles() > 0


def test_other_sizes_and_no_pixels() -> None:
    block, _ = _with_handle()
    for size in ((3, 6, 4, 9), (1, 6, 1, 1), (0, 6, 5, 7), (2, 6, 0, 7)):
        x = torch.randn(size)
        assert torch.equal(block(x), _usual(block, x))


def test_precision_and_autocast_are_those_of_the_call() -> None:
    block, x = _with_handle()
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == torch.bfloat16
    assert block(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # leaves a handle for bfloat16 next to float32
        block(x), block(x)
    with pytest.raises(TypeError, match=r"weight has dtype .* and x torch"):
        block(x.bfloat16())


def _new_weight(block: Any) -> None:
    block.convs[1].weight = nn.Parameter(torch.randn_like(block.convs[1].weight))


def _replaced_conv(block: Any) -> None:
    block.convs[2] = nn.Conv2d(4, 4, 3, padding=4, dilation=4)


def _no_bias(block: Any) -> None:
    block.convs[0].bias = None


def _set(module: Any, name: str, value: Any) -> None:
    setattr(module, name, value)


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda b: b.convs[0].weight.mul_(1.5),
    "through data": lambda b: b.convs[0].bias.data.add_(1),
    "other data": lambda b: _set(b.convs[0].weight, "data", torch.randn(12, 6, 3, 3)),
    "data with gaps": lambda b: _set(b.norms[0].weight, "data", torch.randn(12)[::2]),
    "running mean": lambda b: b.norms[1].running_mean.add_(1),
    "running variance": lambda b: b.norms[0].running_var.mul_(2),
    "another running mean": lambda b: _set(b.norms[1], "running_mean", torch.randn(4)),
    "state_dict": lambda b: b.load_state_dict(_block().state_dict()),
    "state_dict assigned": lambda b: b.load_state_dict(_block().state_dict(), assign=True),
    "another weight": _new_weight,
    "another convolution": _replaced_conv,
    "no bias": _no_bias,
    "eps": lambda b: b.norms.apply(lambda n: _set(n, "eps", 0.5)),
    "training": lambda b: b.train(),
    "one norm trains": lambda b: b.norms[1].train(),
    "out_layers": lambda b: _set(b, "out_layers", 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str) -> None:
    block, x = _with_handle()
    before = block(x)
    CHANGES[change](block)
    usual = _usual(block, x)
    assert usual.shape != before.shape or not torch.equal(usual, before)
    for _ in range(3):
        expected = _usual(block, x)
        assert torch.equal(block(x), expected)


def test_another_dtype() -> None:
    block, x = _with_handle()
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        block.to(dtype)
        for _ in range(3):
            assert torch.equal(block(x.to(dtype)), _usual(block, x.to(dtype)))


@pytest.mark.parametrize("swaps", [False, True])
def test_conversions_may_exchange_tensors(swaps: bool) -> None:
    """torch.utils.swap_tensors refuses those that somebody else holds."""
    block, x = _with_handle()
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        block.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(block(x.double()), _usual(block, x.double()))


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "channels": (torch.randn(1, 5, 5, 7), ValueError, "x has 5 channels, but the weights"),
    "dimensions": (torch.randn(6, 5, 7), ValueError, r"x has shape \(6, 5, 7\)"),
    "dtype": (torch.randn(1, 6, 5, 7).double(), TypeError, "weight has dtype torch.float32"),
    "integers": (torch.ones(1, 6, 5, 7, dtype=torch.int), TypeError, "x has dtype torch.int32"),
    "sparse": (torch.randn(1, 6, 5, 7).to_sparse(), TypeError, "x has layout torch.sparse_coo"),
    "no tensor": (None, TypeError, "x is of type NoneType"),
    "no part": ([], ValueError, "x is an empty list"),
    "device": (torch.randn(1, 6, 5, 7, device="meta"), ValueError, "weight is on cpu and x on me"),
    "parts": ([torch.randn(1, 3, 5, 7), torch.randn(1, 3, 5, 8)], ValueError, r"x\[1\] has shape"),
    "dtypes": ([torch.randn(1, 3, 5, 7), torch.randn(1, 3, 5, 7).half()], TypeError, r"x\[1\] has"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_explained(what: str) -> None:
    block, x = _with_handle()
    value, error, words = BAD[what]
    with pytest.raises(error, match=words):
        block(value)
    assert torch.equal(block(x), _usual(block, x))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"norm": "batch"}, ValueError, "norm is 'batch'"),
        ({"norm": ["per_source"]}, ValueError, "norm is"),
        ({"out_layers": 9}, ValueError, "out_layers is 9"),
        ({"out_layers": True}, TypeError, "out_layers is True"),
        ({"out_layers": 1.0}, TypeError, "out_layers is 1.0"),
        ({"process_group": "mars"}, ValueError, "process_group is 'mars'"),
    ],
)
def test_bad_options_are_explained(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    block, x = _with_handle(out_layers=1)
    params = block._params()
    assert params.handles
    with pytest.raises(error, match=words):
        dk.d2_block(x, params, **options)


def test_others_look_at_operators_they_know() -> None:
    block, x = _with_handle()
    usual = _usual(block, x)
    two = torch.stack([x, 2 * x])
    assert torch.equal(torch.vmap(block)(two)[0], usual)
    traced = make_fx(block)(x)
    assert "of_handle" not in traced.code
    assert torch.equal(traced(x), usual)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        block(forward_ad.make_dual(x, torch.ones_like(x)))
    with dk.use_backend("reference"):
        reference = block(x)
    assert torch.equal(block(x), usual)
    torch.testing.assert_close(reference, usual)
    with torch.enable_grad():
        out = block(x.clone().requires_grad_())
        assert out.requires_grad
        assert torch.equal(out, usual)


def test_compiled_after_a_handle() -> None:
    block, x = _with_handle()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), _usual(block, x))
    assert torch.equal(compiled(2 * x), _usual(block, 2 * x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_for_longer_than_the_block(mode: Any) -> None:
    before = _handles()
    with mode():
        block, x = _with_handle()
        with torch.autocast("cpu", torch.bfloat16):
            block(x), block(x)
    assert _handles() == before + 2
    weight = weakref.ref(block.convs[0].weight)
    del block
    assert _handles() == before
    assert weight() is None


def test_a_block_with_other_parameters_lets_go_of_the_first() -> None:
    before = _handles()
    block, x = _with_handle()
    first = weakref.ref(block.convs[1].weight)
    _new_weight(block)
    block(x)
    assert first() is None
    assert _handles() == before
    block(x)
    assert _handles() == before + 1


def test_parameters_made_for_one_call_leave_no_handle() -> None:
    block, x = _block(), torch.randn(1, 6, 5, 7)
    before = _handles()
    for _ in range(5):
        weights = {name: 2 * t for name, t in block.named_parameters()}
        torch.func.functional_call(block, weights, (x,))
    assert _handles() == before


def test_nothing_of_a_transform_is_kept() -> None:
    block, x = _block(), torch.randn(1, 6, 5, 7)
    many = {name: torch.stack([t, 2 * t]) for name, t in block.named_parameters()}
    seen = weakref.ref(many["convs.0.weight"])
    one_by_one = torch.vmap(lambda w: torch.func.functional_call(block, w, (x,)), randomness="same")
    assert torch.equal(one_by_one(many)[0], _usual(block, x))
    del many
    assert seen() is None


def test_no_graph_is_kept() -> None:
    block, x = _block(), torch.randn(1, 6, 5, 7)
    with torch.enable_grad():
        weights = {name: 2 * t for name, t in block.named_parameters()}
    seen = weakref.ref(weights["convs.0.weight"])
    torch.func.functional_call(block, weights, (x,))
    del weights
    assert seen() is None


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["deepcopy", "pickle"]
)
def test_copies_have_handles_of_their_own(copied: Callable[[Any], Any]) -> None:
    block, x = _with_handle()
    before = _handles()
    other = copied(block)
    assert _handles() == before
    other.convs[0].weight.mul_(2)
    other(x), other(x)
    assert _handles() == before + 1
    expected = _usual(block, x)
    assert not torch.equal(other(x), expected)
    del other
    assert _handles() == before
    assert torch.equal(block(x), expected)
    params = block._params()
    for again in (copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert not again.handles
        assert torch.equal(dk.d2_block(x, again), expected)


def test_parametrized_convolutions_are_made_anew() -> None:
    block: Any = _block()
    x = torch.randn(1, 6, 5, 7)
    nn.utils.parametrizations.weight_norm(block.convs[0])
    before = _handles()
    for _ in range(3):
        first = block(x)
    assert _handles() == before
    block.convs[0].parametrizations.weight.original0.mul_(3)
    assert not torch.equal(block(x), first)


def test_threads_share_a_block() -> None:
    block = _block()
    inputs = [torch.randn(1, 6, 5, 7) for _ in range(16)]
    usual = [_usual(block, x) for x in inputs]

    def call(i: int) -> bool:
        with torch.no_grad():  # each thread has its own switch
            return all(torch.equal(block(inputs[i]), usual[i]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(16)))


def test_an_unknown_handle_is_refused() -> None:
    with pytest.raises(RuntimeError, match="there is no handle -1"):
        torch.ops.d3net_kernels.d2_block_of_handle([torch.randn(1, 6, 5, 7)], -1, 0)
