"""How accurate a backend must be: one rule for the tests, for `verify` and for every backend.

A result may differ from the float64 truth by what the plain torch composition in the same dtype
differs at most, plus what rounding explains: one rounding of the result and a few roundings of the
accumulator, in proportion to the sum of the absolute values of the terms. Where float32 may be
rounded to TF32 for products, that much of both factors comes on top. Nothing is tuned by hand to a
case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import reference

_ACCUMULATOR_ROUNDINGS = 4
_TF32_EPS = 2.0**-10


@dataclass(frozen=True)
class Problem:
    """Arguments of one call of the op, and the gradient that comes back to its result."""

    inputs: list[Tensor]
    weight: Tensor
    bias: Tensor | None
    dilations: list[tuple[int, int]]
    scale: Tensor | None
    shift: Tensor | None
    relu: bool
    grad_output: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The differentiable arguments by name."""
        named: dict[str, Tensor | None] = {f"inputs[{i}]": x for i, x in enumerate(self.inputs)}
        named |= {name: getattr(self, name) for name in ("weight", "bias", "scale", "shift")}
        return {name: t for name, t in named.items() if t is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """The problem with every tensor changed; the same ones require a gradient."""

        def changed(t: Tensor) -> Tensor:
            return change(t.detach()).detach().requires_grad_(t.requires_grad)

        return replace(
            self,
            inputs=[changed(x) for x in self.inputs],
            weight=changed(self.weight),
            bias=None if self.bias is None else changed(self.bias),
            scale=None if self.scale is None else changed(self.scale),
            shift=None if self.shift is None else changed(self.shift),
            grad_output=changed(self.grad_output),
        )


def random_problem(
    channels: Sequence[int],
    out_channels: int,
    size: tuple[int, int, int],
    *,
    generator: torch.Generator,
    kernel: tuple[int, int] = (3, 3),
    dilations: Sequence[int | tuple[int, int]] | None = None,
    dtype: torch.dtype = torch.float32,
    psi_dtype: torch.dtype | None = None,
    bias: bool = True,
    relu: bool = True,
) -> Problem:
    """A problem of random numbers; every tensor requires a gradient.

    `size` is (N, H, W); `psi_dtype` is the dtype of scale and shift, None for neither. Inputs keep
    away from the kink of the ReLU, where one rounding decides about the whole gradient.
    """

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    n, h, w = size
    total = sum(channels)
    inputs = [normal(n, c, h, w) for c in channels]
    scale = shift = None
    if psi_dtype is not None:
        scale, shift = normal(total, dtype=psi_dtype), normal(total, dtype=psi_dtype)
        start = 0
        for i, x in enumerate(inputs):
            group = slice(start, start := start + x.shape[1])
            inputs[i] = _away_from_kink(x, scale[group], shift[group])
    given = dilations or [1 << i for i in range(len(channels))]
    problem = Problem(
        inputs=inputs,
        weight=normal(out_channels, total, *kernel),
        bias=normal(out_channels) if bias else None,
        dilations=[(d, d) if isinstance(d, int) else d for d in given],
        scale=scale,
        shift=shift,
        relu=relu,
        grad_output=normal(n, out_channels, h, w),
    )
    for t in problem.tensors().values():
        t.requires_grad_()
    return problem


def results_of(operation: Callable[..., Tensor], problem: Problem) -> dict[str, Tensor]:
    """The output of `operation` and the gradients of what requires one, by name."""
    out = operation(
        problem.inputs,
        problem.weight,
        problem.bias,
        dilations=problem.dilations,
        scale=problem.scale,
        shift=problem.shift,
        relu=problem.relu,
    )
    results = {"out": out.detach()}
    needed = {name: t for name, t in problem.tensors().items() if t.requires_grad}
    if needed:
        grads = torch.autograd.grad(out, list(needed.values()), problem.grad_output)
        results |= {f"grad {name}": g for name, g in zip(needed, grads, strict=True)}
    return results


def error_ratios(
    problem: Problem, results: dict[str, Tensor], *, tf32: bool = False
) -> dict[str, float]:
    """Largest error of each result over what is allowed there; up to 1 is right.

    Where the truth is NaN or infinite the result must be the same, and only there.
    """
    truth = results_of(reference.multidilated_conv2d, problem.map(Tensor.double))
    same_dtype = results_of(reference.multidilated_conv2d, problem)
    magnitudes = replace(problem.map(lambda t: t.double().abs()), relu=False)
    magnitude = results_of(reference.multidilated_conv2d, magnitudes)
    return _ratios(results, truth, same_dtype, magnitude, _TF32_EPS if tf32 else 0)


def moments_error_ratios(out: Tensor, mean: Tensor, var: Tensor) -> dict[str, float]:
    """The same of mean and biased variance per channel of `out`, by the same rule.

    The distances from a mean that is off by d sum up to a variance that is off by d squared.
    """
    values = out.double()
    center = values.mean((0, 2, 3))
    distances = values - center[:, None, None]
    rest = distances.mean((0, 2, 3))  # what rounding left of the mean
    truth = {"mean": center + rest, "var": distances.square().mean((0, 2, 3)) - rest.square()}
    same_var, same_mean = torch.var_mean(out.to(mean.dtype), (0, 2, 3), correction=0)
    # Float64 has no wider type to add up in: n roundings of either sign come to sqrt(n) of them.
    steps = (out.numel() // mean.numel()) ** 0.5 if mean.dtype == torch.float64 else 1.0
    of_mean = steps * values.abs().mean((0, 2, 3))
    roundings = _ACCUMULATOR_ROUNDINGS * torch.finfo(mean.dtype).eps
    magnitude = {"mean": of_mean, "var": steps * truth["var"] + roundings * of_mean.square()}
    return _ratios(
        {"mean": mean, "var": var}, truth, {"mean": same_mean, "var": same_var}, magnitude
    )


def _ratios(
    results: dict[str, Tensor],
    truth: dict[str, Tensor],
    same_dtype: dict[str, Tensor],
    magnitude: dict[str, Tensor],
    factor_eps: float = 0,
) -> dict[str, float]:
    """Errors over what is allowed, by the errors of plain torch in the `same_dtype` and by the sums
    of absolute values of the terms, both factors of which may have been rounded by factor_eps."""
    ratios = {}
    for name, expected in truth.items():
        result = results[name]
        accumulator = torch.float64 if result.dtype == torch.float64 else torch.float32
        rounding = (
            torch.finfo(result.dtype).eps * expected.abs()
            + _ACCUMULATOR_ROUNDINGS * torch.finfo(accumulator).eps * magnitude[name]
        )
        if factor_eps:  # not 0 times an infinity
            rounding += 2 * factor_eps * magnitude[name]
        composition = _distance(same_dtype[name], expected)
        composition = composition[composition.isfinite()]
        allowed = rounding + (composition.max() if composition.numel() else 0)
        ratio = _distance(result, expected) / allowed.clamp_min(torch.finfo(torch.float64).tiny)
        # Where the truth is not finite neither is `allowed`; there the distance alone decides.
        ratio = torch.where(expected.isfinite(), ratio, _distance(result, expected))
        ratios[name] = ratio.max().item() if ratio.numel() else 0.0
    return ratios


def _distance(result: Tensor, expected: Tensor) -> Tensor:
    """|result - expected|; 0 for equal infinities and for two NaNs, infinite for one NaN."""
    result = result.double()
    same = (result == expected) | (result.isnan() & expected.isnan())
    distance = (result - expected).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return distance.masked_fill(same, 0)


def _away_from_kink(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x` with those entries moved whose sign of x * scale + shift hangs on rounding."""
    factor, summand = scale.double()[:, None, None], shift.double()[:, None, None]
    while True:
        product = x.double() * factor
        rounding = 4 * torch.finfo(x.dtype).eps * (product.abs() + summand.abs())
        near = (product + summand).abs() <= rounding
        if not near.any():
            return x
        x = torch.where(near, (x.abs() * 2 + 0.25).to(x.dtype), x)
