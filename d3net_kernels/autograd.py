"""Derivatives of the operators, of every order, in terms of the first three of them.

With y = psi(x) = m (x s + t), m the 0/1 mask of the ReLU and gy the gradient with respect to y:

    multidilated_conv2d   out = conv(y, w) + b
    backward_data         gx = m s gy,  gs = sum m x gy,  gt = sum m gy,  with gy = conv^T(g, w)
    backward_weight       gw = correlation(g, y),  gb = sum g

Where the moments of out are measured too, their gradients are a part of that of out. Kept for the
backward pass are the raw inputs, weight, scale and shift: never y, never m.

Registered on the Autograd key and not by torch.library.register_autograd, which does not serve
torch.func transforms and costs a multiple of this per call for operators that take Tensor[].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from .ops import DEFAULT, TRITON, Operators, library
from .reference import psi
from .statistics import gradient_of_moments

# A gradient or None per argument of a node. Autograd sees tensors only outside of lists, so a node
# takes the sources one by one after the other arguments, and returns lists spread out likewise.
_Gradients = tuple[Tensor | None, ...]


class _Forward:
    """multidilated_conv2d(weight, bias, dilations, scale, shift, relu, precision, *inputs)."""

    @staticmethod
    def evaluate(ops: Operators, *flat: Any) -> Tensor:
        weight, bias, dilations, scale, shift, relu, precision, *inputs = flat
        out: Tensor = ops.multidilated_conv2d(
            inputs, weight, bias, dilations, scale, shift, relu, precision
        )
        return out

    @staticmethod
    def keep(ctx: Any, flat: tuple[Any, ...], results: Any) -> None:
        weight, _, ctx.dilations, scale, shift, ctx.relu, ctx.precision, *inputs = flat
        ctx.save_for_backward(weight, scale, shift, *inputs)

    @staticmethod
    def gradients(ctx: Any, grad_output: Tensor | None) -> _Gradients:
        return _Forward.gradients_of(ctx, grad_output, *ctx.saved_tensors)

    @staticmethod
    def gradients_of(
        ctx: Any,
        grad_output: Tensor | None,
        weight: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        *inputs: Tensor,
    ) -> _Gradients:
        ops: Operators = ctx.ops
        want_weight, want_bias, _, want_scale, want_shift, _, _, *wanted = ctx.needs_input_grad
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        options = (ctx.dilations, scale, shift, ctx.relu, ctx.precision)
        arguments = (grad_output, inputs, weight, *options)
        grad_inputs: Sequence[Tensor | None] = [None] * len(inputs)
        grad_weight = grad_bias = grad_scale = grad_shift = None
        if any(wanted) or want_scale or want_shift:
            grad_inputs, grad_scale, grad_shift = ops.backward_data(
                *arguments, [int(w) for w in wanted]
            )
        if want_weight or want_bias:
            grad_weight, grad_bias = ops.backward_weight(*arguments)
        of_others = (grad_weight, grad_bias, None, grad_scale, grad_shift, None, None)
        return _only(ctx, *of_others, *grad_inputs)


class _ForwardWithMoments:
    """multidilated_conv2d_with_moments, of the arguments of multidilated_conv2d."""

    @staticmethod
    def evaluate(ops: Operators, *flat: Any) -> tuple[Tensor, ...]:
        weight, bias, dilations, scale, shift, relu, precision, *inputs = flat
        options = (dilations, scale, shift, relu, precision)
        return tuple(ops.with_moments(inputs, weight, bias, *options))

    @staticmethod
    def keep(ctx: Any, flat: tuple[Any, ...], results: Any) -> None:
        weight, _, ctx.dilations, scale, shift, ctx.relu, ctx.precision, *inputs = flat
        out, mean, _ = results
        ctx.save_for_backward(weight, scale, shift, *inputs, out, mean)

    @staticmethod
    def gradients(ctx: Any, grad_output: Tensor | None, *grads: Tensor | None) -> _Gradients:
        *arguments, out, mean = ctx.saved_tensors  # once: checkpointing gives them only once
        if any(grad is not None for grad in grads):
            of_mean, of_var = (torch.zeros_like(mean) if g is None else g for g in grads)
            count = out.numel() // mean.numel()
            through_moments = gradient_of_moments(out, mean, count, of_mean, of_var)
            grad_output = through_moments if grad_output is None else grad_output + through_moments
        return _Forward.gradients_of(ctx, grad_output, *arguments)


class _BackwardData:
    """multidilated_conv2d_backward_data(grad_output, weight, ..., wanted, *inputs)."""

    @staticmethod
    def evaluate(ops: Operators, *flat: Any) -> tuple[Tensor, ...]:
        grad_output, weight, dilations, scale, shift, relu, precision, wanted, *inputs = flat
        grad_inputs, grad_scale, grad_shift = ops.backward_data(
            grad_output, inputs, weight, dilations, scale, shift, relu, precision, wanted
        )
        return (grad_scale, grad_shift, *grad_inputs)

    @staticmethod
    def keep(ctx: Any, flat: tuple[Any, ...], results: Any) -> None:
        grad_output, weight, ctx.dilations, scale, shift, ctx.relu, *others = flat
        ctx.precision, ctx.wanted, *inputs = others
        ctx.save_for_backward(grad_output, weight, scale, shift, *inputs)

    @staticmethod
    def gradients(
        ctx: Any, to_scale: Tensor | None, to_shift: Tensor | None, *to_inputs: Tensor | None
    ) -> _Gradients:
        """All three results are linear in gy, so one tangent u to gy per source carries them:

        u = m (s to_x + x to_s + to_t); conv(u, w) and correlation(g, u) are the gradients of g, w.
        """
        ops: Operators = ctx.ops
        grad_output, weight, scale, shift, *inputs = ctx.saved_tensors
        want_grad_output, want_weight, _, want_scale, _, _, _, _, *wanted = ctx.needs_input_grad
        slices = _channel_slices(inputs)
        masks: list[Tensor | None] = [None] * len(inputs)  # True where the ReLU cuts off
        tangents = []
        for i, (x, group) in enumerate(zip(inputs, slices, strict=True)):
            terms = []
            to_x = to_inputs[i] if ctx.wanted[i] else None
            if to_x is not None:
                terms.append(to_x if scale is None else to_x * scale[group, None, None])
            if to_scale is not None and scale is not None:
                terms.append(x * to_scale[group, None, None])
            if to_shift is not None and scale is not None:
                terms.append(to_shift[group, None, None].expand_as(x))
            tangent = functools.reduce(torch.add, terms) if terms else torch.zeros_like(x)
            if ctx.relu:
                factor, summand = (None, None) if scale is None else (scale[group], shift[group])
                cut = psi(x, factor, summand, False) <= 0
                tangent = tangent.masked_fill(cut, 0)
                masks[i] = cut
            tangents.append(tangent.to(x.dtype))

        plain = (ctx.dilations, None, None, False, ctx.precision)
        grad_grad = grad_weight = grad_scale = None
        grad_inputs: list[Tensor | None] = [None] * len(inputs)
        if want_grad_output:
            grad_grad = ops.multidilated_conv2d(tangents, weight, None, *plain)
        if want_weight:
            grad_weight, _ = ops.backward_weight(grad_output, tangents, weight, *plain)
        if scale is not None and (want_scale or any(wanted)):
            # gx is linear in s and gs is linear in x: both gradients need gy itself.
            every = [1] * len(inputs)
            grads_y, _, _ = ops.backward_data(grad_output, inputs, weight, *plain, every)
            parts = []
            for i, (x, group) in enumerate(zip(inputs, slices, strict=True)):
                mask = masks[i]
                grad_y = grads_y[i] if mask is None else grads_y[i].masked_fill(mask, 0)
                to_x = to_inputs[i] if ctx.wanted[i] else None
                parts.append(
                    torch.zeros_like(scale[group])
                    if to_x is None
                    else (grad_y.to(scale.dtype) * to_x).sum((0, 2, 3)).to(scale.dtype)
                )
                if to_scale is not None:
                    grad_inputs[i] = (grad_y * to_scale[group, None, None]).to(x.dtype)
            grad_scale = torch.cat(parts)
        of_others = (grad_grad, grad_weight, None, grad_scale, None, None, None, None)
        return _only(ctx, *of_others, *grad_inputs)


class _BackwardWeight:
    """multidilated_conv2d_backward_weight(grad_output, weight, ..., precision, *inputs)."""

    @staticmethod
    def evaluate(ops: Operators, *flat: Any) -> tuple[Tensor, ...]:
        grad_output, weight, dilations, scale, shift, relu, precision, *inputs = flat
        return tuple(
            ops.backward_weight(
                grad_output, inputs, weight, dilations, scale, shift, relu, precision
            )
        )

    @staticmethod
    def keep(ctx: Any, flat: tuple[Any, ...], results: Any) -> None:
        grad_output, weight, ctx.dilations, scale, shift, ctx.relu, *others = flat
        ctx.precision, *inputs = others
        ctx.save_for_backward(grad_output, weight, scale, shift, *inputs)

    @staticmethod
    def gradients(ctx: Any, to_weight: Tensor | None, to_bias: Tensor | None) -> _Gradients:
        """<correlation(g, y), V> = <g, conv(y, V)>: the operator itself, with V as the weight."""
        ops: Operators = ctx.ops
        grad_output, weight, scale, shift, *inputs = ctx.saved_tensors
        want_grad_output, _, _, want_scale, want_shift, _, _, *wanted = ctx.needs_input_grad
        options = (ctx.dilations, scale, shift, ctx.relu, ctx.precision)
        grad_inputs: Sequence[Tensor | None] = [None] * len(inputs)
        grad_grad = grad_scale = grad_shift = None
        if to_weight is None:
            to_weight = torch.zeros_like(weight)
        if want_grad_output:
            grad_grad = ops.multidilated_conv2d(inputs, to_weight, to_bias, *options)
        if any(wanted) or want_scale or want_shift:
            grad_inputs, grad_scale, grad_shift = ops.backward_data(
                grad_output, inputs, to_weight, *options, [int(w) for w in wanted]
            )
        of_others = (grad_grad, None, None, grad_scale, grad_shift, None, None)
        return _only(ctx, *of_others, *grad_inputs)


def _only(ctx: Any, *gradients: Tensor | None) -> _Gradients:
    """The gradients that are needed; kernels also return others, or empty stand-ins."""
    needed = ctx.needs_input_grad
    return tuple(g if need else None for g, need in zip(gradients, needed, strict=True))


def _channel_slices(inputs: Sequence[Tensor]) -> list[slice]:
    start = 0
    return [slice(start, start := start + x.shape[1]) for x in inputs]


def refuse_forward_mode(arguments: Sequence[Any]) -> None:
    """No silent zero where a tangent is asked for (torch.func.jvp, torch.autograd.forward_ad)."""
    if forward_ad._current_level < 0:
        return
    for a in arguments:
        for t in a if isinstance(a, (list, tuple)) else (a,):
            if isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None:
                raise RuntimeError(
                    "the operators of d3net_kernels have no forward-mode derivative; plain torch "
                    'has: run under d3net_kernels.use_backend("reference")'
                )


def _node(rule: Any, ops: Operators) -> Any:
    """The autograd node of `rule`, in terms of `ops`.

    Single level, because torch.func has already taken its level off the call when the Autograd key
    is reached; the kernel below this node passes on to the next one.
    """

    def forward(ctx: Any, *flat: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.ops = ops
        # The node turned gradients off, for the outer levels of torch.func too; they need them.
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            results = rule.evaluate(ops, *flat)
        rule.keep(ctx, flat, results)
        return results

    members = {"forward": staticmethod(forward), "backward": staticmethod(rule.gradients)}
    return type(rule.__name__, (_SingleLevelFunction,), members)


def _register(
    op: Any,
    rule: Any,
    ops: Operators,
    sources_at: int,
    restore: Callable[[Any], Any] = lambda results: results,
) -> None:
    """Make `op`, whose argument number `sources_at` is the sources, differentiable by `rule`."""
    node = _node(rule, ops)

    def kernel(*arguments: Any) -> Any:
        refuse_forward_mode(arguments)
        sources = arguments[sources_at]
        others = arguments[:sources_at] + arguments[sources_at + 1 :]
        if torch.is_grad_enabled() and any(
            isinstance(a, Tensor) and a.requires_grad for a in (*sources, *others)
        ):
            with enable_single_level_autograd_function():
                return restore(node.apply(*others, *sources))
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    library.impl(op, kernel, "Autograd")


for _ops in (DEFAULT, TRITON):
    _register(_ops.multidilated_conv2d, _Forward, _ops, sources_at=0)
    _register(_ops.with_moments, _ForwardWithMoments, _ops, sources_at=0)
    _register(
        _ops.backward_data,
        _BackwardData,
        _ops,
        sources_at=1,
        restore=lambda results: (list(results[2:]), results[0], results[1]),
    )
    _register(_ops.backward_weight, _BackwardWeight, _ops, sources_at=1)
