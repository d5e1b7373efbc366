"""The budget holds, and notices what exceeds it; bounds by hand."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from benchmarks.shapes import Shape

from . import report, toolchain
from .bounds import GPUS, bounds, composition_bytes, compulsory_bytes, ideal, useful_macs
from .counters import Counters, InstructionCount, Traffic
from .cuda_program import CSRC

needs_compilers = pytest.mark.skipif(
    bool(toolchain.why_no_nvcc() or toolchain.why_no_engine()),
    reason=str(toolchain.why_no_nvcc() or toolchain.why_no_engine()),
)
LAYER = Shape((3, 2), (1, 4), 6, 4, 8, {})
BUDGET = json.loads(report.BUDGET.read_text())


def test_shapes_by_hand() -> None:
    """4 x 8 pixels: dilation 1 sees 4 + 2 * 3 rows of taps, dilation 4 only the middle one."""
    assert useful_macs(LAYER) == 6 * (3 * (4 + 6) * (8 + 14) + 2 * 4 * (8 + 8))
    assert compulsory_bytes(LAYER, 2) == 2 * (5 * 32 + 6 * 32 + 9 * 5 * 6) + 4 * (10 + 6)
    assert composition_bytes(LAYER, 2) == 2 * (32 * (3 * 5 + 2 * 6 + 3 * 6) + 9 * 5 * 6)


def test_bounds_by_hand() -> None:
    a100 = GPUS[0]
    nothing = Traffic()
    counters = Counters(
        (
            InstructionCount(1, "mma.sync", "mma.m16n8k16.bf16", 1000, nothing, nothing),
            InstructionCount(2, "ld.global", "ld.u32.4", 8, Traffic(8, 64, 32, 1024), nothing),
            InstructionCount(3, "ld.shared", "ld.u32.4", 8, nothing, Traffic(8, 16, 8, 1024)),
        )
    )
    times = bounds(counters, a100, dram_bytes=2039)
    assert times["tensor"] == pytest.approx(2 * 1000 * 2048 / 312e3)
    assert times["shared"] == pytest.approx((16 + 1024 / 128) / (108 * 1.41))
    assert times["issue"] == pytest.approx(1016 / 4 / (108 * 1.41))
    assert times["L2"] == pytest.approx(64 / 2 / (108 * 1.41))
    assert times["DRAM"] == pytest.approx(1)
    assert ideal(LAYER, "bf16", 2, a100) == pytest.approx(compulsory_bytes(LAYER, 2) / 2039)


@pytest.mark.parametrize(("a", "read"), [("%rd1", 64 * 16 + 16 * 40), ("{%r1, %r2}", 16 * 40)])
def test_bounds_of_wgmma_by_hand(a: str, read: int) -> None:
    """Ten of a warpgroup: four warps issue each, which reads its operands once for all of them."""
    h100, nothing = GPUS[1], Traffic()
    text = (
        f"wgmma.mma_async.sync.aligned.m64n40k16.f32.bf16.bf16 {{%r3, %r4}}, {a}, %rd2, %p1, 1, 1;"
    )
    counters = Counters((InstructionCount(1, text, "wgmma", 40, nothing, nothing),))
    times = bounds(counters, h100, dram_bytes=0)
    assert times["tensor"] == pytest.approx(2 * 10 * 64 * 40 * 16 / 989e3)
    assert times["shared"] == pytest.approx(10 * 2 * read / 128 / (132 * 1.83))


def test_an_exceeded_budget_is_named() -> None:
    figures = toolchain.Resources(registers=64, spill_stores=0, spill_loads=0, stack=0, shared=0)
    budget = {"static": {"k": {"sm_80": asdict(figures)}}, "counted": {"case": {"sectors": 1.0}}}
    assert report.exceeded(budget, {"k": {"sm_80": figures}}, {"case": {"sectors": 1.0}}) == []
    spilling = replace(figures, spill_loads=8)
    problems = report.exceeded(budget, {"k": {"sm_80": spilling}}, {"case": {"sectors": 1.01}})
    assert problems == [
        "k sm_80: spill_loads 8, budget 0",
        "case: sectors 1.01, budget 1.0",
    ]
    missing = report.exceeded(budget, {"unheard_of": {"sm_80": figures}}, {"new case": {}})
    assert missing == ["unheard_of sm_80: no budget", "new case: no budget"]


@needs_compilers
def test_small_kernels_are_within_their_budget() -> None:
    ptx = toolchain.compile_ptx(CSRC / "cuda" / "common.cu", "sm_80", includes=[CSRC])
    static = {name: {"sm_80": r} for name, r in toolchain.resources(ptx, "sm_80").items()}
    assert static
    assert report.exceeded(BUDGET, static, {}) == []


@needs_compilers
@pytest.mark.slow
@pytest.mark.parametrize("case", report.CASES, ids=lambda case: f"{case.name}-{case.operation}")
def test_case_is_within_its_budget(case: report.Case) -> None:
    figures = {f"cuda {case}": report.counted_figures(case, report.cuda_family(case))}
    assert report.exceeded(BUDGET, {}, figures) == []
