"""What the kernels need and do, without a GPU, against a checked-in budget.

    python -m tests.gpu.report            table of everything, and what exceeds the budget
    python -m tests.gpu.report --update   makes the present figures the budget

"static" figures come from ptxas, "counted" ones from emulated PTX. Nothing here is measured.
A family of kernels joins by an entry in FAMILIES.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import Shape, load_shapes
from d3net_kernels import numerics

from .bounds import GPUS, bounds, composition_bytes, compulsory_bytes, ideal
from .counters import Counters
from .cuda_program import CSRC, Executed, Program
from .toolchain import Resources, compile_ptx, resources

BUDGET = Path(__file__).with_name("budget.json")
ARCHS = ("sm_80", "sm_90")
_ELEMENT_BYTES = 2
_SHARED_BYTES = {"sm_80": 164 << 10, "sm_90": 228 << 10}  # of an SM
_RESERVED_SHARED = 1 << 10  # of a block, by the system


@dataclass(frozen=True)
class Case:
    """A layer of D3Net in bfloat16 with psi, cut to `size` (H, W), and one of its operations."""

    name: str
    layer: str
    size: tuple[int, int]
    operation: str

    @property
    def shape(self) -> Shape:
        """The layer of shapes.json, cut."""
        (found,) = (s for s in load_shapes() if str(s) == self.layer)
        return replace(found, height=self.size[0], width=self.size[1])


_S = "144+36+36+36->36 128x256"
_VOCALS = "13+13+13+13->13 256x1600"
_SMALL = "16+34+34+34+34+34+34+34->34 16x100"
CASES = (
    Case("S", _S, (32, 128), "forward"),
    Case("vocals", _VOCALS, (32, 256), "forward"),
    Case("small", _SMALL, (16, 100), "forward"),
    Case("S", _S, (32, 128), "backward_data"),
    Case("vocals", _VOCALS, (32, 256), "backward_data"),
    Case("small", _SMALL, (16, 100), "backward_data"),
    Case("S", _S, (32, 128), "backward_weight"),
    Case("vocals", _VOCALS, (32, 256), "backward_weight"),
    Case("small", _SMALL, (16, 100), "backward_weight"),
)


@dataclass(frozen=True)
class Launched:
    """One kernel of a case: its launch and what it did."""

    kernel: str
    threads: int
    dynamic_shared: int
    counters: Counters


class _Recording(Executed):
    """Keeps how kernels are launched."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: dict[str, tuple[int, int]] = {}

    def __call__(
        self,
        kernel: str,
        blocks: int,
        threads: int,
        shared: int,
        arguments: bytes,
        buffers: Mapping[str, Tensor],
    ) -> None:
        self.launches[kernel] = threads, shared
        super().__call__(kernel, blocks, threads, shared, arguments, buffers)


def cuda_family(case: Case) -> Launched:
    """The convolution kernel that csrc/cuda launches for a case."""
    shape = case.shape
    problem = numerics.random_problem(
        shape.group_channels,
        shape.c_out,
        (1, *case.size),
        generator=torch.Generator().manual_seed(0),
        dilations=shape.dilations,
        dtype=torch.bfloat16,
        psi_dtype=torch.float32,
    )
    wanted = {
        "forward": (),
        "backward_data": ("inputs", "scale", "shift"),
        "backward_weight": ("weight", "bias"),
    }[case.operation]
    for name, t in problem.tensors().items():
        t.requires_grad_(name.split("[")[0] in wanted)
    launch = _Recording()
    Program(launch).results(problem, moments=case.operation == "forward")
    part = case.operation.removeprefix("backward_")
    (kernel,) = (
        name for name in launch.counters if name.startswith(("tensor_", "direct_")) and part in name
    )
    return Launched(kernel, *launch.launches[kernel], launch.counters[kernel])


Static = Mapping[str, Mapping[str, Resources]]
"""Resources by kernel and architecture."""

FAMILIES: dict[str, Callable[[Case], Launched]] = {"cuda": cuda_family}
"""What executes a case, by name of the backend."""


def static_figures(archs: Iterable[str] = ARCHS) -> dict[str, dict[str, Resources]]:
    """Resources of every kernel of csrc/cuda: by kernel and architecture."""
    found: dict[str, dict[str, Resources]] = {}
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        for arch in archs:
            ptx = compile_ptx(source, arch, includes=[CSRC])
            if ".entry" in ptx:
                for kernel, figures in resources(ptx, arch).items():
                    found.setdefault(kernel, {})[arch] = figures
    return found


def counted_figures(case: Case, launched: Launched) -> dict[str, float]:
    """What the budget holds for a case; ratios are to the ideal, 1 is best (and most, for mma)."""
    counters, shape = launched.counters, case.shape
    shared, through_l2 = counters.shared_traffic, counters.global_traffic
    figures = {
        "distinct / compulsory bytes": counters.distinct_bytes
        / compulsory_bytes(shape, case.operation, _ELEMENT_BYTES),
        "sectors / ideal": through_l2.units / max(1, through_l2.ideal),
        "wavefronts / ideal": shared.units / max(1, shared.ideal),
        "instructions a pixel": counters.issued() / (shape.height * shape.width),
    }
    for gpu in GPUS:
        compulsory = compulsory_bytes(shape, case.operation, _ELEMENT_BYTES)
        bound = max(bounds(counters, gpu, compulsory).values())
        figures[f"bound / ideal bound {gpu.name}"] = bound / ideal(
            shape, case.operation, "bf16", _ELEMENT_BYTES, gpu
        )
    return {name: round(value, 4) for name, value in figures.items()}


