"""A D2 block as one node of the autograd graph, on the compiled CPU kernels (csrc/cpu).

Kept for the backward pass: x_0, the features, and mean and variance of each source channel. Second
derivatives go through the block layer by layer, whose formulas hold to every order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from . import block_layers, ops
from ._layout import autocast_dtype_for, dtype_for, is_channels_last
from .autograd import refuse_forward_mode
from .backends import cpu
from .block_params import ConvParams, D2Params, Norm, NormParams
from .precision import allowed_precision
from .statistics import update_running

# With fewer in all layers vectors run along the pixels of a row, not along channels. The node does
# that forward only (csrc/cpu/d2_rows.h); its backward pass would be slower than block_layers'.
FEWEST_CHANNELS = 8
MOST_TAPS = 64  # kMostTaps of csrc/cpu/tile_plan.h


def serves(parts: Sequence[Tensor], params: D2Params, norm: Norm) -> bool:
    """Whether the node can do it; what it cannot, arguments that do not fit among it, block_layers
    does or explains. Exported programs are to run elsewhere too: they hold operators that every
    device has.
    """
    if torch.compiler.is_exporting():
        return False
    x = parts[0]
    if not x.is_cpu or x.numel() == 0 or cpu.why_not(()) is not None:
        return False
    convs, norms = params.convs, params.norms
    if not all(isinstance(conv.weight, Tensor) for conv in convs):
        return False
    layers, dtype = len(convs), convs[0].weight.dtype
    if dtype not in (x.dtype, dtype_for(x)):  # autocast casts x alone
        return False
    growth, _, *kernel = convs[-1].weight.shape
    if len(kernel) != 2 or any(side % 2 != 1 for side in kernel) or math.prod(kernel) > MOST_TAPS:
        return False
    channels = sum(part.shape[1] for part in parts)
    if len(norms) != layers:
        return False
    if growth * layers < FEWEST_CHANNELS and torch.is_grad_enabled():
        return False
    normed, eps = channels, norms[0].eps
    for i, ((weight, bias), n) in enumerate(zip(convs, norms, strict=True)):
        slots = growth * (layers - i)
        # All in one expression: this runs in every call, of the smallest maps too.
        if not (
            weight.shape == (slots, channels, *kernel)
            and weight.dtype == dtype
            and weight.is_cpu
            and (bias is None or (bias.shape == (slots,) and bias.dtype == dtype and bias.is_cpu))
            and n.eps == eps
            and _on_cpu(n.weight, normed)
            and _on_cpu(n.bias, normed)
            and (n.running_mean is None) == (n.running_var is None)
            and (n.running_mean is None or _on_cpu(n.running_mean, normed))
            and (n.running_var is None or _on_cpu(n.running_var, normed))
        ):
            return False
        channels = growth
        normed = normed + growth if norm == "per_layer" else growth
    return True


def _on_cpu(vector: Tensor | None, channels: int) -> bool:
    return vector is not None and vector.is_cpu and vector.shape == (channels,)


def serves_parts(parts: Sequence[Tensor]) -> bool:
    """Whether convolving several tensors is as fast as concatenating them first.

    In channels_last it is, and where some are not, copying those costs less than copying all.
    """
    if len(parts) == 1 or torch.compiler.is_exporting() or cpu.why_not(()) is not None:
        return False
    return (
        autocast_dtype_for(parts[0]) is None
        and all(part.device.type == "cpu" and part.dtype == torch.float32 for part in parts)
        and any(is_channels_last(part) for part in parts)
    )


def d2_block(
    parts: Sequence[Tensor], params: D2Params, norm: Norm, out_layers: int, relu: bool = True
) -> Tensor:
    """The block through its own operator; arguments as `serves` accepted them."""
    x = parts[0]
    absent = x.new_empty(0)
    convs, norms = params.convs, params.norms
    use_batch = [int(n.running_mean is None or n.use_batch_statistics) for n in norms]
    # Through the dispatcher a call costs 10 microseconds more, which only tracing and the
    # transforms of torch.func need.
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    dispatched = traced or torch._C._are_functorch_transforms_active()
    out, _, mean, var = (ops.d2_block if dispatched else _autograd)(
        parts,
        [conv.weight for conv in convs],
        [absent if conv.bias is None else conv.bias for conv in convs],
        [n.weight for n in norms],
        [n.bias for n in norms],
        [absent if b else n.running_mean for n, b in zip(norms, use_batch, strict=True)],
        [absent if b else n.running_var for n, b in zip(norms, use_batch, strict=True)],
        use_batch,
        norms[0].eps,
        norm == "per_layer",
        relu,
        out_layers,
        allowed_precision("cpu"),
        False,
    )
    result: Tensor = out
    if not any(use_batch):
        return result
    updated = [n for n, batch in zip(norms, use_batch, strict=True) if batch]
    means, variances = (_of_norms(t, convs, use_batch, norm) for t in (mean, var))
    update_running(updated, means, variances, x.shape[0] * x.shape[2] * x.shape[3])
    return result


def _of_norms(
    statistics: Tensor, convs: Sequence[ConvParams], use_batch: Sequence[int], norm: Norm
) -> list[Tensor]:
    """The part of the sources' statistics that each norm takes, of those that do."""
    widths = [conv.weight.shape[1] for conv in convs]
    if norm == "per_source":
        parts = statistics.split(widths)
    else:
        parts = tuple(statistics.narrow(0, 0, end) for end in itertools.accumulate(widths))
    return [part for part, batch in zip(parts, use_batch, strict=True) if batch]


