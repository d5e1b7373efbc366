"""The operators as torch sees them: schemas, strides of results, autograd, autocast, vmap.

Three operators are enough for every order of differentiation: the derivatives of the two backward
operators are again the three (see `_backward_data_vjp` and `_backward_weight_vjp`).
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
_PSI = "int[] dilations, Tensor? scale, Tensor? shift, bool relu"

library = torch.library.Library(_NAMESPACE, "DEF")
_overloads = torch.ops.d3net_kernels


def _define(schema: str) -> Any:
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(_overloads, schema[: schema.index("(")]).default


class Operators(NamedTuple):
    """The three operators: those of one backend call no others, in their backward passes too."""

    multidilated_conv2d: Any
    backward_data: Any
    backward_weight: Any

    @staticmethod
    def define(name: str) -> Operators:
        """Declare them under `name`."""
        return Operators(
            _define(f"{name}({_PROBLEM}, Tensor? bias, {_PSI}) -> Tensor"),
            _define(
                f"{name}_backward_data(Tensor grad_output, {_PROBLEM}, {_PSI}, int[] wanted)"
                " -> (Tensor[] grad_inputs, Tensor grad_scale, Tensor grad_shift)"
            ),
            _define(
                f"{name}_backward_weight(Tensor grad_output, {_PROBLEM}, {_PSI})"
                " -> (Tensor grad_weight, Tensor grad_bias)"
            ),
        )


# What the dispatcher chooses for the tensors' device; and what use_backend("triton") asks for.
DEFAULT = Operators.define("multidilated_conv2d")
TRITON = Operators.define("triton_multidilated_conv2d")
multidilated_conv2d, backward_data, backward_weight = DEFAULT
channel_moments = _define("channel_moments(Tensor x) -> (Tensor mean, Tensor var)")
_define("cpu_isa(str request) -> str")

# Below every device's own kernel: the dispatcher comes here where there is none.
for _op, _kernel in (
    (multidilated_conv2d, composite.forward),
    (backward_data, composite.backward_data),
    (backward_weight, composite.backward_weight),
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
    wanted: Sequence[int],
) -> tuple[list[Tensor], Tensor, Tensor]:
    grad_inputs = [
        _layout.empty(x.shape, x) if is_wanted else x.new_empty(0)
        for x, is_wanted in zip(inputs, wanted, strict=True)
    ]
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
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _fake_channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=_layout.dtype_for(x))
    return mean, torch.empty_like(mean)


_FAKES: tuple[Callable[..., Any], ...] = (_fake_forward, _fake_backward_data, _fake_backward_weight)
for _op, _fake in (
    *zip(DEFAULT, _FAKES, strict=True),
    *zip(TRITON, _FAKES, strict=True),
    (channel_moments, _fake_channel_moments),
):
    torch.library.register_fake(_op, _fake, lib=library)
