"""torch.vmap of the operators: a batch of inputs is folded into N, everything else is a loop.

Folding needs results that keep N. That is the forward pass with one weight for all, and the
gradients of its inputs; sums over N (of weight, bias, scale, shift) differ per sample.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops

_Dims = tuple[Any, ...]


def _forward(op: Any, info: Any, dims: _Dims, *arguments: Any) -> tuple[Tensor, int]:
    inputs_dims, *other_dims = dims
    if any(dim is not None for dim in other_dims):
        return _loop(op, info, dims, arguments)
    inputs, *others = arguments
    folded = _fold_all(inputs, inputs_dims, info.batch_size)
    return _unfold(op(folded, *others), info.batch_size), 0


def _backward_data(op: Any, info: Any, dims: _Dims, *arguments: Any) -> tuple[Any, Any]:
    grad_output, inputs, weight, dilations, scale, shift, relu, precision, wanted = arguments
    grad_dim, inputs_dims, *other_dims = dims
    if scale is not None or any(dim is not None for dim in other_dims):
        return _loop(op, info, dims, arguments)
    size = info.batch_size
    grad_inputs, grad_scale, grad_shift = op(
        _fold(grad_output, grad_dim, size),
        _fold_all(inputs, inputs_dims, size),
        weight,
        dilations,
        scale,
        shift,
        relu,
        precision,
        wanted,
    )
    batched = [
        _unfold(g, size) if is_wanted else g
        for g, is_wanted in zip(grad_inputs, wanted, strict=True)
    ]
    grad_dims = [0 if is_wanted else None for is_wanted in wanted]
    return (batched, grad_scale, grad_shift), (grad_dims, None, None)


def _looped(op: Any, info: Any, dims: _Dims, *arguments: Any) -> tuple[Any, Any]:
    return _loop(op, info, dims, arguments)


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """(B, N, C, H, W), or a tensor shared by the batch, to (B * N, C, H, W)."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _fold_all(xs: Sequence[Tensor], dims: Sequence[int | None] | None, size: int) -> list[Tensor]:
    return [_fold(x, dim, size) for x, dim in zip(xs, dims or [None] * len(xs), strict=True)]


def _unfold(x: Tensor, size: int) -> Tensor:
    unfolded: Tensor = x.unflatten(0, (size, x.shape[0] // size))
    return unfolded


def _loop(
    op: Callable[..., Any], info: Any, dims: _Dims, arguments: Sequence[Any]
) -> tuple[Any, Any]:
    """One call per sample, results stacked."""
    results = [
        op(*(_sample(a, dim, b) for a, dim in zip(arguments, dims, strict=True)))
        for b in range(info.batch_size)
    ]
    return _stack(results)


def _sample(argument: Any, dim: Any, b: int) -> Any:
    if isinstance(dim, (list, tuple)):
        return [_sample(a, d, b) for a, d in zip(argument, dim, strict=True)]
    return argument if dim is None else argument.select(dim, b)


def _stack(results: Sequence[Any]) -> tuple[Any, Any]:
    """Stack tensors, or lists and tuples of them, along a new first dimension."""
    if isinstance(results[0], Tensor):
        return torch.stack(list(results)), 0
    stacked = [_stack(parts) for parts in zip(*results, strict=True)]
    kind = type(results[0])
    return kind(r for r, _ in stacked), kind(d for _, d in stacked)


_RULES: tuple[Callable[..., Any], ...] = (_forward, _backward_data, _looped, _looped)
for _op, _rule in (
    *zip(ops.DEFAULT, _RULES, strict=True),
    *zip(ops.TRITON, _RULES, strict=True),
    (ops.channel_moments, _looped),
    (ops.d2_block, _looped),
    (ops.d2_block_backward, _looped),
):
    torch.library.register_vmap(_op, functools.partial(_rule, _op), lib=ops.library)