def blocks_an_sm(figures: Resources, launched: Launched, arch: str) -> int:
    """Blocks of a kernel that fit on an SM: by registers, shared memory and threads."""
    registers = (figures.registers + 7) // 8 * 8 * launched.threads
    shared = figures.shared + launched.dynamic_shared + _RESERVED_SHARED
    return min(65536 // registers, _SHARED_BYTES[arch] // shared, 2048 // launched.threads, 32)


def exceeded(
    budget: Mapping[str, Any],
    static: Static,
    counted: Mapping[str, Mapping[str, float]],
) -> list[str]:
    """Every figure above its budget, and every kernel or case without one."""
    problems = []
    for kernel, by_arch in static.items():
        for arch, figures in by_arch.items():
            allowed = budget["static"].get(kernel, {}).get(arch)
            if allowed is None:
                problems.append(f"{kernel} {arch}: no budget")
                continue
            for name, value in asdict(figures).items():
                if value > allowed[name]:
                    problems.append(f"{kernel} {arch}: {name} {value}, budget {allowed[name]}")
    for case, by_name in counted.items():
        allowed = budget["counted"].get(case)
        if allowed is None:
            problems.append(f"{case}: no budget")
            continue
        for name, value in by_name.items():
            if value > allowed[name] + 1e-4:
                problems.append(f"{case}: {name} {value}, budget {allowed[name]}")
    return problems


def static_table(static: Static) -> str:
    """Registers, spills, stack and static shared memory by kernel and architecture."""
    lines = ["static, from ptxas: registers / spilled bytes / stack / shared", ""]
    width = max(len(kernel) for kernel in static)
    for kernel, by_arch in sorted(static.items()):
        cells = [
            f"{arch} {f.registers:4} {f.spill_stores + f.spill_loads:4} {f.stack:4} {f.shared:6}"
            for arch, f in by_arch.items()
        ]
        lines.append(f"{kernel:{width}}  " + "   ".join(cells))
    return "\n".join(lines)


def case_table(case: Case, launched: Launched, static: Static) -> str:
    """One case: its figures, its bounds on every GPU, and what plain torch would move."""
    counters, shape = launched.counters, case.shape
    pixels = shape.height * shape.width
    compulsory = compulsory_bytes(shape, case.operation, _ELEMENT_BYTES)
    figures = counted_figures(case, launched)
    kinds = counters.by_kind()
    lines = [
        f"{case.name}, {case.operation}: {shape} ({launched.kernel})",
        "  counted on emulated PTX: "
        + ", ".join(f"{name} {figures[name]:.3f}" for name in list(figures)[:4]),
        f"  mma {100 * kinds.get('mma', 0) / counters.issued():.1f} % of warp instructions; "
        f"bytes a pixel: {counters.distinct_bytes / pixels:.0f} distinct, "
        f"{compulsory / pixels:.0f} compulsory, "
        f"{composition_bytes(shape, _ELEMENT_BYTES) / pixels:.0f} in unfused torch (from shapes)",
    ]
    fits = [
        f"{arch} {blocks_an_sm(by_arch[arch], launched, arch)}"
        for arch in ARCHS
        if arch in (by_arch := static.get(launched.kernel, {}))
    ]
    if fits:
        lines.append(
            f"  dynamic shared {launched.dynamic_shared} B; blocks an SM: {', '.join(fits)}"
        )
    for gpu in GPUS:
        times = bounds(counters, gpu, compulsory)
        least = ideal(shape, case.operation, "bf16", _ELEMENT_BYTES, gpu)
        binding = max(times, key=lambda name: times[name])
        detail = ", ".join(f"{name} {t / pixels:.4f}" for name, t in times.items())
        lines.append(
            f"  {gpu.name:8} ideal / counted bound {least / times[binding]:.2f} ({binding} binds); "
            f"ns a pixel: ideal {least / pixels:.4f}, {detail}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--update", action="store_true", help="make these figures the budget")
    arguments = parser.parse_args()
    static = static_figures()
    print(static_table(static), flush=True)
    counted = {}
    for family, execute in FAMILIES.items():
        for case in CASES:
            launched = execute(case)
            counted[f"{family} {case.name} {case.operation}"] = counted_figures(case, launched)
            print("\n" + case_table(case, launched, static), flush=True)
    if arguments.update:
        budget = {
            "static": {
                kernel: {arch: asdict(f) for arch, f in by_arch.items()}
                for kernel, by_arch in sorted(static.items())
            },
            "counted": counted,
        }
        BUDGET.write_text(json.dumps(budget, indent=1) + "\n")
        return 0
    problems = exceeded(json.loads(BUDGET.read_text()), static, counted)
    print("\n" + ("\n".join(problems) if problems else "Everything is within the budget."))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
