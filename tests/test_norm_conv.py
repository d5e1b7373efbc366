"""norm_conv2d and NormConv2d: what they add to a D2 block of one layer (tests/block_grid.py)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import d3net_kernels as dk
from d3net_kernels import reference


def module_and_parts(
    relu: bool = True, parts: tuple[int, ...] = (9, 16, 5), kernel: int = 1
) -> tuple[dk.NormConv2d, list[Tensor]]:
    """A layer whose statistics and affine are all but trivial, and an input for it."""
    module = dk.NormConv2d(sum(parts), 12, kernel, relu=relu)
    nn.init.uniform_(module.norm.weight, 0.5, 1.5)
    nn.init.normal_(module.norm.bias)
    nn.init.normal_(module.norm.running_mean)
    nn.init.uniform_(module.norm.running_var, 0.5, 2)
    return module, [torch.randn(2, width, 7, 10, requires_grad=True) for width in parts]


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_without_relu_too(mode: str, relu: bool, kernel: int) -> None:
    """Outputs, gradients and running statistics are those of the modules that it stands for."""
    module, parts = module_and_parts(relu, kernel=kernel)
    module.train(mode == "train")
    grad_output = torch.randn(2, 12, 7, 10)

    def results(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        again = dk.NormConv2d(30, 12, kernel, relu=relu, dtype=dtype).train(mode == "train")
        again.load_state_dict(module.state_dict())
        leaves = [part.detach().to(dtype).requires_grad_() for part in parts]
        if ours:
            out = again(leaves)
        else:
            y = again.norm(torch.cat(leaves, 1))
            out = again.conv(y.relu() if relu else y)
        needed = [*leaves, *again.parameters()]
        grads = torch.autograd.grad(out, needed, grad_output.to(dtype))
        assert again.norm.running_mean is not None
        assert again.norm.running_var is not None
        return [out.detach(), *grads, again.norm.running_mean, again.norm.running_var]

    truth = results(torch.float64, False)
    plain = results(torch.float32, False)
    for ours, expected, other in zip(results(torch.float32, True), truth, plain, strict=True):
        assert ours.shape == expected.shape
        floor = 30 * kernel**2 * torch.finfo(torch.float32).eps * float(expected.abs().max())
        error = float((ours - expected).abs().max())
        assert error <= 2 * float((other - expected).abs().max()) + floor


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast", "medium"])
def test_sixteen_bits(how: str, mode: str, kernel: int) -> None:
    """As near to the truth as plain torch in the same type; pairs of channels end with a part."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(how, torch.float32)
    widths = (33, 20, 9)
    module = dk.NormConv2d(62, 40, kernel, dtype=dtype).train(mode == "train")
    given = [torch.randn(2, width, 9, 13).to(dtype) for width in widths]
    if dtype == torch.float32:  # autocast rounds them, which may decide about a ReLU
        given = [part.bfloat16().float() for part in given]
    grad_output = torch.randn(2, 40, 9, 13).to(dtype)

    def results(ours: bool, to: torch.dtype, half: bool) -> list[Tensor]:
        again = dk.NormConv2d(62, 40, kernel, dtype=to).train(mode == "train")
        again.load_state_dict(module.state_dict())
        leaves = [part.to(to).requires_grad_() for part in given]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = again(leaves) if ours else again.conv(again.norm(torch.cat(leaves, 1)).relu())
        grads = torch.autograd.grad(out, [*leaves, *again.parameters()], grad_output.to(out.dtype))
        return [out.detach(), *grads]

    autocast = how in ("autocast", "medium")  # plain torch has no medium of its own everywhere
    truth = results(False, torch.float64, False)
    plain = results(False, dtype, autocast)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if how == "medium" else before)
        found = results(True, dtype, how == "autocast")
    finally:
        torch.set_float32_matmul_precision(before)
    assert found[0].dtype == (torch.float32 if how == "medium" else plain[0].dtype)
    eps = torch.finfo(torch.float16 if how == "float16" else torch.bfloat16).eps
    for ours, expected, other in zip(found, truth, plain, strict=True):
        assert ours.dtype in (other.dtype, dtype)
        error = (ours - expected).norm()
        assert error <= 1.5 * (other - expected).norm() + eps * expected.norm()