class _Options(NamedTuple):
    """The operators' arguments that are no tensors."""

    use_batch: list[int]
    eps: float
    per_layer: bool
    relu: bool
    out_layers: int
    precision: int


class _Arguments(NamedTuple):
    """The operators' tensors; autograd sees them one by one."""

    parts: Sequence[Tensor]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    norm_weights: Sequence[Tensor]
    norm_biases: Sequence[Tensor]
    running_means: Sequence[Tensor]
    running_vars: Sequence[Tensor]

    def flat(self) -> list[Tensor]:
        return [t for group in self for t in group]

    @classmethod
    def of(cls, flat: Sequence[Tensor], layers: int) -> _Arguments:
        start = len(flat) - 6 * layers
        groups = (flat[start + layers * i : start + layers * (i + 1)] for i in range(6))
        return cls(flat[:start], *groups)

    def block(self, options: _Options) -> Tensor:
        """The same block layer by layer; running statistics stay as they are."""
        dtype = self.parts[0].dtype
        convs = [
            ConvParams(w.to(dtype), b.to(dtype) if b.numel() else None)
            for w, b in zip(self.weights, self.biases, strict=True)
        ]
        norms = []
        for w, b, mean, var, batch in zip(*self[3:], options.use_batch, strict=True):
            kept_mean, kept_var = (None, None) if batch else (mean, var)
            norms.append(NormParams(w, b, kept_mean, kept_var, False, 0.0, options.eps))
        norm: Norm = "per_layer" if options.per_layer else "per_source"
        return block_layers.d2_block(
            self.parts, D2Params(convs, norms), norm, options.out_layers, None, options.relu
        )


def _forward(arguments: _Arguments, options: _Options, keep: bool) -> tuple[Tensor, ...]:
    return tuple(ops.d2_block(*arguments, *options, keep))


def _backward(
    grad_out: Tensor,
    kept: Sequence[Tensor],
    arguments: _Arguments,
    options: _Options,
    wanted: list[int],
) -> tuple[Tensor, ...]:
    """Gradients of x_0, weights, biases, norms' weights and biases; empty where not wanted."""
    parts, *parameters = arguments
    grad_x, *groups = ops.d2_block_backward(grad_out, parts, *kept, *parameters, *options, wanted)
    return (grad_x, *(t for group in groups for t in group))


