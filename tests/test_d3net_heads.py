"""Decode heads and folded norms against their definitions, in float64 and in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3net.blocks import ConvNorm, Transition
from d3net.heads import FCNHead, MixedScales
from d3net.segmentation import Stem

pytestmark = pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")

WIDTHS, SIZES = (9, 5, 12, 7), ((13, 18), (6, 9), (3, 4), (1, 2))


def _joined(features: list[Tensor]) -> Tensor:
    size = features[0].shape[2:]
    resized = [F.interpolate(f, size, mode="bilinear", align_corners=False) for f in features[1:]]
    return torch.cat([features[0], *resized], 1)


def _mixed(mix: ConvNorm, features: list[Tensor]) -> Tensor:
    return mix.norm(mix.conv(_joined(features))).relu()


def _head(head: FCNHead, features: list[Tensor]) -> Tensor:
    out: Tensor = head.classify(_mixed(head.mix, features))
    return out


def _conv_norm(module: ConvNorm, parts: list[Tensor]) -> Tensor:
    out: Tensor = module.norm(module.conv(torch.cat(parts, 1))).relu()
    return out


def _stem(stem: Stem, images: list[Tensor]) -> Tensor:
    out: Tensor = stem.conv2(stem.norm(stem.conv1(images[0])).relu())
    return out


def _transition(transition: Transition, parts: list[Tensor]) -> Tensor:
    reduce = transition.reduce
    return F.avg_pool2d(reduce.conv(reduce.norm(torch.cat(parts, 1)).relu()), 2)


def _scales() -> list[Tensor]:
    return [torch.randn(2, c, *size) for c, size in zip(WIDTHS, SIZES, strict=True)]


def _parts(*layouts: torch.memory_format) -> list[Tensor]:
    widths = (9, 16, 5)[: len(layouts)]
    return [
        torch.randn(2, c, 7, 10).contiguous(memory_format=layout)
        for c, layout in zip(widths, layouts, strict=True)
    ]


NCHW, LAST = torch.contiguous_format, torch.channels_last
Definition = Callable[..., Tensor]
# What is called, how it is defined, and its input.
CASES: dict[str, tuple[Callable[[], nn.Module], Definition, Callable[[], list[Tensor]]]] = {
    "fcn": (lambda: FCNHead(WIDTHS, 8), _head, _scales),
    "mixed scales": (lambda: MixedScales(sum(WIDTHS), 11, bias=True), _mixed, _scales),
    "conv and norm": (lambda: ConvNorm(30, 11), _conv_norm, lambda: _parts(NCHW, NCHW, NCHW)),
    "with a bias": (lambda: ConvNorm(30, 11, bias=True), _conv_norm, lambda: _parts(*[LAST] * 3)),
    "mixed layouts": (lambda: ConvNorm(30, 11), _conv_norm, lambda: _parts(NCHW, LAST, LAST)),
    "3x3": (lambda: ConvNorm(30, 11, 3, bias=True), _conv_norm, lambda: _parts(NCHW, LAST, LAST)),
    "stem": (lambda: Stem(3, 8), _stem, lambda: [torch.randn(2, 3, 13, 18)]),
    "transition": (lambda: Transition(30), _transition, lambda: _parts(NCHW, LAST, LAST)),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_as_defined(name: str, mode: str) -> None:
    """Outputs, gradients of inputs and parameters, and running statistics.

    Exact but for rounding in float64, and in float32 as near to float64 as the definition is.
    """
    make, definition, inputs = CASES[name]
    state = make().state_dict()
    for key, t in state.items():
        if key.endswith(("running_var", "norm.weight")):
            nn.init.uniform_(t, 0.5, 1.5)
        elif t.is_floating_point():
            nn.init.normal_(t, std=t[0].numel() ** -0.5 if t.dim() == 4 else 1)
    given, grad_output = inputs(), None

    def results(
        dtype: torch.dtype, call: Callable[[nn.Module, list[Tensor]], Tensor]
    ) -> list[Tensor]:
        nonlocal grad_output
        module = make().to(dtype).train(mode == "train")
        module.load_state_dict(state)
        leaves = [t.to(dtype).requires_grad_() for t in given]
        out = call(module, leaves)
        if grad_output is None:
            grad_output = torch.randn_like(out)
        grads = torch.autograd.grad(out, [*leaves, *module.parameters()], grad_output.to(dtype))
        buffers = [t for t in module.buffers() if t.is_floating_point()]
        return [out.detach(), *grads, *buffers]

    def ours(module: nn.Module, leaves: list[Tensor]) -> Tensor:
        out: Tensor = module(leaves[0] if name == "stem" else leaves)
        return out

    truth = results(torch.float64, definition)
    largest = max(float(t.abs().max()) for t in truth)
    for exact, expected in zip(results(torch.float64, ours), truth, strict=True):
        torch.testing.assert_close(exact, expected, rtol=1e-10, atol=1e-12 * largest)
    plain, got = results(torch.float32, definition), results(torch.float32, ours)
    for single, expected, other in zip(got, truth, plain, strict=True):
        floor = 64 * torch.finfo(torch.float32).eps * largest
        error = float((single - expected).abs().max())
        assert error <= 2 * float((other - expected).abs().max()) + floor


def test_a_head_keeps_no_joined_map() -> None:
    """Of the finest scale a training step keeps one map, the sum before its normalisation."""
    head, features = FCNHead(WIDTHS, 8), [f.requires_grad_() for f in _scales()]
    known = {t.untyped_storage().data_ptr() for t in (*features, *head.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = head(features)
    assert out.requires_grad
    pixels = 2 * SIZES[0][0] * SIZES[0][1]
    assert sum(kept.values()) <= 4 * sum(WIDTHS) * pixels + 2048


def test_other_norms_are_not_folded() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    module, x = ConvNorm(5, 4).eval(), torch.randn(2, 5, 6, 7)
    module.norm = Doubled()  # type: ignore[assignment]
    torch.testing.assert_close(module(x), 2 * module.conv(x).relu())


def test_without_running_statistics() -> None:
    """Such a norm takes those of the batch in evaluation too, as torch has it."""
    module, x = ConvNorm(5, 4).eval(), torch.randn(2, 5, 6, 7)
    module.norm = nn.BatchNorm2d(4, track_running_stats=False).eval()
    torch.testing.assert_close(module(x), module.norm(module.conv(x)).relu())


class _Twice(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _replace_norm(stem: Stem, norm: nn.BatchNorm2d) -> None:
    norm.train(stem.training)
    stem.norm = norm


def _hook(stem: Stem) -> None:
    stem.conv1.register_forward_pre_hook(lambda conv, _: conv.weight.data.mul_(1.5))


@pytest.mark.parametrize(
    "change",
    [
        lambda stem: _replace_norm(stem, _Twice(64)),
        lambda stem: _replace_norm(stem, nn.BatchNorm2d(64, affine=False)),
        lambda stem: _replace_norm(stem, nn.BatchNorm2d(64, track_running_stats=False)),
        _hook,
    ],
    ids=["subclass", "no affine", "no running statistics", "hook"],
)
def test_what_is_not_folded(change: Callable[[Stem], None]) -> None:
    stem = Stem(3, 64).eval()
    change(stem)
    x = torch.randn(1, 3, 16, 20)
    again = copy.deepcopy(stem)
    torch.testing.assert_close(stem(x), _stem(again, [x]))


def test_float32_norms_beside_bfloat16() -> None:
    """As autocast and some trainers keep them: folded in float32, rounded once."""
    stem = Stem(3, 64).eval()
    nn.init.uniform_(stem.norm.running_var, 0.5, 2)
    nn.init.normal_(stem.norm.running_mean)
    x = torch.randn(1, 3, 16, 20)
    expected = stem(x)
    half = copy.deepcopy(stem).bfloat16()
    half.norm.float()
    error = (half(x.bfloat16()) - expected).norm()
    assert error <= 2 * torch.finfo(torch.bfloat16).eps * expected.norm()
