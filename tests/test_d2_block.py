"""`dk.d2_block` as one function: right on the whole grid, in every mode torch can run it.

What the modules add is in test_modules.py (checkpointing, SyncBatchNorm, official numbers), and
forward passes in compiled and exported modules are in test_integration.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import block_grid
import pytest
import torch
from block_grid import Block, Case, assert_right, results_of
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrize

import d3net_kernels as dk
from d3net_kernels import reference

pytestmark = pytest.mark.filterwarnings(
    "ignore:d3net_kernels runs on plain torch", "ignore::DeprecationWarning"
)

NORMS = ("per_source", "per_layer")
# Wide enough for every algorithm: several tiles, vectors and dilations, and remainders of each.
LARGE = Case("large", channels=17, growth=18, layers=4, size=(2, 18, 35))


def _ours(block: Block) -> dict[str, Tensor]:
    return results_of(dk.d2_block, block)


@pytest.mark.parametrize("case", block_grid.CASES, ids=lambda case: case.name)
def test_right(case: Case, generator: torch.Generator) -> None:
    block = case.block(generator)
    assert_right(block, _ours(block))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_right_on_a_large_block(
    norm: str, layout: str, mode: str, generator: torch.Generator
) -> None:
    block = replace(LARGE, norm=norm, layout=layout, mode=mode).block(generator)
    assert_right(block, _ours(block))


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
            torch.cat(
                [c.weight.split(k)[layer - 1 - i] for i, c in enumerate(params.convs[:layer])], 1
            ),
            sum(c.bias.split(k)[layer - 1 - i] for i, c in enumerate(params.convs[:layer])),
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
    _ours(block)
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
    expected = _ours(block)
    leaves = block.needed()
    inputs = {name: 1 * t for name, t in leaves.items()}  # a leaf cannot change in place
    changing = replace(block, tensors=block.tensors | inputs)
    out = dk.d2_block(inputs["x"], changing.params(), **block.options())
    seen = 1 * out
    (out if changed == "out" else inputs[changed]).mul_(2)
    try:
        grads = torch.autograd.grad(seen, list(leaves.values()), block.tensors["grad_output"])
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    for name, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(grad, expected[f"grad {name}"], msg=name)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nan_is_seen_where_it_should_be(norm: str, mode: str, generator: torch.Generator) -> None:
    """Batch statistics spread it over their channel, running ones leave the other maps alone."""
    case = replace(LARGE, norm=norm, mode=mode, needs=(), layers=3)
    block = case.block(generator)
    block.tensors["x"][1, 2, 4, 5] = torch.nan
    expected = results_of(reference.d2_block, block)
    for name, result in _ours(block).items():
        assert torch.equal(result.isnan(), expected[name].isnan()), name


def test_nan_in_the_gradient(generator: torch.Generator) -> None:
    block = replace(LARGE, layers=3, mode="eval").block(generator)
    block.tensors["grad_output"][0, 5, 6, 7] = torch.nan
    expected = results_of(reference.d2_block, block)
    for name, result in _ours(block).items():
        assert torch.equal(result.isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
def test_autocast(norm: str, mode: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """As near to the truth as plain torch under autocast; gradients in the parameters' dtype."""
    block = replace(LARGE, norm=norm, mode=mode, size=(2, 10, 14)).block(generator)
    truth = results_of(reference.d2_block, block.map(Tensor.double))
    with torch.autocast("cpu", dtype=dtype):
        ours, plain = (results_of(op, block) for op in (dk.d2_block, reference.d2_block))
    assert ours["out"].dtype == dtype
    for name, expected in truth.items():
        assert ours[name].dtype == plain[name].dtype, name
        size = expected.norm()
        error, allowed = ((r[name].double() - expected).norm() / size for r in (ours, plain))
        # x is rounded once more than in plain torch, which normalises it in float32.
        assert error <= allowed + 2 * torch.finfo(dtype).eps, f"{name}: {error:.1e} {allowed:.1e}"


def test_autocast_leaves_float64_alone(generator: torch.Generator) -> None:
    block = Case("", dtype=torch.float64).block(generator)
    expected = _ours(block)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, result in _ours(block).items():
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
    block = replace(LARGE, norm=norm, mode=mode, layers=3, size=(1, 18, 27)).block(generator)
    truth = reference.d2_block(
        block.tensors["x"].double(), block.map(Tensor.double).params(), **block.options()
    )
    switch("high")
    results = _ours(block)
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
    """No further from the truth than plain torch in bfloat16."""
    block = replace(LARGE, norm=norm, mode=mode, size=(2, 10, 14)).block(generator)
    truth = results_of(reference.d2_block, block.map(Tensor.double))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = results_of(reference.d2_block, block)
    switch("medium")
    for name, result in _ours(block).items():
        error, allowed = ((t.double() - truth[name]).norm() for t in (result, plain[name]))
        assert result.dtype == torch.float32
        assert error <= allowed + torch.finfo(torch.bfloat16).eps * truth[name].norm(), name


def _block(**options: Any) -> dk.D2Block:
    """A block whose statistics and affines are all but trivial."""
    block = dk.D2Block(17, 9, 3, **options)
    for norm in block.norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return block