class _Node(_SingleLevelFunction):
    """d2_block, single level as the nodes of autograd.py."""

    @staticmethod
    def forward(ctx: Any, options: _Options, *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        arguments = _Arguments.of(flat, len(options.use_batch))
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            out, features, mean, var = _forward(arguments, options, True)
        ctx.mark_non_differentiable(features, mean, var)
        ctx.options = options
        # Of the result only what the block's own layers read is needed again.
        returned = out if options.out_layers > 1 else out.new_empty(0)
        ctx.save_for_backward(returned, features, mean, var, *flat)
        return out, features, mean, var

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * len(ctx.needs_input_grad)
        out, features, mean, var, *flat = ctx.saved_tensors
        layers = len(ctx.options.use_batch)
        arguments = _Arguments.of(flat, layers)
        num_parts = len(arguments.parts)
        needs = ctx.needs_input_grad[1:]
        of_parts, of_others = needs[:num_parts], needs[num_parts : num_parts + 4 * layers]
        wanted = [int(any(of_parts)), *map(int, of_others)]
        grad_x, *others = _backward(
            grad_out, (out, features, mean, var), arguments, ctx.options, wanted
        )
        widths = [part.shape[1] for part in arguments.parts]
        to_parts = grad_x.split(widths, 1) if wanted[0] else [None] * num_parts
        found = [g if w else None for g, w in zip((*to_parts, *others), needs, strict=False)]
        return (None, *found, *[None] * (2 * layers))


class _BackwardNode(_SingleLevelFunction):
    """d2_block_backward; what it is given of the forward pass follows from the other arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        options: _Options,
        wanted: list[int],
        kept: Sequence[Tensor],
        grad_out: Tensor,
        *flat: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.wanted = options, wanted
        ctx.save_for_backward(grad_out, *flat)
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            arguments = _Arguments.of(flat, len(options.use_batch))
            return _backward(grad_out, kept, arguments, options, wanted)

    @staticmethod
    def backward(ctx: Any, *to_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, *flat = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views, since grad_out may have been computed from x: that path is not ours to follow.
            grad_out, *flat = (t.view_as(t) for t in (grad_out, *flat))
            arguments = _Arguments.of(flat, len(ctx.options.use_batch))
            x = torch.cat(list(arguments.parts), 1)
            arguments = arguments._replace(parts=[x])
            inputs = [t for t, w in zip(arguments.flat(), ctx.wanted, strict=False) if w]
            first = torch.autograd.grad(
                arguments.block(ctx.options), inputs, grad_out, create_graph=True
            )
            given = [t for t, w in zip(to_gradients, ctx.wanted, strict=True) if w]
            pairs = [(g, to) for g, to in zip(first, given, strict=True) if to is not None]
            needed = [
                t for t, n in zip((grad_out, *flat), ctx.needs_input_grad[3:], strict=True) if n
            ]
            second = iter(
                torch.autograd.grad(
                    [g for g, _ in pairs],
                    needed,
                    [to for _, to in pairs],
                    create_graph=again,
                    allow_unused=True,
                )
            )
        return (None, None, None, *(next(second) if n else None for n in ctx.needs_input_grad[3:]))


# As those of autograd.py, to the type checker: the class has no `apply` it knows of.
_node: Any = _Node
_backward_node: Any = _BackwardNode


def _autograd(*arguments: Any) -> Any:
    refuse_forward_mode(arguments)
    if torch.is_grad_enabled():
        flat = _Arguments(*arguments[:7]).flat()
        if any(t.requires_grad for t in flat):
            with enable_single_level_autograd_function():
                return _node.apply(_Options(*arguments[7:13]), *flat)
    with torch._C._AutoDispatchBelowAutograd():
        return ops.d2_block(*arguments)


def _autograd_backward(*arguments: Any) -> Any:
    refuse_forward_mode(arguments)
    grad_out, parts, *kept = arguments[:6]
    tensors, options = _Arguments(parts, *arguments[6:12]), _Options(*arguments[12:18])
    wanted = arguments[18]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (grad_out, *tensors.flat())):
        with enable_single_level_autograd_function():
            grad_x, *others = _backward_node.apply(options, wanted, kept, grad_out, *tensors.flat())
        layers = len(tensors.weights)
        return (grad_x, *(others[i * layers : (i + 1) * layers] for i in range(4)))
    with torch._C._AutoDispatchBelowAutograd():
        return ops.d2_block_backward(*arguments)


ops.library.impl(ops.d2_block, _autograd, "Autograd")
ops.library.impl(ops.d2_block_backward, _autograd_backward, "Autograd")
