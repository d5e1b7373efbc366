"""The operators as torch sees them: schemas, strides of results, autograd, autocast, vmap.

Three operators are enough for every order of differentiation: the derivatives of the two backward
operators are again the three (autograd.py). A fourth is the first one with moments of its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _binary, _layout
from .backends import composite

_NAMESPACE = "d3net_kernels"
_PROBLEM = "Tensor[] inputs, Tensor weight"
# precision is what float32 may be rounded to, of precision.py.
_OPTIONS = "int[] dilations, Tensor? scale, Tensor? shift, bool relu, int precision"
_BLOCK = (
    "Tensor[] weights, Tensor[] biases, Tensor[] norm_weights, Tensor[] norm_biases,"
    " Tensor[] running_means, Tensor[] running_vars, int[] use_batch, float eps, bool per_layer,"
    " bool relu, int out_layers, int precision"
)

library = torch.library.Library(_NAMESPACE, "DEF")
_overloads = torch.ops.d3net_kernels


def _define(schema: str) -> Any:
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(_overloads, schema[: schema.index("(")]).default


class Operators(NamedTuple):
    """The operators: those of one backend call no others, in their backward passes too."""

    multidilated_conv2d: Any
    backward_data: Any
    backward_weight: Any
    with_moments: Any

    @staticmethod
    def define(name: str) -> Operators:
        """Declare them under `name`."""
        return Operators(
            _define(f"{name}({_PROBLEM}, Tensor? bias, {_OPTIONS}) -> Tensor"),
            _define(
                f"{name}_backward_data(Tensor grad_output, {_PROBLEM}, {_OPTIONS}, int[] wanted)"
                " -> (Tensor[] grad_inputs, Tensor grad_scale, Tensor grad_shift)"
            ),
            _define(
                f"{name}_backward_weight(Tensor grad_output, {_PROBLEM}, {_OPTIONS})"
                " -> (Tensor grad_weight, Tensor grad_bias)"
            ),
            _define(
                f"{name}_with_moments({_PROBLEM}, Tensor? bias, {_OPTIONS})"
                " -> (Tensor out, Tensor mean, Tensor var)"
            ),
        )


# What the dispatcher chooses for the tensors' device; and what use_backend("triton") asks for.
DEFAULT = Operators.define("multidilated_conv2d")
TRITON = Operators.define("triton_multidilated_conv2d")
multidilated_conv2d, backward_data, backward_weight, with_moments = DEFAULT
channel_moments = _define("channel_moments(Tensor x) -> (Tensor mean, Tensor var)")
d2_block = _define(
    f"d2_block(Tensor[] parts, {_BLOCK}, bool keep)"
    " -> (Tensor out, Tensor features, Tensor mean, Tensor var)"
)
d2_block_backward = _define(
    "d2_block_backward(Tensor grad_out, Tensor[] parts, Tensor out, Tensor features, Tensor mean,"
    f" Tensor var, {_BLOCK}, int[] wanted) -> (Tensor grad_x, Tensor[] grad_weights,"
    " Tensor[] grad_biases, Tensor[] grad_norm_weights, Tensor[] grad_norm_biases)"
)
# Calls with parameters that were handed over before; never traced (block_handle.py).
d2_block_handle = _define(
    "d2_block_handle(Tensor[] weights, Tensor[] biases, Tensor[] norm_weights,"
    " Tensor[] norm_biases, Tensor[] running_means, Tensor[] running_vars, float eps,"
    " bool per_layer, bool relu, int out_layers) -> int"
)
d2_block_of_handle = _define(
    "d2_block_of_handle(Tensor[] parts, int handle, int precision) -> Tensor"
)
d2_block_release = _define("d2_block_release(int handle) -> ()")
_define("d2_block_handles() -> int")
_define("cpu_isa(str request) -> str")
_define("cpu_packed_bytes() -> int")
_define(
    "cpu_plan(int batch, int in_channels, int out_channels, int height, int width, int dilation,"
    " int precision, bool exact) -> str"
)

# Below every device's own kernel: the dispatcher comes here where there is none.
for _op, _kernel in (
    (multidilated_conv2d, composite.forward),
    (backward_data, composite.backward_data),
    (backward_weight, composite.backward_weight),
    (with_moments, composite.forward_with_moments),
    (channel_moments, composite.channel_moments),
):
    library.impl(_op, _kernel, "CompositeExplicitAutograd")


def _no_cpu_isa(request: str) -> str:
    raise RuntimeError(f"the cpu backend is not available: {_binary.missing}")


if _binary.missing is not None:
    library.impl("cpu_isa", _no_cpu_isa, "CompositeExplicitAutograd")


def _fake_forward(
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    dilations: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    precision: int,
) -> Tensor:
    n, _, h, w = inputs[0].shape
    return _layout.empty((n, weight.shape[0], h, w), inputs[0])


def _fake_backward_data(
    grad_output: Tensor,
    inputs: Sequence[Tensor],
    weight: Tensor,
    dilations: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    precision: int,
    wanted: Sequence[int],
) -> tuple[list[Tensor], Tensor, Tensor]:
    grad_inputs = _layout.empty_gradients(inputs, wanted)
    if scale is None:
        return grad_inputs, weight.new_empty(0), weight.new_empty(0)
    return grad_inputs, scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _fake_backward_weight(
    grad_output: Tensor,
    inputs: Sequence[Tensor],
    weight: Tensor,
    dilations: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    precision: int,
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _fake_with_moments(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = _fake_forward(*arguments)
    return out, *_fake_channel_moments(out)


def _fake_channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=_layout.dtype_for(x))
    return mean, torch.empty_like(mean)


def _fake_d2_block(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    use_batch: Sequence[int],
    eps: float,
    per_layer: bool,
    relu: bool,
    out_layers: int,
    precision: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = parts[0]
    n, _, h, w = x.shape
    channels = weights[0].shape[1]
    layers, growth = len(weights), weights[-1].shape[0]
    out = _layout.empty_channels_last((n, growth * out_layers, h, w), x)
    kept = _layout.hidden_pitch(growth, layers, out_layers) if keep else 0
    measured = channels + (layers - 1) * growth if any(use_batch) else 0
    mean = x.new_empty(measured, dtype=_layout.dtype_for(x))
    return out, x.new_empty((n, h, w, kept)), mean, torch.empty_like(mean)


def _fake_d2_block_backward(
    grad_out: Tensor,
    parts: Sequence[Tensor],
    out: Tensor,
    features: Tensor,
    mean: Tensor,
    var: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    use_batch: Sequence[int],
    eps: float,
    per_layer: bool,
    relu: bool,
    out_layers: int,
    precision: int,
    wanted: Sequence[int],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    x = parts[0]
    n, _, h, w = x.shape
    shape = (n, weights[0].shape[1], h, w)
    grad_x = _layout.empty_channels_last(shape, x) if wanted[0] else x.new_empty(0)
    flags = iter(wanted[1:])
    groups = [
        [t.new_empty(t.shape) if next(flags) else t.new_empty(0) for t in group]
        for group in (weights, biases, norm_weights, norm_biases)
    ]
    return grad_x, groups[0], groups[1], groups[2], groups[3]


_FAKES: tuple[Callable[..., Any], ...] = (
    _fake_forward,
    _fake_backward_data,
    _fake_backward_weight,
    _fake_with_moments,
)
_fakes: list[tuple[Any, Callable[..., Any]]] = [
    *zip(DEFAULT, _FAKES, strict=True),
    *zip(TRITON, _FAKES, strict=True),
    (channel_moments, _fake_channel_moments),
    (d2_block, _fake_d2_block),
    (d2_block_backward, _fake_d2_block_backward),
]
for _op, _fake in _fakes:
    torch.library.register_fake(_op, _fake, lib=library)