X = torch.linspace(0, 300, 2 * 17 * 9 * 14).sin().view(2, 17, 9, 14)


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
    "data_of_one_entry": lambda b: b.convs[2].weight.data[4, 3, 1, 1].add_(1),
    "data_assigned": lambda b: setattr(b.convs[0].weight, "data", 1.5 * b.convs[0].weight.data),
    "detached": lambda b: b.convs[0].weight.detach().mul_(1.5),
    "numpy": lambda b: b.convs[0].weight.detach().numpy().__imul__(1.5),
    "bias_data": lambda b: b.convs[1].bias.data.add_(1),
    "gamma_data": lambda b: b.norms[1].weight.data.mul_(1.5),
    "beta_data": lambda b: b.norms[2].bias.data.add_(1),
    "running_mean": lambda b: b.norms[1].running_mean.add_(1),
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
    block = _block().eval().requires_grad_(grad)
    for _ in range(3):
        before = block(X).detach().clone()
        change(block)
        out = block(X)
        with dk.use_backend("reference"):
            expected = block(X)
        torch.testing.assert_close(out, expected)
        assert not torch.allclose(out, before), "the change is meant to be seen"
        if parametrize.is_parametrized(block.convs[0]) or block.norms[0].eps == 0.5:
            break  # a second one changes nothing


def test_functional_call_uses_what_it_is_given() -> None:
    block = _block().eval()
    state = {name: 1.5 * t for name, t in block.state_dict().items()}
    out = torch.func.functional_call(block, state, X)
    other = _block().eval()
    other.load_state_dict(state)
    assert torch.equal(out, other(X))
    assert not torch.allclose(out, block(X))


def test_copies_and_saved_files_have_their_own_weights() -> None:
    block = _block().eval()
    out = block(X)
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    other = _block().eval()
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


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_for_any_threads_and_runs(
    norm: str, mode: str, generator: torch.Generator
) -> None:
    block = replace(LARGE, norm=norm, mode=mode, layout="channels_last").block(generator)
    once = _ours(block)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for name, result in _ours(block).items():
            assert torch.equal(result, once[name]), f"{name} differs with {threads} threads"
    torch.use_deterministic_algorithms(True)
    try:
        for name, result in _ours(block).items():
            assert torch.equal(result, once[name]), f"{name} differs when asked for determinism"
    finally:
        torch.use_deterministic_algorithms(False)


def test_same_bits_in_python_threads(generator: torch.Generator) -> None:
    """Calls side by side, which share whatever the library keeps, do not see each other."""
    blocks = [replace(LARGE, channels=c, size=(1, 9, 14)).block(generator) for c in (5, 17, 18, 40)]
    once = [_ours(block) for block in blocks]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for expected, results in zip(once, pool.map(_ours, blocks), strict=True):
                assert all(torch.equal(results[name], t) for name, t in expected.items())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(norm: str, mode: str, layout: torch.memory_format, backend: str) -> None:
    """No graph break; results, gradients, buffers and strides as without."""
    torch._dynamo.reset()
    block = _block(norm=norm).train(mode == "train")
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
    block = _block(norm=norm)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((7, 8, 9), (6, 10, 12), (9, 11, 13)):  # unequal, or they are taken as one
            x = torch.randn(size[0], 17, *size[1:])
            torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("norm", NORMS)
def test_export(norm: str) -> None:
    block = _block(norm=norm, out_layers=2).eval()
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
        assert "vmap" in str(error)
        return
    torch.testing.assert_close(result, torch.stack([function(x) for x in xs]))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_tensor_momentum_and_counting(momentum: float | None) -> None:
    """Three steps: the moving average, or with momentum None the plain one."""
    block = _block(momentum=momentum)
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
    block = _block()
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
            "4 channels, but this D2 block was made for 5",
        ),
        ({"x": torch.zeros(5, 7, 9)}, ValueError, r"shape \(5, 7, 9\); accepted is \(N, C, H, W\)"),
        ({"x": torch.zeros(2, 5, 7, 9).int()}, TypeError, "dtype torch.int32; accepted are"),
        ({"x": torch.zeros(2, 5, 7, 9).double()}, TypeError, "must be equal"),
        ({"x": [1]}, TypeError, "type list; accepted is a torch.Tensor"),
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


# What only one fused node can do.


def _kept_bytes(block: Block) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once, but for the parameters."""
    parameters = {
        t.untyped_storage().data_ptr() for name, t in block.needed().items() if name != "x"
    }
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        # `out` stays alive meanwhile, so that no address is used twice.
        out = dk.d2_block(block.tensors["x"], block.params(), **block.options())
    assert out.requires_grad
    return sum(size for address, size in kept.items() if address not in parameters)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("out_layers", [1, 2, None])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kept_for_backward(
    norm: str, mode: str, out_layers: int | None, layout: str, generator: torch.Generator
) -> None:
    """x_0, the features and a few vectors per norm; no copy of a weight, nothing normalised."""
    case = Case("", 24, 16, 4, (2, 8, 12), norm=norm, mode=mode, layout=layout)
    block = replace(case, out_layers=out_layers).block(generator)
    itemsize, pixels = 4, 2 * 8 * 12
    maps = (case.channels + case.layers * case.growth) * pixels * itemsize
    vectors = 4 * sum(case.norm_widths) * 8  # mean, rstd, scale and shift, as doubles at most
    rounding_up = 64 * (case.layers * 4 + 2)  # each allocation to a cache line
    assert _kept_bytes(block) <= maps + vectors + rounding_up


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_one_node(norm: str, mode: str, generator: torch.Generator) -> None:
    """The parameters and x feed the node of the result itself."""
    block = Case("", norm=norm, mode=mode, out_layers=1).block(generator)
    out = dk.d2_block(block.tensors["x"], block.params(), **block.options())
    leaves = {edge.variable for edge, _ in _edges(out) if hasattr(edge, "variable")}
    assert leaves == set(block.needed().values())


def _edges(out: Tensor) -> list[Any]:
    """Where the node of `out` leads, past a view that selects the returned layers."""
    node = out.grad_fn
    while len(edges := [edge for edge in node.next_functions if edge[0] is not None]) == 1:
        node = edges[0][0]
    return edges
