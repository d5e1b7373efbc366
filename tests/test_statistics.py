"""Mean and variance per channel: layouts, dtypes, derivatives, the same bits for any threads."""

from __future__ import annotations

import grid
import numpy as np
import pytest
import torch
from torch import Tensor

from d3net_kernels import ops
from d3net_kernels.statistics import batch_statistics

pytestmark = pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SIZES = (
    (2, 3, 9, 11),
    (1, 1, 1, 1),
    (1, 37, 5, 40),
    (3, 20, 1, 7),
    (2, 5, 33, 1),
    (1, 16, 64, 64),
)


def _random(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal numbers far from zero, where a careless variance cancels."""
    return (torch.randn(size, generator=generator, dtype=torch.float64) + 10).to(dtype)


def _exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance in extended precision, rounded to float64 at the end."""
    values = x.double().numpy().astype(np.longdouble)
    mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3))
    return torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(var.astype(np.float64))


@pytest.mark.parametrize("layout", list(grid.LAYOUTS))
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("size", _SIZES, ids=str)
def test_right(
    size: tuple[int, ...], dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    x = grid.LAYOUTS[layout](_random(size, dtype, generator))
    mean, var = ops.channel_moments(x)
    expected_mean, expected_var = _exact(x)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert mean.dtype == var.dtype == kept
    eps = torch.finfo(kept).eps
    # Both sums are made in double.
    summing = 64 * torch.finfo(torch.float64).eps
    assert ((mean - expected_mean).abs() <= (eps + summing) * expected_mean.abs()).all()
    spread = (x.double() - expected_mean[:, None, None]).abs().amax((0, 2, 3))
    assert ((var - expected_var).abs() <= eps * expected_var + summing * spread.square()).all()


def test_large_mean_does_not_cancel(generator: torch.Generator) -> None:
    noise = torch.randn((2, 3, 40, 50), generator=generator, dtype=torch.float64)
    _, var = ops.channel_moments(noise + 1e9)
    expected = (noise + 1e9 - 1e9).var((0, 2, 3), correction=0)
    torch.testing.assert_close(var, expected)


def test_not_a_number_stays_in_its_channel(generator: torch.Generator) -> None:
    x = _random((2, 3, 4, 5), torch.float32, generator)
    x[0, 1, 2, 3] = torch.nan
    x[1, 2, 0, 0] = torch.inf
    mean, var = ops.channel_moments(x)
    assert mean.isnan().tolist() == [False, True, False]
    assert mean[2] == torch.inf
    assert var.isnan().tolist() == [False, True, True]


def test_nothing_to_average() -> None:
    mean, var = ops.channel_moments(torch.empty(0, 3, 4, 5))
    assert mean.isnan().all()
    assert var.isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_for_any_threads(layout: str, generator: torch.Generator) -> None:
    x = grid.LAYOUTS[layout](_random((2, 19, 33, 70), torch.float32, generator))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.stack(ops.channel_moments(x)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_derivatives(generator: torch.Generator) -> None:
    x = torch.randn((2, 3, 4, 5), generator=generator, dtype=torch.float64).requires_grad_()

    def mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
        return batch_statistics(x)[:2]

    assert torch.autograd.gradcheck(mean_and_variance, (x,))
    assert torch.autograd.gradgradcheck(mean_and_variance, (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_is_not_rounded_on_the_way(dtype: torch.dtype, generator: torch.Generator) -> None:
    """The gradient of 16-bit sources: right but for its own rounding."""
    x = _random((2, 3, 8, 9), dtype, generator).requires_grad_()
    weights = torch.randn(2, 3, generator=generator)

    def loss(x: Tensor) -> Tensor:
        mean, var, _ = batch_statistics(x)
        return (weights[0] * mean + weights[1] * var).sum()

    (grad,) = torch.autograd.grad(loss(x), x)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(loss(exact), exact)
    rounding = torch.finfo(dtype).eps * expected.abs() + 1e-6 * expected.abs().max()
    assert ((grad - expected).abs() <= rounding).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout: str, generator: torch.Generator) -> None:
    x = grid.LAYOUTS[layout](_random((2, 3, 4, 5), torch.float32, generator))
    torch.library.opcheck(ops.channel_moments, (x,))


def test_vmap(generator: torch.Generator) -> None:
    x = _random((4, 2, 3, 5, 6), torch.float32, generator)
    mean, var = torch.vmap(ops.channel_moments)(x)
    for i in range(4):
        expected = ops.channel_moments(x[i])
        assert torch.equal(mean[i], expected[0])
        assert torch.equal(var[i], expected[1])
