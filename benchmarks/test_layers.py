"""pytest-benchmark suite: forward and backward of single layers, ours and the reference.

Run it with ``pytest benchmarks/test_layers.py``; --benchmark-compare and --benchmark-json are those
of pytest-benchmark. ``python -m benchmarks.layers`` has every shape and every form of plain torch.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.forms import LAYOUTS, Layer, ours, reference
from benchmarks.shapes import Shape, load_shapes, spread

pytest.importorskip("pytest_benchmark", reason="pip install 'd3net-kernels[bench]'")

SHAPES = spread(load_shapes(), number=12, most_flops=4e9)
FORMS = {"ours": ours, "reference": reference}


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> Shape:
    chosen: Shape = request.param
    return chosen


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_forward(benchmark: Callable[..., Tensor], shape: Shape, form: str, layout: str) -> None:
    layer = Layer.random(shape, torch.float32, layout)
    with torch.no_grad():
        out = benchmark(FORMS[form], layer)
    assert out.shape == (1, shape.c_out, shape.height, shape.width)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_backward(
    benchmark: Callable[..., tuple[Tensor, ...]], shape: Shape, form: str, layout: str
) -> None:
    """Gradients to every input, the weight and the bias; the forward pass is not timed."""
    layer = Layer.random(shape, torch.float32, layout)
    wanted = [*layer.inputs, layer.weight, layer.bias]
    for tensor in wanted:
        tensor.requires_grad_()
    out = FORMS[form](layer)
    grad_output = torch.ones_like(out)
    grads = benchmark(torch.autograd.grad, out, wanted, grad_output, retain_graph=True)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in wanted]
