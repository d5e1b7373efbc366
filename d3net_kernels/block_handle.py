"""D2 blocks whose parameters the compiled CPU kernels hold already: a call brings its input alone.

On the smallest maps it takes longer to check some thirty tensors and to hand them over than to
compute. So the second call without gradients that is given the same D2Params leaves a handle in it,
the number under which csrc/d2_registration.cpp holds the same tensors, and later calls name it.
Tensors are held, not values: where they lie and what is in them is looked up in every call.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, ops
from ._layout import autocast_dtype_for
from .block_params import D2Params, Norm
from .precision import allowed_precision


class _Key(NamedTuple):
    """What a handle serves, with its parameters."""

    dtype: torch.dtype  # of x, after autocast
    under_autocast: bool
    norm: Norm
    out_layers: int


class _Handle:
    """Parameters held by csrc/d2_registration.cpp for as long as this object lives."""

    def __init__(self, params: D2Params, key: _Key) -> None:
        convs, norms = params.convs, params.norms
        absent = convs[0].weight.new_empty(0)
        self.number = ops.d2_block_handle(
            [conv.weight for conv in convs],
            [absent if conv.bias is None else conv.bias for conv in convs],
            [n.weight for n in norms],
            [n.bias for n in norms],
            [n.running_mean for n in norms],
            [n.running_var for n in norms],
            norms[0].eps,
            key.norm == "per_layer",
            True,
            key.out_layers,
        )
        weakref.finalize(self, ops.d2_block_release, self.number).atexit = False


def d2_block(
    x: Tensor | Sequence[Tensor], params: D2Params, norm: Norm, out_layers: int | None
) -> Tensor | None:
    """The block by the handle that earlier calls left in `params`.

    None where there is none, or where somebody looks at the operators of this call; and where
    something does not fit, which the usual way explains. Gradients must be off.
    """
    if not params.handles or backends.forced() is not None:
        return None
    parts = x if isinstance(x, (list, tuple)) else (x,)
    if _is_observed() or not parts or not all(type(part) is Tensor for part in parts):
        return None
    autocast = torch.is_autocast_enabled("cpu")
    if autocast and (dtype := autocast_dtype_for(parts[0])) is not None:
        parts = [part.to(dtype) for part in parts]
    layers = len(params.convs) if out_layers is None else out_layers
    if type(layers) is not int:  # True is equal to 1
        return None
    try:
        handle = params.handles.get(_Key(parts[0].dtype, autocast, norm, layers))
        if handle is None:
            return None
        out: Tensor = ops.d2_block_of_handle(parts, handle.number, allowed_precision("cpu"))
    except (RuntimeError, TypeError):
        return None
    return out


def leave(parts: Sequence[Tensor], params: D2Params, norm: Norm, out_layers: int) -> None:
    """For later calls, on parts like these, that the node serves without batch statistics.

    Whoever makes parameters anew for every call would pay for handles in vain, so the first call
    only leaves its mark.
    """
    if _is_observed():
        return
    key = _Key(parts[0].dtype, torch.is_autocast_enabled("cpu"), norm, out_layers)
    params.handles[key] = _Handle(params, key) if key in params.handles else None


def _is_observed() -> bool:
    """Whether a tracer, a transform or a mode wants to see operators that it knows."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )
