"""The networks among torch's tools: memory layouts, autocast, checkpointing, compile, export."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from test_d3net_models import TINY, TINY_AUDIO
from torch import Tensor, nn
from torch.export import Dim

import d3net
import d3net_kernels as dk

pytestmark = pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")

NAMES = ("d3net_s", "d3net_s_fcn", "d3net_l_ocr", "d3net_vocals")
# From 61 pixels a side the coarsest scale has two, and torch sees no special case of one.
IMAGE_DIMS = {0: Dim("n"), 2: Dim("h", min=61), 3: Dim("w", min=61)}
SHAPES = {
    "image": ((2, 3, 64, 96), (3, 3, 71, 101), IMAGE_DIMS),
    "audio": ((2, 2, 16, 30), (3, 2, 24, 30), {0: Dim("n"), 2: 4 * Dim("t")}),
}


def _kind(name: str) -> str:
    return "audio" if name == "d3net_vocals" else "image"


def _net(name: str, **options: object) -> nn.Module:
    """Small, with statistics that are not trivial."""
    net = d3net.create_model(name, **(TINY_AUDIO if _kind(name) == "audio" else TINY), **options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


def _inputs(name: str) -> tuple[Tensor, Tensor]:
    """For tracing, and of other sizes for checking what was traced."""
    first, second, _ = SHAPES[_kind(name)]
    return torch.rand(first), torch.rand(second)


def _flat(outputs: Tensor | list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in ([outputs] if isinstance(outputs, Tensor) else outputs)])


def _step(net: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs, then the input's and all parameters' gradients, of a loss with fixed weights."""
    x = x.clone().requires_grad_()
    out = _flat(net(x))
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype)).sum().backward()
    grads = [p.grad for p in (x, *net.parameters()) if p.grad is not None]
    return out.detach(), grads


def _assert_no_worse(out: Tensor, plain: Tensor, truth: Tensor, floor: float) -> None:
    """The error against float64 is that of plain torch in the same precision, or near it."""
    error, allowed = ((t.double() - truth).norm() / truth.norm() for t in (out, plain))
    assert error <= 1.5 * allowed + floor


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_channels_last(name: str, training: bool) -> None:
    """As exact as plain torch in this layout, whose own normalisation rounds more than in NCHW."""
    net = _net(name).train(training)
    x = _inputs(name)[0]
    truth, true_grads = _step(copy.deepcopy(net).double(), x.double())
    net.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    with dk.use_backend("reference"):
        plain, plain_grads = _step(copy.deepcopy(net), x)
    out, grads = _step(net, x)
    _assert_no_worse(out, plain, truth, 2e-6)
    all_grads = (_flat(g) for g in (grads, plain_grads, true_grads))
    _assert_no_worse(*all_grads, floor=2e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_autocast(name: str, training: bool) -> None:
    net = _net(name).train(training)
    x = _inputs(name)[0]
    truth = _flat(copy.deepcopy(net).double()(x.double())).detach()
    outputs = []
    for backend in (nullcontext(), dk.use_backend("reference")):
        with backend, torch.autocast("cpu", torch.bfloat16):
            outputs.append(_flat(copy.deepcopy(net)(x)).detach())
    _assert_no_worse(*outputs, truth, 1e-3)


def test_autocast_trains() -> None:
    net = _net("d3net_s_fcn")
    with torch.autocast("cpu", torch.bfloat16):
        out = net(_inputs("d3net_s_fcn")[0])
    out.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dilation", ["multi", "standard"])
@pytest.mark.parametrize("name", ["d3net_s", "d3net_s_fcn", "d3net_vocals"])
def test_checkpointing(name: str, dilation: str, autocast: bool) -> None:
    """The same step, the same running statistics, and less kept for backward."""
    nets = [_net(name, dilation=dilation)]
    nets.append(copy.deepcopy(nets[0]))
    nets[1].set_grad_checkpointing()
    x = _inputs(name)[0]
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
            results.append(_step(net, x))
    assert kept[1] < kept[0]
    torch.testing.assert_close(results[0], results[1])
    for (key, a), b in zip(
        nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=key)
    nets[1].set_grad_checkpointing(False)
    nets[1].zero_grad()
    nets[0].zero_grad()
    torch.testing.assert_close(_step(nets[0], x), _step(nets[1], x))


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(name: str, training: bool) -> None:
    """In float64, since the gradients of a training step amplify float32 noise."""
    net = _net(name).train(training).double()
    other = copy.deepcopy(net)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = _inputs(name)[0].double()
    for ours, eager in zip(_step(compiled, x), _step(net, x), strict=True):
        difference = (_flat(ours) - _flat(eager)).norm()
        assert difference <= 1e-9 * _flat(eager).norm()
    for a, b in zip(net.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_exports_with_dynamic_sizes(name: str) -> None:
    net = _net(name).eval()
    x, other = _inputs(name)
    program = torch.export.export(net, (x,), dynamic_shapes=(SHAPES[_kind(name)][2],))
    torch.testing.assert_close(program.module()(other), net(other))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_onnx_without_custom_operators(name: str, tmp_path: Path) -> None:
    """Through the reference backend, which is plain convolutions; checked at another size."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'd3net-kernels[export]'")
    pytest.importorskip("onnxscript", reason="pip install 'd3net-kernels[export]'")
    net = _net(name).eval()
    x, other = _inputs(name)
    with dk.use_backend("reference"):
        program = torch.onnx.export(
            net, (x,), dynamo=True, dynamic_shapes=(SHAPES[_kind(name)][2],), verbose=False
        )
    path = str(tmp_path / "net.onnx")
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    assert {node.domain for node in program.model.graph} <= {"", "pkg.onnxscript.torch_lib"}
    torch.testing.assert_close(
        _flat([torch.from_numpy(out) for out in outputs]), _flat(net(other)), rtol=1e-4, atol=1e-5
    )
