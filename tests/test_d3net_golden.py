"""Blocks and whole networks against the numbers of the official release."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from golden_params import Golden
from torch import Tensor, nn

import d3net
import d3net_kernels as dk
from d3net import official_names as names
from d3net.blocks import (
    ConcatD3Block,
    Parts,
    ReducedD2Block,
    SumD3Block,
    Transition,
    Upsample,
)
from d3net.separation import BandConfig, BandUNet
from d3net_kernels.reference import concatenated

pytestmark = pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")

Named = dict[str, names.Official]


class Tolerance(NamedTuple):
    """Largest error over the largest value: of outputs and statistics, and of gradients."""

    value: float
    grad: float


NOISE = 1e-5  # of the largest gradient: what is smaller is zero but for rounding
CORE = Tolerance(2e-6, 5e-6)
AUDIO = Tolerance(5e-6, 5e-5)
IMAGE = Tolerance(1e-5, 1e-4)


class Stage(nn.Module):
    """A D3 block of the segmentation network and the transition behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.d3 = ConcatD3Block(20, 3, 6, 4, compression=0.2)
        self.transition = Transition(self.d3.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.transition(self.d3(x))

    def scopes(self) -> names.Scopes:
        for m, block in enumerate(self.d3.blocks):
            yield from names.reduced_d2_scopes(block, f"dense1/d2_block/block{m}")
        yield "transition1/bn", self.transition.reduce.norm
        yield "transition1/conv", self.transition.reduce.conv


def _stage() -> tuple[nn.Module, Named]:
    stage = Stage()
    return stage, names.arrays_of(stage.scopes())


def _d2(in_channels: int, layers: int, growth: int) -> tuple[nn.Module, Named]:
    block = dk.D2Block(in_channels, growth, layers, out_layers=1)
    return block, names.arrays_of(names.d2_scopes(block, "d2", "initial_layer", "bottleneck"))


def _reduced(in_channels: int) -> tuple[nn.Module, Named]:
    block = ReducedD2Block(in_channels, 6, 4, compression=0.2)
    return block, {
        name.removeprefix("block/"): official
        for name, official in names.arrays_of(names.reduced_d2_scopes(block, "block")).items()
    }


def _sum(growth: int, layers: int, blocks: int) -> tuple[nn.Module, Named]:
    block = SumD3Block(6, growth, layers, blocks)
    return block, {
        name.removeprefix("d3/"): official
        for name, official in names.arrays_of(names.sum_d3_scopes(block, "d3")).items()
    }


def _upsample() -> tuple[nn.Module, Named]:
    up = Upsample(6)
    pairs = (("upsample/norm", up.norm), ("upsample/transconv", up.conv))
    return up, names.arrays_of(iter(pairs))


def _u_net() -> tuple[nn.Module, Named]:
    net = BandUNet(4, BandConfig(4, (3, 4, 5, 4, 3), (2, 3, 3, 3, 2)))
    return net, names.arrays_of(names.u_net_scopes(net, "dense_band/0"))


def _tiny() -> tuple[nn.Module, Named]:
    net = d3net.create_model(
        "d3net_s_fcn",
        growth_rate=6,
        num_blocks=3,
        stem_channels=8,
        feature_channels=(4, 5, 6, 7),
        num_classes=5,
    )
    return net, names.official_parameters(net)


SMALL: dict[str, tuple[Callable[[], tuple[nn.Module, Named]], Tolerance]] = {
    "d2_audio": (lambda: _d2(7, 4, 3), CORE),
    "d3_audio_M1": (lambda: _sum(2, 1, 1), AUDIO),
    "d3_audio_M2": (lambda: _sum(5, 4, 2), AUDIO),
    "upsample_audio": (_upsample, AUDIO),
    "md3_tiny": (_u_net, AUDIO),
    "d2_seg_nobottleneck": (lambda: _reduced(20), IMAGE),
    "d2_seg_bottleneck": (lambda: _reduced(40), IMAGE),
    "d3_seg": (_stage, IMAGE),
    "seg_tiny": (_tiny, IMAGE),
}


@pytest.fixture(params=["default", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with nullcontext() if request.param == "default" else dk.use_backend(request.param):
        yield


def _error(result: Tensor, golden: Tensor) -> float:
    """Largest error over the largest value."""
    golden = golden.reshape(result.shape)
    return float((result - golden).abs().max() / golden.abs().max())


def _l2_error(result: Tensor, golden: Tensor) -> float:
    return float((result - golden.reshape(result.shape)).norm() / golden.norm())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("file", SMALL)
def test_small(file: str, mode: str) -> None:
    """Outputs, gradients of everything and running statistics."""
    golden = Golden(file)
    make, tolerance = SMALL[file]
    model, named = make()
    golden.fill(named)
    model.train(mode == "train")
    x = golden["in/x"].requires_grad_()
    in_float64 = copy.deepcopy(model).double()
    out, expected = model(x), golden[f"out/{mode}"]
    if file == "seg_tiny" and mode == "eval":
        out = out.softmax(1)  # as the official network does in evaluation
    result = out.detach()
    if file == "seg_tiny" and mode == "train":
        # Batch statistics of 12 values amplify rounding: the official logits are 8e-6 away from
        # float64. So float64 is held to them, and float32 to float64, as near as they are.
        truth = in_float64(x.double()).detach()
        assert _error(result, truth) <= _error(expected, truth)
        result = truth
    assert _error(result, expected) <= tolerance.value
    (out * golden.loss_weights(out)).sum().backward()
    assert _error(x.grad, golden[f"grad_{mode}/x"]) <= tolerance.grad
    grads = {name: golden[f"grad_{mode}/{name}"] for name, o in named.items() if o.need_grad}
    largest = max(float(grad.abs().max()) for grad in grads.values())
    for name, official in named.items():
        if official.need_grad:
            expected = grads[name]
            scale = float(expected.abs().max())
            if scale < NOISE * largest:  # a bias in front of batch statistics has no gradient
                scale = largest
            difference = (official.tensor.grad - expected.view_as(official.tensor)).abs().max()
            assert float(difference) <= tolerance.grad * scale, name
        elif mode == "train":
            expected = golden[f"stat_after_train/{name}"]
            assert _error(official.tensor, expected) <= tolerance.value, name
    if "mid/dense" in golden and mode == "eval":
        assert (
            _error(concatenated(model.d3(x.detach())).detach(), golden["mid/dense"])
            <= tolerance.value
        )


class Watch:
    """What modules returned in the last forward pass."""

    def __init__(self, **modules: nn.Module) -> None:
        self.outputs: dict[str, Parts] = {}
        for name, module in modules.items():
            module.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Parts) -> None:
            self.outputs[name] = output

        return hook


# Around a hundred ReLU and normalisation layers amplify float32 noise in the gradients.
GRAD_L2 = {"eval": 2e-2, "train": 1e-1}


def _check_gradients(golden: Golden, mode: str, key: str, x: Tensor, named: Named) -> None:
    """Some gradients in full, and the norms of all of them."""
    for name in golden.keys(f"{key}/"):
        grad = x.grad if name == "x" else named[name].tensor.grad
        assert _l2_error(grad, golden[f"{key}/{name}"]) <= GRAD_L2[mode], name
    norms = torch.stack([o.tensor.grad.norm() for o in named.values() if o.need_grad])
    assert _l2_error(norms, golden[f"{key}/_norms"]) <= GRAD_L2[mode]


def _check_statistics(golden: Golden, named: Named, tolerance: float) -> None:
    for name in golden.keys("stat_after_train/"):
        expected = golden[f"stat_after_train/{name}"]
        assert _error(named[name].tensor, expected) <= tolerance, name


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_d3net_s(mode: str) -> None:
    golden = Golden("seg_S_64x128")
    net = d3net.create_model("d3net_s_fcn").train(mode == "train")
    named = names.official_parameters(net)
    golden.fill(named)
    watch = Watch(coarsest=net.backbone.stages[3], low=net.head)
    x = golden["in/x"].requires_grad_()
    logits = net(x)
    assert logits.shape == (2, 19, 64, 128)
    low = concatenated(watch.outputs["low"])
    if mode == "train":
        kept = golden.thinned("out/train_logits", logits.detach())
        assert _error(kept, golden["out/train_logits"]) <= 5e-4
        _check_statistics(golden, named, 5e-4)
        (logits * golden.loss_weights(logits)).sum().backward()
        _check_gradients(golden, mode, "grad_train", x, named)
        return
    coarsest = golden["mid/d3block/backbone/final_out4/0"]
    assert _error(concatenated(watch.outputs["coarsest"]).detach(), coarsest) <= 1e-4
    assert _error(low.detach(), golden["mid/logits_lowres"]) <= 1e-4
    kept = golden.thinned("out/eval_softmax", logits.detach().softmax(1))
    assert _error(kept, golden["out/eval_softmax"]) <= 1e-3
    (low * golden.loss_weights(low, "/low")).sum().backward()
    _check_gradients(golden, mode, "grad_eval_low", x, named)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("target", ["vocals", "other"])
def test_vocals(target: str, mode: str) -> None:
    """`other` has the architecture of `vocals`."""
    golden = Golden("audio_vocals")
    net = d3net.create_model(f"d3net_{target}").train(mode == "train")
    named = names.official_parameters(net)
    golden.fill(named, renamed=(f"{target}/", "vocals/"))
    named = {name.replace(f"{target}/", "vocals/", 1): o for name, o in named.items()}
    watch = Watch(low=net.low, high=net.high, full=net.full, final=net.final)
    x = golden["in/x"].requires_grad_()  # frames before channels
    out = net(x.transpose(1, 2)).transpose(1, 2)
    tolerance = {"eval": 1e-4, "train": 5e-4}[mode]
    assert _error(out.detach(), golden[f"out/{mode}"]) <= tolerance
    if mode == "train":
        _check_statistics(golden, named, tolerance)
    else:
        for key, name in (
            ("mid/vocals/dense_band/0/scale_out3", "low"),
            ("mid/vocals/dense_band/1/scale_out2", "high"),
            ("mid/vocals/dense_full/scale_out4", "full"),
            ("mid/final_d2", "final"),
        ):
            kept = golden.thinned(key, concatenated(watch.outputs[name]).detach())
            assert _error(kept, golden[key]) <= tolerance, name
    (out * golden.loss_weights(out)).sum().backward()
    _check_gradients(golden, mode, f"grad_{mode}", x, named)
