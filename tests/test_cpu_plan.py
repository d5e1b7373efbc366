"""How a D2 block convolves one source: the rules that the plan follows on every instruction set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import d3net_kernels as dk
from d3net_kernels.precision import PRECISIONS

pytestmark = pytest.mark.skipif(
    dk.why_not("cpu") is not None, reason=f"no cpu backend: {dk.why_not('cpu')}"
)

SHAPES = [  # in, out, height, width, dilation
    (144, 144, 128, 256, 1),
    (36, 36, 128, 256, 8),
    (256, 256, 16, 32, 1),
    (64, 64, 16, 32, 8),
    (32, 104, 256, 1600, 1),
    (17, 17, 16, 100, 64),
    (1, 1, 1, 1, 1),
]


def _plan(shape: tuple[int, ...], precision: str = "highest", exact: bool = False) -> str:
    channels, outs, height, width, dilation = shape
    return torch.ops.d3net_kernels.cpu_plan(
        1, channels, outs, height, width, dilation, PRECISIONS[precision], exact
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_precision_permits(shape: tuple[int, ...]) -> None:
    """Full float32 keeps to the transforms that err no more than direct sums; float64 to those."""
    assert "F(4x4" not in _plan(shape)
    assert _plan(shape, exact=True).startswith("direct")
    assert "bfloat16" not in _plan(shape, "high")
    assert "bfloat16" not in _plan(shape, "medium", exact=True)


def test_large_maps_are_transformed() -> None:
    assert _plan(SHAPES[0]).startswith("winograd F(2x2, 3x3)")
    assert _plan(SHAPES[0], "high").startswith("winograd F(4x4, 3x3)")


def test_dead_taps_decide_for_direct_sums() -> None:
    """Dilation 64 on 16 rows: three taps of nine are alive, a transform would compute all."""
    assert _plan(SHAPES[5], "high").startswith("direct")


def test_products_of_bfloat16_where_they_pay(isa: str) -> None:
    """A matrix unit beats any transform; two products at once only where few taps are alive."""
    large, few = SHAPES[0], (64, 64, 16, 100, 64)
    medium = [_plan(large, "medium"), _plan(few, "medium")]
    high = [_plan(large, "high"), _plan(few, "high")]
    if isa == "amx":
        words = "direct in pairs of bfloat16 by the matrix unit"
        assert all(plan.startswith(words) for plan in medium)
    elif isa == "avx512" and "avx512_bf16" in _cpu_flags():
        assert medium[0] == high[0]
        assert medium[1].startswith("direct in pairs of bfloat16, ")
    else:
        assert medium == high


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    return set(path.read_text().split()) if path.exists() else set()


def test_small_maps_are_cut_finer() -> None:
    assert _plan(SHAPES[0]).endswith("24 tiles a task")
    assert _plan(SHAPES[2], "high").endswith("shares")
    assert _plan(SHAPES[6]).endswith("12 tiles a task")


def test_threads_do_not_matter() -> None:
    """The same plan gives the same bits for any number of them."""
    threads = torch.get_num_threads()
    plans = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            plans.append([_plan(shape, "high") for shape in SHAPES])
    finally:
        torch.set_num_threads(threads)
    assert plans[0] == plans[1] == plans[2]


def test_bad_sizes() -> None:
    with pytest.raises(RuntimeError, match="cpu_plan: sizes and dilation must be positive"):
        _plan((0, 1, 1, 1, 1))
