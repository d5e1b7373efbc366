"""The modules against literal torch compositions and against the official release's numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import d3net_kernels as dk

pytestmark = pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")

GOLDEN = Path(__file__).parent / "golden"
NORMS = ("per_source", "per_layer")


class LiteralD2Block(nn.Module):
    """The paper's eq. 2 word by word: normalise, ReLU, convolve every source, add up.

    Holds the very norms and convs of a D2Block, and calls them.
    """

    def __init__(self, block: dk.D2Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return (self._per_source if self.block.norm == "per_source" else self._per_layer)(x)

    def _per_source(self, x: Tensor) -> Tensor:
        """Source-wise: one convolution per source makes the slots of all its layers."""
        b = self.block
        sums: list[Tensor | int] = [0] * b.num_layers
        outputs: list[Tensor] = []
        for i, (norm, conv) in enumerate(zip(b.norms, b.convs, strict=True)):
            slots = conv(norm(outputs[i - 1] if i else x).relu()).split(b.growth_rate, 1)
            for layer, slot in enumerate(slots, start=i):
                sums[layer] = sums[layer] + slot
            outputs.append(sums[i])
        return torch.cat(outputs[-b.out_layers :], 1)

    def _per_layer(self, x: Tensor) -> Tensor:
        """Layer by layer: the whole concatenation is normalised again by each."""
        b = self.block
        sources = [x]
        for layer, norm in enumerate(b.norms):
            widths = [source.shape[1] for source in sources]
            out: Tensor | int = 0
            for i, y in enumerate(norm(torch.cat(sources, 1)).relu().split(widths, 1)):
                slot = slice((layer - i) * b.growth_rate, (layer - i + 1) * b.growth_rate)
                conv = b.convs[i]
                bias = None if conv.bias is None else conv.bias[slot]
                out = out + nn.functional.conv2d(
                    y, conv.weight[slot], bias, padding=2**i, dilation=2**i
                )
            sources.append(out)
        return torch.cat(sources[-b.out_layers :], 1)


def _block_and_literal(**options: object) -> tuple[dk.D2Block, LiteralD2Block]:
    """The same random block twice, in float64; no statistic and no affine is trivial."""
    block = dk.D2Block(5, 3, 4, **options).double()
    for norm in block.norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        if norm.running_mean is not None:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return block, LiteralD2Block(copy.deepcopy(block))


def _assert_same_step(block: nn.Module, literal: nn.Module, x: Tensor) -> None:
    """Same output, same gradients of input and parameters, same buffers afterwards."""
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    out, expected = block(inputs[0]), literal(inputs[1])
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for p, q in zip(block.parameters(), literal.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)
    for b, c in zip(block.buffers(), literal.buffers(), strict=True):
        torch.testing.assert_close(b, c)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("out_layers", [1, 2, None])
@pytest.mark.parametrize("bias", [True, False])
def test_block_is_the_literal_one(
    norm: str, training: bool, out_layers: int | None, bias: bool
) -> None:
    block, literal = _block_and_literal(norm=norm, out_layers=out_layers, bias=bias)
    x = torch.randn(2, 5, 7, 9, dtype=torch.float64)
    _assert_same_step(block.train(training), literal.train(training), x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_over_steps(norm: str, momentum: float | None) -> None:
    block, literal = _block_and_literal(norm=norm, momentum=momentum)
    for _ in range(3):
        x = 3 * torch.randn(2, 5, 4, 6, dtype=torch.float64) + 1
        torch.testing.assert_close(block(x), literal(x))
    for b, c in zip(block.buffers(), literal.buffers(), strict=True):
        torch.testing.assert_close(b, c)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("frozen", [(0,), (1, 3), (0, 1, 2, 3)])
def test_frozen_norms(norm: str, frozen: tuple[int, ...]) -> None:
    """Norms in eval mode and without gradients inside a block that trains."""
    block, literal = _block_and_literal(norm=norm)
    for norms in (block.norms, literal.block.norms):
        for i in frozen:
            norms[i].eval().requires_grad_(False)
    _assert_same_step(block, literal, torch.randn(2, 5, 6, 7, dtype=torch.float64))


@pytest.mark.parametrize("norm", NORMS)
def test_without_running_statistics(norm: str) -> None:
    block, literal = _block_and_literal(norm=norm)
    for norms in (block.norms, literal.block.norms):
        for n in norms:
            n.track_running_stats = False
            n.running_mean = n.running_var = n.num_batches_tracked = None
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    _assert_same_step(block.eval(), literal.eval(), x)


def test_parts_without_gradients() -> None:
    block, literal = _block_and_literal()
    for b in (block, literal.block):
        b.convs[1].requires_grad_(False)
        b.norms[2].weight.requires_grad_(False)
    _assert_same_step(block, literal, torch.randn(2, 5, 6, 7, dtype=torch.float64))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    block, literal = _block_and_literal()
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    grads = []
    for module in (block, literal):
        x.grad = None
        checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_double_backward() -> None:
    block = dk.D2Block(2, 2, 2).double()
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(block, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_block_trains(dtype: torch.dtype) -> None:
    block = dk.D2Block(4, 3, 3, dtype=dtype)
    x = torch.randn(2, 4, 6, 7, dtype=dtype, requires_grad=True)
    out = block(x)
    out.float().square().mean().backward()
    assert out.dtype == x.grad.dtype == block.norms[0].weight.grad.dtype == dtype
    assert all(p.grad.isfinite().all() for p in block.parameters())


def test_only_features_are_kept() -> None:
    """For backward a training block keeps its raw sources once: nothing else of their size."""
    block = dk.D2Block(16, 16, 4, out_layers=1)  # features are kept in multiples of 16 channels
    x = torch.randn(2, 16, 32, 32, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block(x)
    feature = x.numel() * x.element_size()
    assert sum(size for size in kept.values() if size >= feature) == 4 * feature


def test_empty_batch_leaves_running_statistics_alone() -> None:
    block = dk.D2Block(2, 2, 2)
    before = [norm.running_var.clone() for norm in block.norms]
    assert block(torch.randn(0, 2, 4, 5)).shape == (0, 4, 4, 5)
    assert all(torch.equal(n.running_var, b) for n, b in zip(block.norms, before, strict=True))


def test_synchronised_norms_are_refused() -> None:
    block = nn.SyncBatchNorm.convert_sync_batchnorm(dk.D2Block(2, 2, 2))
    with pytest.raises(TypeError, match="SyncBatchNorm"):
        block(torch.randn(2, 2, 4, 5))


def test_state_dict_does_not_depend_on_the_backend() -> None:
    block = dk.D2Block(4, 3, 2)
    with dk.use_backend("reference"):
        other = dk.D2Block(4, 3, 2)
        other.load_state_dict(block.state_dict(), strict=True)
        x = torch.randn(2, 4, 6, 7)
        expected = other(x)
    assert list(other.state_dict()) == list(block.state_dict())
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("concatenated", [True, False])
def test_multidilated_conv2d(concatenated: bool) -> None:
    layer = dk.MultidilatedConv2d([2, 3], 4, (3, 5), dilations=[(1, 2), 3])
    sources = [torch.randn(2, 2, 6, 7), torch.randn(2, 3, 6, 7)]
    out = layer(torch.cat(sources, 1) if concatenated else sources)
    expected = dk.reference.multidilated_conv2d(
        sources, layer.weight, layer.bias, dilations=[(1, 2), (3, 3)]
    )
    torch.testing.assert_close(out, expected)
    assert dk.MultidilatedConv2d([2], 4, bias=False).bias is None
    assert "dilations=[(1, 2), (3, 3)]" in repr(layer)


def _close(result: Tensor, golden: np.ndarray, tolerance: float) -> None:
    expected = torch.from_numpy(golden).reshape(result.shape)
    error = (result - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{error:.1e} of the largest, {tolerance:.0e} is allowed"


def _official(block: dk.D2Block) -> dict[str, Tensor]:
    """Parameters and buffers of `block` by the official names."""
    named = {}
    for i, (norm, conv) in enumerate(zip(block.norms, block.convs, strict=True)):
        scope = "d2/initial_layer" if i == 0 else f"d2/layers/layer{i}"
        named |= {
            f"{scope}/bottleneck/norm1/bn/gamma": norm.weight,
            f"{scope}/bottleneck/norm1/bn/beta": norm.bias,
            f"{scope}/bottleneck/norm1/bn/mean": norm.running_mean,
            f"{scope}/bottleneck/norm1/bn/var": norm.running_var,
            f"{scope}/bottleneck/conv1/conv/W": conv.weight,
            f"{scope}/bottleneck/conv1/conv/b": conv.bias,
        }
    return named


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("file", ["d2_audio_all_layers", "d2_L1"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_official_numbers(mode: str, file: str, backend: str | None) -> None:
    """Output, gradients and running statistics of the official D2 block."""
    golden = np.load(GOLDEN / f"{file}.npz", allow_pickle=False)
    x = torch.from_numpy(golden["in/x"]).requires_grad_()
    layers = sum("conv/W" in name for name in golden.files if name.startswith("param/"))
    growth = golden["out/eval"].shape[1] // layers
    block = dk.D2Block(x.shape[1], growth, layers).train(mode == "train")
    with torch.no_grad():
        for name, t in _official(block).items():
            t.copy_(torch.from_numpy(golden[f"param/{name}"]).reshape(t.shape))
    if backend is None:
        out = block(x)
    else:
        with dk.use_backend(backend):
            out = block(x)
    _close(out.detach(), golden[f"out/{mode}"], 2e-6)
    (out * torch.from_numpy(golden["in/R"])).sum().backward()
    _close(x.grad, golden[f"grad_{mode}/x"], 5e-6)
    for name, t in _official(block).items():
        if t.requires_grad:
            _close(t.grad, golden[f"grad_{mode}/{name}"], 5e-6)
        elif mode == "train":
            _close(t, golden[f"stat_after_train/{name}"], 2e-6)


@pytest.mark.parametrize("norm", ["per_source", "per_layer"])
def test_meta_tensors_have_shapes_only(norm: str) -> None:
    block = dk.D2Block(5, 4, 3, norm=norm, out_layers=2, device="meta")
    assert block(torch.empty(2, 5, 7, 9, device="meta")).shape == (2, 8, 7, 9)
    conv = dk.MultidilatedConv2d([3, 2], 4, device="meta")
    out = conv([torch.empty(1, c, 6, 5, device="meta") for c in (3, 2)])
    assert out.shape == (1, 4, 6, 5)


def _stride(conv: nn.Conv2d) -> None:
    conv.stride = (2, 2)


def _dilation(conv: nn.Conv2d) -> None:
    conv.dilation = conv.padding = (3, 3)


def _padding_mode(conv: nn.Conv2d) -> None:
    conv.padding_mode = "reflect"


@pytest.mark.parametrize("change", [_stride, _dilation, _padding_mode])
@pytest.mark.parametrize("train", [True, False])
def test_convolutions_that_became_others_are_refused(
    change: Callable[[nn.Conv2d], None], train: bool
) -> None:
    """They are never called, so that what they became would not be seen."""
    x = torch.randn(2, 6, 7, 8)
    for module in (dk.D2Block(6, 4, 3), dk.NormConv2d(6, 4, 3)):
        module.train(train)
        with torch.set_grad_enabled(train):
            module(x), module(x)
            change(module.conv if isinstance(module, dk.NormConv2d) else module.convs[1])
            before = copy.deepcopy(module.state_dict())
            with pytest.raises(ValueError, match="a convolution of this module became Conv2d"):
                module(x)
        assert all(map(torch.equal, before.values(), module.state_dict().values()))


BAD_PARAMETERS: dict[str, tuple[str, Tensor | None, type[Exception], str]] = {
    "outputs": (
        "convs.0.weight",
        torch.randn(3, 6, 3, 3),
        ValueError,
        r"convs\[0\].weight has shape \(3, 6, 3, 3\); accepted is \(12, 6, 3, 3\)",
    ),
    "kernel": ("convs.1.weight", torch.randn(8, 4, 1, 1), ValueError, r"is \(8, 4, 3, 3\)"),
    "bias": ("convs.1.bias", torch.randn(3), ValueError, r"convs\[1\].bias has shape \(3,\)"),
    "dtype": (
        "convs.1.weight",
        torch.randn(8, 4, 3, 3, dtype=torch.float64),
        TypeError,
        r"convs\[1\].weight has dtype torch.float64 and params.convs\[0\].weight torch.float32",
    ),
    "norm": ("norms.1.weight", torch.randn(5), ValueError, r"norms\[1\].weight has shape \(5,\)"),
    "mean": ("norms.1.running_mean", torch.randn(3), ValueError, r"norms\[1\].running_mean has"),
    "no first weight": ("convs.0.weight", None, TypeError, "the weight for x is NoneType"),
    "no weight": ("convs.1.weight", None, TypeError, r"convs\[1\].weight is of type NoneType"),
    "no last one": ("convs.2.weight", None, TypeError, r"convs\[-1\].weight is of type NoneType"),
    "no norm": ("norms.1.weight", None, TypeError, r"norms\[1\].weight is of type NoneType"),
}


@pytest.mark.parametrize("what", BAD_PARAMETERS)
@pytest.mark.parametrize("train", [True, False])
def test_parameters_that_do_not_fit_are_named(what: str, train: bool) -> None:
    name, value, error, words = BAD_PARAMETERS[what]
    block = dk.D2Block(6, 4, 3).train(train)
    x = torch.randn(2, 6, 7, 8)
    for calls in range(2):
        if calls:
            with torch.no_grad():
                block(x), block(x)
        owner = block.get_submodule(name.rpartition(".")[0])
        own = name.rpartition(".")[2]
        if value is not None and own not in owner._buffers:
            setattr(owner, own, nn.Parameter(value))
        else:
            setattr(owner, own, value)
        with torch.set_grad_enabled(train), pytest.raises(error, match=words):
            block(x)
        block = dk.D2Block(6, 4, 3).train(train)


@pytest.mark.skipif(dk.why_not("cpu") is not None, reason=f"no cpu backend: {dk.why_not('cpu')}")
@pytest.mark.parametrize("name", ["convs.1.weight", "convs.0.bias", "norms.0.weight"])
def test_freed_parameters_are_refused(name: str) -> None:
    """As those of torch's own modules are, whose operators read no memory that is not there."""
    block, x = dk.D2Block(6, 4, 3).eval(), torch.randn(1, 6, 7, 8)
    with torch.no_grad():
        for _ in range(3):
            block(x)
        block.get_parameter(name).untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="its storage was freed"):
            block(x)