def test_without_norm() -> None:
    module, parts = module_and_parts()
    conv = dk.ConvParams(module.conv.weight, module.conv.bias)
    expected = module.conv(torch.cat(parts, 1))
    for given in (parts, [p.contiguous(memory_format=torch.channels_last) for p in parts]):
        torch.testing.assert_close(dk.norm_conv2d(given, conv, None), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(dk.norm_conv2d(torch.cat(parts, 1), conv, None), expected)


def test_one_layer_of_a_block() -> None:
    module, parts = module_and_parts(kernel=3)
    module.eval()
    block = dk.D2Block(30, 12, 1).eval()
    block.norms[0].load_state_dict(module.norm.state_dict())
    block.convs[0].load_state_dict(module.conv.state_dict())
    assert torch.equal(module(parts), block(parts))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradcheck(mode: str) -> None:
    module = dk.NormConv2d(9, 8, dtype=torch.float64).train(mode == "train")
    parts = [torch.randn(2, width, 3, 4, dtype=torch.float64) for width in (4, 5)]
    leaves = [part.requires_grad_() for part in parts]
    names = [name for name, _ in module.named_parameters()]

    def call(first: Tensor, second: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(
            module, dict(zip(names, values, strict=True)), ([first, second],)
        )

    needed = (*leaves, *(p.detach().requires_grad_() for p in module.parameters()))
    torch.autograd.gradcheck(call, needed)
    torch.autograd.gradgradcheck(call, needed)


@pytest.mark.skipif(dk.why_not("cpu") is not None, reason=f"no cpu backend: {dk.why_not('cpu')}")
def test_keeps_nothing_normalised() -> None:
    module, parts = module_and_parts()
    given = {part.untyped_storage().data_ptr() for part in parts}
    given |= {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    kept = 0

    def keep(t: Tensor) -> Tensor:
        nonlocal kept
        if t.untyped_storage().data_ptr() not in given:
            kept += t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = module(parts)
    assert out.requires_grad
    assert kept <= 4 * 30 * 8 + 6 * 64  # a few vectors


def test_autocast_and_compile() -> None:
    module, parts = module_and_parts()
    module.eval()
    with torch.autocast("cpu", torch.bfloat16):
        half = module(parts)
    assert half.dtype == torch.bfloat16
    expected = module(parts)
    assert (half - expected).norm() <= 3 * torch.finfo(torch.bfloat16).eps * expected.norm()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(parts), expected)


class _Doubled(nn.Module):
    """A normalisation that is no nn.BatchNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_other_norms_are_called() -> None:
    module, parts = module_and_parts()
    module.norm = _Doubled()  # type: ignore[assignment]
    expected = module.conv(2 * torch.cat(parts, 1).relu())
    torch.testing.assert_close(module(parts), expected)


def test_kernels_beyond_the_node() -> None:
    """More taps than the node takes: plain torch serves."""
    module, parts = module_and_parts(kernel=9)
    with dk.use_backend("reference"):
        expected = module.eval()(parts)
    torch.testing.assert_close(module(parts), expected)


@pytest.mark.parametrize(
    ("weight", "norm", "words"),
    [((12, 30, 2, 2), 30, "a 2 x 2 kernel"), ((12, 30, 1, 1), 29, r"shape \(29,\)")],
)
def test_bad_parameters(weight: tuple[int, ...], norm: int, words: str) -> None:
    vectors = [torch.ones(norm) for _ in range(4)]
    conv = dk.ConvParams(torch.randn(weight), None)
    for backend in (None, "reference"):
        chosen = dk.use_backend(backend) if backend else nullcontext()
        with chosen, pytest.raises(ValueError, match=words):
            dk.norm_conv2d(torch.randn(2, 30, 5, 6), conv, dk.NormParams(*vectors, False, 0, 1e-5))


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        ([], ValueError, "x is an empty list"),
        ([torch.zeros(2, 30, 3)], ValueError, r"x\[0\] has shape"),
        ([torch.zeros(2, 29, 3, 4)], ValueError, "29 channels, but the weights"),
        ([torch.zeros(2, 9, 3, 4), torch.zeros(1, 21, 3, 4)], ValueError, "share N, H and W"),
        ([torch.zeros(2, 9, 3, 4), torch.zeros(2, 21, 3, 4).int()], TypeError, "torch.int32"),
        (torch.zeros(1, 30, 1, 1), ValueError, "more than one value per channel"),
        ("x", TypeError, "type str"),
    ],
    ids=str,
)
def test_bad_input(parts: Any, error: type[Exception], words: str) -> None:
    module, _ = module_and_parts()
    assert module.norm.running_mean is not None
    mean = module.norm.running_mean.clone()
    with pytest.raises(error, match=words):
        module(parts)
    assert torch.equal(module.norm.running_mean, mean)
    assert module.norm.num_batches_tracked == 0


def test_reference_form() -> None:
    module, parts = module_and_parts()
    module.eval()
    conv = dk.ConvParams(module.conv.weight, module.conv.bias)
    with dk.use_backend("reference"):
        plain = module(parts)
    affine, running = module.norm.parameters(), list(module.norm.buffers())[:2]
    norm = dk.NormParams(*affine, *running, False, 0, 1e-5)
    assert torch.equal(plain, reference.norm_conv2d(parts, conv, norm))


def test_forward_mode_is_refused() -> None:
    """A tangent is never lost in silence; plain torch has it."""
    module, parts = module_and_parts()
    module.eval().requires_grad_(False)
    x = torch.cat(parts, 1).detach()
    block, conv = dk.D2Block(30, 8, 2).eval(), dk.MultidilatedConv2d([30], 8)

    for function in (module, block, lambda x: conv([x])):
        if dk.why_not("cpu") is None:
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                torch.func.jvp(function, (x,), (torch.ones_like(x),))
        with dk.use_backend("reference"):
            _, tangent = torch.func.jvp(function, (x,), (torch.ones_like(x),))
        assert tangent.abs().max() > 0
