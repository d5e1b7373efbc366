"""The networks among torch's tools: memory layouts, autocast, checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeAlias

import pytest
import torch
from test_d3net_models import TINY, TINY_AUDIO
from torch import Tensor, nn

import d3net
import d3net_kernels as dk

pytestmark = pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")

FLOAT64 = 1e-9  # relative error of a training step in float64, which amplifies rounding
NAMES = ("d3net_s", "d3net_s_fcn", "d3net_l_ocr", "d3net_vocals")


def _net(name: str, **options: object) -> nn.Module:
    audio = name == "d3net_vocals"
    return randomised(d3net.create_model(name, **(TINY_AUDIO if audio else TINY), **options))


def randomised(net: nn.Module) -> nn.Module:
    """With parameters on all of which the result depends, as after some training."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.2)
    return net


def _input(name: str) -> Tensor:
    return torch.rand((2, 2, 16, 30) if name == "d3net_vocals" else (2, 3, 64, 96))


def flat(outputs: Tensor | list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in ([outputs] if isinstance(outputs, Tensor) else outputs)])


Results: TypeAlias = tuple[Tensor | list[Tensor], ...]


def _output(net: nn.Module, x: Tensor) -> Results:
    return (flat(net(x)).detach(),)


def step(net: nn.Module, x: Tensor) -> Results:
    """Outputs, then the input's and all parameters' gradients, of a loss with fixed weights."""
    x = x.clone().requires_grad_()
    out = flat(net(x))
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype)).sum().backward()
    grads = [p.grad for p in (x, *net.parameters()) if p.grad is not None]
    return out.detach(), grads


def _error_ratios(
    name: str,
    training: bool,
    compute: Callable[[nn.Module, Tensor], Results],
    *,
    draws: int,
    autocast: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Error of each result over that of plain torch, set up alike, both against float64.

    The error is relative, in L2; plain torch's counts for at least one rounding of float32. The
    geometric mean over `draws` networks and inputs: training amplifies rounding, with batch
    statistics over a dozen values one after another, so that of two equally exact runs one may err
    twice as much as the other. The logarithm of a single ratio scatters around 0 by up to 0.3.
    """
    logarithms = []
    for _ in range(draws):
        net, x = _net(name).train(training), _input(name)
        truth = compute(copy.deepcopy(net).double(), x.double())
        net.to(memory_format=memory_format)
        x = x.contiguous(memory_format=memory_format)
        relative = []
        for backend in (nullcontext(), dk.use_backend("reference")):
            with backend, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                results = compute(copy.deepcopy(net), x)
            relative.append(errors(results, truth))
        ours, plain = relative
        logarithms.append((ours / (plain + torch.finfo(torch.float32).eps)).log())
    return torch.stack(logarithms).mean(0).exp()


def errors(results: Results, expected: Results) -> Tensor:
    """Relative, in L2, one for each result."""
    pairs = [(flat(a).double(), flat(b)) for a, b in zip(results, expected, strict=True)]
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs])


NO_WORSE = 1.5  # more than five deviations away from what equally exact runs give in RUNS
RUNS = [
    *((name, False, 4) for name in NAMES),  # evaluation amplifies less
    *((name, True, 8) for name in NAMES if name != "d3net_l_ocr"),
    pytest.param("d3net_l_ocr", True, 24, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "training", "draws"), RUNS)
def test_channels_last(name: str, training: bool, draws: int) -> None:
    """As exact as plain torch in this layout, whose own normalisation rounds more than in NCHW."""
    layout = torch.channels_last
    ratios = _error_ratios(name, training, _output, draws=draws, memory_format=layout)
    assert ratios.max() <= NO_WORSE


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_channels_last_gradients(name: str, training: bool) -> None:
    """In float64: where a ReLU takes the other branch by a float32 rounding, gradients jump."""
    net = _net(name).train(training).double()
    x = _input(name).double()
    with dk.use_backend("reference"):
        expected = step(copy.deepcopy(net), x)
    net.to(memory_format=torch.channels_last)
    results = step(net, x.contiguous(memory_format=torch.channels_last))
    assert errors(results, expected).max() <= FLOAT64


@pytest.mark.parametrize(("name", "training", "draws"), RUNS)
def test_bfloat16_autocast(name: str, training: bool, draws: int) -> None:
    ratios = _error_ratios(name, training, _output, draws=draws, autocast=True)
    assert ratios.max() <= NO_WORSE


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["d3net_s_fcn", "d3net_vocals"])
def test_bfloat16_autocast_gradients(name: str, training: bool) -> None:
    ratios = _error_ratios(name, training, step, draws=16, autocast=True)
    assert ratios.max() <= NO_WORSE


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dilation", ["multi", "standard"])
@pytest.mark.parametrize("name", ["d3net_s", "d3net_s_fcn", "d3net_vocals"])
def test_checkpointing(name: str, dilation: str, autocast: bool) -> None:
    """The same step, the same running statistics, and less kept for backward."""
    nets = [_net(name, dilation=dilation)]
    nets.append(copy.deepcopy(nets[0]))
    nets[1].set_grad_checkpointing()
    x = _input(name)
    results, kept = [], []
    for net in nets:
        saved: dict[int, int] = {}

        def keep(t: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        ):
            net(x)
        kept.append(sum(saved.values()))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(step(net, x))
    assert kept[1] < kept[0]
    torch.testing.assert_close(results[0], results[1])
    for (key, a), b in zip(
        nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=key)
    nets[1].set_grad_checkpointing(False)
    nets[1].zero_grad()
    nets[0].zero_grad()
    torch.testing.assert_close(step(nets[0], x), step(nets[1], x))
