"""Compiled and exported networks give what the eager ones give: small ones, and all as released."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from test_d3net_integration import FLOAT64, errors, flat, randomised, step
from test_d3net_models import TINY, TINY_AUDIO
from torch import Tensor, nn
from torch.export import Dim

import d3net
import d3net_kernels as dk
from d3net.blocks import ConcatD3Block, SumD3Block, set_checkpointing
from d3net.separation import SeparationNet

pytestmark = pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")

SMALL = {
    "small segmentation": ("d3net_s_fcn", TINY),
    "small OCR": ("d3net_l_ocr", TINY),
    "small separation": ("d3net_vocals", TINY_AUDIO),
}
OFFICIAL = {name: (name, {}) for name in d3net.list_models()}
CASES = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in OFFICIAL)]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """torch logs every step of tracing where someone listens, and pytest does: twice the time."""
    caplog.set_level(logging.WARNING, logger="torch.__trace")


def _net(case: str) -> nn.Module:
    name, options = {**SMALL, **OFFICIAL}[case]
    return randomised(d3net.create_model(name, **options))


def _inputs(net: nn.Module) -> tuple[Tensor, Tensor, dict[int, object]]:
    """For tracing; of other sizes for checking what was traced; and which sizes may change."""
    if isinstance(net, SeparationNet):
        frames, bins = net.config.frame_step, net.config.bins
        shapes = (2, 2, 2 * frames, bins), (3, 2, 3 * frames, bins)
        return *map(torch.rand, shapes), {0: Dim("n"), 2: frames * Dim("t")}
    # From 61 pixels a side the coarsest scale has two, and torch sees no special case of one.
    dims = {0: Dim("n"), 2: Dim("h", min=61), 3: Dim("w", min=61)}
    return torch.rand(2, 3, 64, 96), torch.rand(3, 3, 71, 101), dims


@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_graph_breaks(case: str, training: bool) -> None:
    net = _net(case).train(training)
    _assert_compiles(net, _inputs(net)[0])


@pytest.mark.parametrize("d3", [SumD3Block, partial(ConcatD3Block, compression=0.5)])
def test_compiles_with_checkpointing(d3: Callable[..., nn.Module]) -> None:
    block = d3(8, 2, 4, 2)
    set_checkpointing(block, True)
    _assert_compiles(block, torch.randn(2, 8, 6, 7))


def _assert_compiles(net: nn.Module, x: Tensor) -> None:
    """The step and the running statistics of the eager network without checkpointing.

    In float64, since the gradients of a training step amplify float32 noise.
    """
    net, x = net.double(), x.double()
    other = copy.deepcopy(net)
    set_checkpointing(net, False)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    assert errors(step(compiled, x), step(net, x)).max() <= FLOAT64
    for a, b in zip(net.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", CASES)
def test_exports_with_dynamic_sizes(case: str) -> None:
    """In float64, since a hundred layers amplify float32 noise."""
    net = _net(case).eval().double()
    x, other, dims = _inputs(net)
    program = torch.export.export(net, (x.double(),), dynamic_shapes=(dims,))
    results = (flat(f(other.double())) for f in (program.module(), net))
    assert _error(*results) <= FLOAT64


@pytest.mark.parametrize("case", CASES)
def test_onnx_without_custom_operators(case: str, tmp_path: Path) -> None:
    """Through the reference backend, which is plain convolutions; checked at another size.

    onnxruntime convolves in float32 only, and may err as much as plain torch does, but for the
    scatter of one draw.
    """
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'd3net-kernels[export]'")
    pytest.importorskip("onnxscript", reason="pip install 'd3net-kernels[export]'")
    net = _net(case)
    x, other, dims = _inputs(net)
    _calibrate(net, other)
    net.eval()
    truth = flat(copy.deepcopy(net).double()(other.double()))
    with dk.use_backend("reference"):
        plain = flat(net(other))
        program = torch.onnx.export(net, (x,), dynamo=True, dynamic_shapes=(dims,), verbose=False)
    path = str(tmp_path / "net.onnx")
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    assert {node.domain for node in program.model.graph} <= {"", "pkg.onnxscript.torch_lib"}
    result = flat([torch.from_numpy(out) for out in outputs])
    assert _error(result, truth) <= 3 * _error(plain, truth)


def _calibrate(net: nn.Module, x: Tensor) -> None:
    """Make the running statistics those of `x`, as after training, so that no value explodes."""
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        net.train()(x)


def _error(result: Tensor, expected: Tensor) -> float:
    return errors((result,), (expected,)).item()
