"""The budget holds, and notices what exceeds it; bounds by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import Shape

from . import report, static, toolchain
from .bounds import GPUS, bounds, composition_bytes, compulsory_bytes, ideal, useful_macs
from .counters import Counters, InstructionCount, Traffic
from .machine_code import why_no_nvdisasm

needs_compilers = pytest.mark.skipif(
    bool(toolchain.why_no_nvcc() or toolchain.why_no_engine()),
    reason=str(toolchain.why_no_nvcc() or toolchain.why_no_engine()),
)
LAYER = Shape((3, 2), (1, 4), 6, 4, 8, {})
BUDGET = json.loads(report.BUDGET.read_text())


def test_shapes_by_hand() -> None:
    """4 x 8 pixels: dilation 1 sees 4 + 2 * 3 rows of taps, dilation 4 only the middle one."""
    assert useful_macs(LAYER) == 6 * (3 * (4 + 6) * (8 + 14) + 2 * 4 * (8 + 8))
    weights, output = 9 * 5 * 6, 6 * 32
    for operation, maps, vectors in (
        ("forward", 5 * 32 + output, 10 + 6),
        ("backward_data", 2 * 5 * 32 + output, 20),
        ("backward_weight", 5 * 32 + output, 10 + 6),
    ):
        expected = 2 * (maps + weights) + 4 * vectors
        assert compulsory_bytes(LAYER, operation, 2) == expected
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
    times = bounds(counters, a100, dram_bytes=2039, issued=counters.issued())
    assert times["tensor"] == pytest.approx(2 * 1000 * 2048 / 312e3)
    assert times["shared"] == pytest.approx((16 + 1024 / 128) / (108 * 1.41))
    assert times["issue"] == pytest.approx(1016 / 4 / (108 * 1.41))
    assert times["L2"] == pytest.approx(64 / 2 / (108 * 1.41))
    assert times["DRAM"] == pytest.approx(1)
    least = compulsory_bytes(LAYER, "forward", 2) / 2039
    assert ideal(LAYER, "forward", "bf16", 2, a100) == pytest.approx(least)


@pytest.mark.parametrize(("a", "read"), [("%rd1", 64 * 16 + 16 * 40), ("{%r1, %r2}", 16 * 40)])
def test_bounds_of_wgmma_by_hand(a: str, read: int) -> None:
    """Ten of a warpgroup: four warps issue each, which reads its operands once for all of them."""
    h100, nothing = GPUS[1], Traffic()
    text = (
        f"wgmma.mma_async.sync.aligned.m64n40k16.f32.bf16.bf16 {{%r3, %r4}}, {a}, %rd2, %p1, 1, 1;"
    )
    counters = Counters((InstructionCount(1, text, "wgmma", 40, nothing, nothing),))
    times = bounds(counters, h100, dram_bytes=0, issued=40)
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


def test_a_spilling_kernel_is_named() -> None:
    figures = toolchain.Resources(registers=255, spill_stores=8, spill_loads=4, stack=16, shared=0)
    assert static.spilling({"k": {"sm_90": figures}}) == ["k sm_90: 12 bytes spilled, stack 16"]
    clean = replace(figures, spill_stores=0, spill_loads=0, stack=0)
    assert static.spilling({"k": {"sm_90": clean}}) == []


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "arch", "blocks"),
    [
        (255, 128, 0, "sm_80", 2),  # registers
        (32, 128, 80 << 10, "sm_80", 2),  # shared memory
        (32, 128, 80 << 10, "sm_89", 1),
        (32, 512, 0, "sm_89", 3),  # threads
        (16, 32, 0, "sm_80", 32),  # blocks
    ],
)
def test_occupancy_by_hand(
    registers: int, threads: int, shared: int, arch: str, blocks: int
) -> None:
    figures = toolchain.Resources(registers, spill_stores=0, spill_loads=0, stack=0, shared=0)
    assert static.blocks_an_sm(figures, threads, shared, arch) == blocks


@pytest.mark.skipif(
    shutil.which(toolchain.host_compiler()) is None, reason="no C++ compiler for the host program"
)
def test_the_budget_holds_every_kernel_and_case() -> None:
    """In it: every kernel of the host program on both architectures, without spills."""
    sizes = static.launch_sizes()
    assert set(BUDGET["static"]) == set(sizes)
    for kernel, by_arch in BUDGET["static"].items():
        assert set(by_arch) == set(static.ARCHS), kernel
        figures = {arch: toolchain.Resources(**f) for arch, f in by_arch.items()}
        assert static.spilling({kernel: figures}) == []
        for arch, f in figures.items():
            assert static.blocks_an_sm(f, *sizes[kernel], arch) >= 2, f"{kernel} {arch}"
    cases = {f"cuda {case.name} {case.operation}" for case in report.CASES}
    assert cases <= set(BUDGET["counted"])


def test_only_what_a_gpu_runs_is_its_best() -> None:
    pytest.importorskip("triton", reason="pip install triton")
    ran = {
        gpu.name: [name for name in report.families() if report.runs_on(name, gpu)] for gpu in GPUS
    }
    sm_80, sm_90 = ["cuda", "triton sm_80"], ["cuda", "triton sm_90"]
    assert ran == {"A100": sm_80, "H100": sm_90, "RTX 4090": sm_80}
    case = report.CASES[0]
    counted = {
        f"{name} {case}": {
            f"bound of machine code / ideal bound {gpu.name}": 2.0
            for gpu in GPUS
            if report.runs_on(name, gpu)
        }
        for name in ("triton sm_80", "triton sm_90")
    }
    rows = report.side_by_side(counted).splitlines()[1 : 1 + len(GPUS)]
    assert [row.split("  ")[-1] for row in rows] == [ran[gpu.name][1] for gpu in GPUS]


def test_the_saved_table_is_that_of_the_budget() -> None:
    pytest.importorskip("triton", reason="pip install triton")
    saved = report.TABLE.read_text()
    assert saved.startswith(report.saved_table("", ()).split("```")[0])
    at = saved.index("ideal / counted bound  ")
    assert saved[at:] == report.side_by_side(BUDGET["counted"]) + "\n```\n"


QUICK = ("common", "tensor_2x8_bfloat16", "tensor_weight_bfloat16")


@needs_compilers
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
        for path in static.kernel_sources()
    ],
)
def test_kernels_are_within_their_budget(source: Path) -> None:
    archs = static.ARCHS[:1] if source.stem in QUICK else static.ARCHS
    figures = static.static_figures(archs, [source])
    assert figures
    assert static.spilling(figures) == []
    assert report.exceeded(BUDGET, figures, {}) == []


@needs_compilers
@pytest.mark.slow
@pytest.mark.parametrize("arch", static.LATER_ARCHS)
def test_no_kernel_spills_on_later_gpus(arch: str) -> None:
    assert static.spilling(static.static_figures([arch])) == []


@needs_compilers
@pytest.mark.parametrize(
    "case",
    [  # of channels_last maps the most instructions are executed
        pytest.param(
            case,
            id=f"{case.name}-{case.operation}",
            marks=pytest.mark.slow if case.memory_format == torch.channels_last else (),
        )
        for case in report.CASES
    ],
)
def test_case_is_within_its_budget(case: report.Case) -> None:
    figures = {f"cuda {case}": report.counted_figures(case, report.cuda_family(case))}
    assert report.exceeded(BUDGET, {}, figures) == []


@needs_compilers
@pytest.mark.skipif(bool(why_no_nvdisasm()), reason=str(why_no_nvdisasm()))
@pytest.mark.parametrize(
    "case",
    [  # all others take minutes of ptxas
        pytest.param(
            case,
            id=f"{case.name}-{case.operation}",
            marks=() if str(case) == "vocals backward_weight" else pytest.mark.slow,
        )
        for case in report.CASES
    ],
)
def test_machine_code_is_within_its_budget(case: report.Case) -> None:
    """As the ptxas of CUDA 13.0 makes it."""
    figures = report.machine_figures("cuda", case, report.cuda_family(case))
    assert len(figures) == 2 * len(GPUS)
    assert report.exceeded(BUDGET, {}, {f"cuda {case}": figures}) == []


@needs_compilers
@pytest.mark.slow
@pytest.mark.parametrize("case", report.CASES, ids=lambda case: f"{case.name}-{case.operation}")
@pytest.mark.parametrize("arch", static.ARCHS)
def test_triton_is_within_its_budget(case: report.Case, arch: str) -> None:
    """As the installed version compiles it; the budget is that of triton 3.8."""
    pytest.importorskip("triton", reason="pip install triton")
    family = f"triton {arch}"
    if not report.can_count(family, case):
        pytest.skip(reason="the machine has no wgmma in TF32")
    launched = report.families()[family](case)
    assert report.spilled(launched) == []
    counted = {f"{family} {case}": report.counted_figures(case, launched)}
    assert report.exceeded(BUDGET, {}, counted) == []
