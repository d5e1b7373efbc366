"""What the kernels need and do, without a GPU, against a checked-in budget.

    python -m tests.gpu.report                table of everything, and what exceeds the budget
    python -m tests.gpu.report --update       makes that the budget, and the saved table
    python -m tests.gpu.report --later-archs  static figures of more architectures
    python -m tests.gpu.report --family "triton sm_80"  only these

"static" figures come from ptxas, "counted" ones from emulated PTX. Nothing here is measured.
A family of kernels joins by an entry in families().
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import Shape, load_shapes
from d3net_kernels import numerics

from .bounds import GPUS, Gpu, bounds, composition_bytes, compulsory_bytes, ideal
from .counters import Counters
from .cuda_program import Executed, Program, ptx_of
from .machine_code import issued, machine_instructions
from .static import (
    ARCHS,
    LATER_ARCHS,
    Recorded,
    Static,
    blocks_an_sm,
    spilling,
    static_figures,
    static_table,
)
from .toolchain import Resources

BUDGET = Path(__file__).with_name("budget.json")
TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu-counted.md"


@dataclass(frozen=True)
class Case:
    """A layer of D3Net with psi, cut to `size` (H, W), and one of its operations.

    In bfloat16, or in float32 with products in TF32.
    """

    name: str
    layer: str
    size: tuple[int, int]
    operation: str
    memory_format: torch.memory_format = torch.contiguous_format
    dtype: torch.dtype = torch.bfloat16

    @property
    def tf32(self) -> bool:
        """Whether products are in TF32."""
        return self.dtype == torch.float32

    @property
    def kind(self) -> str:
        """Type of the products, as in Gpu.tensor."""
        return "tf32" if self.tf32 else "bf16"

    @property
    def shape(self) -> Shape:
        """The layer of shapes.json, cut."""
        (found,) = (s for s in load_shapes() if str(s) == self.layer)
        return replace(found, height=self.size[0], width=self.size[1])

    def ideal(self, gpu: Gpu) -> float:
        """Nanoseconds that it cannot do without."""
        return ideal(self.shape, self.operation, self.kind, self.dtype.itemsize, gpu)

    def problem(self) -> numerics.Problem:
        """It with random numbers; only what the operation needs requires a gradient."""
        shape = self.shape
        problem = numerics.random_problem(
            shape.group_channels,
            shape.c_out,
            (1, *self.size),
            generator=torch.Generator().manual_seed(0),
            dilations=shape.dilations,
            dtype=self.dtype,
            psi_dtype=torch.float32,
        )
        problem = problem.map(self._laid_out)
        wanted = {
            "forward": (),
            "backward_data": ("inputs", "scale", "shift"),
            "backward_weight": ("weight", "bias"),
        }[self.operation]
        for name, t in problem.tensors().items():
            t.requires_grad_(name.split("[")[0] in wanted)
        return problem

    def _laid_out(self, t: torch.Tensor) -> torch.Tensor:
        """Images in the case's memory format, all else as it is."""
        return t.contiguous(memory_format=self.memory_format) if t.shape[0] == 1 else t

    def __str__(self) -> str:
        return f"{self.name} {self.operation}"


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
    Case("S last", _S, (32, 128), "forward", torch.channels_last),
    Case("S last", _S, (32, 128), "backward_data", torch.channels_last),
    Case("S last", _S, (32, 128), "backward_weight", torch.channels_last),
    Case("S tf32", _S, (32, 128), "forward", dtype=torch.float32),
    Case("S tf32", _S, (32, 128), "backward_data", dtype=torch.float32),
    Case("S tf32", _S, (32, 128), "backward_weight", dtype=torch.float32),
)


@dataclass(frozen=True)
class Launched:
    """One kernel of a case: its launch and what it did.

    `code(arch)` is what ptxas makes of its PTX, machine_code.py. `compiled` holds the resources of
    kernels that are compiled for the case, by architecture.
    """

    kernel: str
    threads: int
    dynamic_shared: int
    counters: Counters
    code: Callable[[str], Mapping[int, int]]
    compiled: Mapping[str, Resources] = field(default_factory=dict)

    def issued(self, gpu: Gpu) -> int:
        """Machine instructions of `gpu`."""
        return issued(self.counters, self.code(f"sm_{gpu.capability}"))


def cuda_family(case: Case) -> list[Launched]:
    """The convolution kernel that csrc/cuda launches for a case."""
    executed = Executed()
    recorded = Recorded(executed)
    program = Program(recorded, tf32=case.tf32)
    program.results(case.problem(), moments=case.operation == "forward")
    part = case.operation.removeprefix("backward_")
    (kernel,) = (
        name
        for name in executed.counters
        if name.startswith(("tensor_", "direct_")) and part in name
    )
    code = partial(machine_instructions, ptx_of(kernel), kernel)
    return [Launched(kernel, *recorded.launches[kernel], executed.counters[kernel], code)]


Family = Callable[[Case], list[Launched]]
"""What executes a case: its kernels, one after the other."""


def families() -> dict[str, Family]:
    """All by name; those of Triton where it is installed."""
    found: dict[str, Family] = {"cuda": cuda_family}
    if importlib.util.find_spec("triton") is not None:
        from .triton_family import family

        found |= {f"triton {arch}": family(arch) for arch in ARCHS}
    return found


def can_count(family: str, case: Case) -> bool:
    """Whether the machine has the instructions; not wgmma in TF32, which Triton emits for sm_90."""
    return not (case.tf32 and family == "triton sm_90")


def bound(
    launched: Iterable[Launched], gpu: Gpu, *, of_machine_code: bool = False
) -> list[tuple[str, float]]:
    """What binds every kernel, and its least nanoseconds; they run one after the other.

    What a kernel reads and writes crosses DRAM once, also what the next one reads. Issued are all
    instructions of the PTX, or those of the machine code that it becomes.
    """
    times = []
    for one in launched:
        number = one.issued(gpu) if of_machine_code else one.counters.issued()
        by_resource = bounds(one.counters, gpu, one.counters.distinct_bytes, number)
        binding = max(by_resource, key=lambda name: by_resource[name])
        times.append((f"{one.kernel}, {binding} binds", by_resource[binding]))
    return times


def counted_figures(case: Case, launched: Sequence[Launched]) -> dict[str, float]:
    """What the budget holds for a case; ratios are to the ideal, 1 is best (and most, for mma)."""
    counters, shape = sum((one.counters for one in launched), Counters()), case.shape
    shared, through_l2 = counters.shared_traffic, counters.global_traffic
    distinct = sum(one.counters.distinct_bytes for one in launched)
    figures = {
        "distinct / compulsory bytes": distinct
        / compulsory_bytes(shape, case.operation, case.dtype.itemsize),
        "sectors / ideal": through_l2.units / max(1, through_l2.ideal),
        "wavefronts / ideal": shared.units / max(1, shared.ideal),
        "instructions a pixel": counters.issued() / (shape.height * shape.width),
    }
    for gpu in GPUS:
        total = sum(time for _, time in bound(launched, gpu))
        figures[f"bound / ideal bound {gpu.name}"] = total / case.ideal(gpu)
    return {name: round(value, 4) for name, value in figures.items()}


def machine_figures(family: str, case: Case, launched: Sequence[Launched]) -> dict[str, float]:
    """The same with machine instructions, of the GPUs that would run this family."""
    figures = {}
    pixels = case.shape.height * case.shape.width
    for gpu in GPUS:
        if runs_on(family, gpu):
            number = sum(one.issued(gpu) for one in launched)
            total = sum(time for _, time in bound(launched, gpu, of_machine_code=True))
            figures[f"machine instructions a pixel {gpu.name}"] = number / pixels
            figures[_machine_bound(gpu)] = total / case.ideal(gpu)
    return {name: round(value, 4) for name, value in figures.items()}


def _machine_bound(gpu: Gpu) -> str:
    return f"bound of machine code / ideal bound {gpu.name}"


def spilled(launched: Iterable[Launched]) -> list[str]:
    """Kernels compiled for a case that spill registers; their compiler may leave a stack frame."""
    return [
        f"{one.kernel} {arch}: {used.spill_stores + used.spill_loads} bytes spilled"
        for one in launched
        for arch, used in one.compiled.items()
        if used.spill_stores or used.spill_loads
    ]


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


def case_table(family: str, case: Case, launched: Sequence[Launched], static: Static) -> str:
    """One case: its figures, its kernels and their bounds, and what plain torch would move."""
    counters, shape = sum((one.counters for one in launched), Counters()), case.shape
    pixels = shape.height * shape.width
    figures = counted_figures(case, launched)
    kinds = counters.by_kind()
    distinct = sum(one.counters.distinct_bytes for one in launched)
    compulsory = compulsory_bytes(shape, case.operation, case.dtype.itemsize)
    unfused = composition_bytes(shape, case.dtype.itemsize)
    lines = [
        f"{family}, {case}: {shape}",
        "  counted on emulated PTX: "
        + ", ".join(f"{name} {figures[name]:.3f}" for name in list(figures)[:4]),
        f"  mma {100 * kinds.get('mma', 0) / counters.issued():.1f} % of warp instructions; "
        f"bytes a pixel: {distinct / pixels:.0f} distinct, {compulsory / pixels:.0f} compulsory, "
        f"{unfused / pixels:.0f} in the forward pass of unfused torch (from shapes)",
    ]
    for one in launched:
        for arch, used in {**static.get(one.kernel, {}), **one.compiled}.items():
            lines.append(
                f"  {one.kernel} {arch}: {used.registers} registers, "
                f"{used.spill_stores + used.spill_loads} bytes spilled, "
                f"{one.dynamic_shared} B dynamic shared, "
                f"{blocks_an_sm(used, one.threads, one.dynamic_shared, arch)} blocks an SM"
            )
    for gpu in GPUS:
        cells = []
        for of_machine_code in (False, True) if runs_on(family, gpu) else (False,):
            times = bound(launched, gpu, of_machine_code=of_machine_code)
            ratio = case.ideal(gpu) / sum(time for _, time in times)
            detail = "; ".join(f"{name} {time / pixels:.4f}" for name, time in times)
            code = "machine code" if of_machine_code else "PTX"
            cells.append(f"of {code} {ratio:.2f}: {detail}")
        lines.append(
            f"  {gpu.name:8} ns a pixel: ideal {case.ideal(gpu) / pixels:.4f}; "
            "ideal / counted bound " + "; ".join(cells)
        )
    return "\n".join(lines)


def runs_on(family: str, gpu: Gpu) -> bool:
    """Whether `gpu` would get this family: of one for an architecture, the latest it can run."""
    arch = family.split()[-1]
    able = [arch for arch in ARCHS if int(arch.removeprefix("sm_")) <= gpu.capability]
    return arch not in ARCHS or arch == able[-1]


def side_by_side(counted: Mapping[str, Mapping[str, float]]) -> str:
    """Ideal over counted bound of machine code, case by case, of the families that run on a GPU;
    1 is best. And the best on this GPU.

    Families not counted this time come from the budget.
    """
    names = list(families())
    lines = ["ideal / counted bound " + "".join(f"{name:>16}" for name in names)]
    for case, gpu in itertools.product(CASES, GPUS):
        ratios = {
            name: 1 / figures[_machine_bound(gpu)]
            for name in names
            if _machine_bound(gpu) in (figures := counted.get(f"{name} {case}", {}))
        }
        cells = [f"{ratios[name]:16.2f}" if name in ratios else f"{'-':>16}" for name in names]
        best = max(ratios, key=lambda name: ratios[name], default="-")
        lines.append(f"{case!s:24} {gpu.name:9}" + "".join(cells) + f"  {best}")
    return "\n".join(lines)


def assemble_all(launches: Iterable[tuple[str, Sequence[Launched]]]) -> None:
    """All machine code that will be asked for, several compilers at a time."""
    wanted = [
        (one, gpu)
        for family, launched in launches
        for one, gpu in itertools.product(launched, GPUS)
        if runs_on(family, gpu)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda pair: pair[0].issued(pair[1]), wanted))


def saved_table(static: str, cases: Iterable[str]) -> str:
    """What --update keeps beside the timed runs."""
    return "\n".join(
        [
            "# The GPU kernels without a GPU",
            "",
            "Written by `make gpu-report ARGS=--update`. Nothing here is measured: counts are",
            "**counted on emulated PTX** (bfloat16, or float32 with products in TF32; strips of",
            "the layers of D3Net; of the CUDA kernels that of sm_80),",
            "registers and occupancy are **static**, of ptxas. A bound says that no counted",
            "resource forbids this time; a ratio of bounds is no speed. A bound of PTX lets every",
            "PTX instruction be issued; one of machine code the instructions that ptxas makes of",
            "it for that GPU, as often as the PTX was executed (tests/gpu/machine_code.py). The",
            "last table is of machine code. Counted are the",
            "convolution kernels and Triton's `prepare`. Not counted are, of CUDA C++, packing of",
            "the weights, `finish_sums` and `finish_channel_moments`, and of Triton what torch",
            "does around its kernels: weights laid out anew, sums over tiles and slabs, the",
            "gradient of the bias. The last table names, of what would run on a GPU (on RTX 4090",
            "the code of sm_80), the family with the least bound. Triton's forward pass pays for",
            "a workspace: psi of the sources goes through memory once more, which the CUDA kernels",
            "keep in shared memory; its gradients read the sources where they lie: they come",
            "nearer, or are ahead.",
            "",
            "```",
            static,
            *(f"\n{case}" for case in cases),
            "```",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--update", action="store_true", help="make these figures the budget")
    parser.add_argument("--later-archs", action="store_true", help=", ".join(LATER_ARCHS))
    parser.add_argument("--family", choices=list(families()), help="only this one")
    arguments = parser.parse_args()
    counted: dict[str, dict[str, float]] = {}
    launches: list[tuple[str, Case, list[Launched]]] = []
    for family, execute in families().items():
        for case in CASES if arguments.family in (None, family) else ():
            if not can_count(family, case):
                continue
            launched = execute(case)
            counted[f"{family} {case}"] = counted_figures(case, launched)
            print(f"counted: {family}, {case}", flush=True)
            launches.append((family, case, launched))
    budget = json.loads(BUDGET.read_text())
    static = static_figures() if arguments.family in (None, "cuda") else {}
    print("machine code, of every kernel and GPU", flush=True)
    assemble_all((family, launched) for family, _, launched in launches)
    for family, case, launched in launches:
        counted[f"{family} {case}"] |= machine_figures(family, case, launched)
    tables = [case_table(*launch, static) for launch in launches]
    tables.append(side_by_side(budget["counted"] | counted))
    if static:
        print("\n" + static_table(static))
    print("\n" + "\n\n".join(tables), flush=True)
    problems = spilling(static)
    for family, case, launched in launches:
        problems += [f"{family}, {case}, {line}" for line in spilled(launched)]
    if arguments.later_archs:
        later = static_figures(LATER_ARCHS)
        print("\n" + static_table(later), flush=True)
        problems += spilling(later)
    if arguments.update and not problems:
        if static:
            budget["static"] = {
                kernel: {arch: asdict(f) for arch, f in by_arch.items()}
                for kernel, by_arch in sorted(static.items())
            }
        budget["counted"] |= counted
        BUDGET.write_text(json.dumps(budget, indent=1) + "\n")
        if arguments.family is None:
            TABLE.write_text(saved_table(static_table(static), tables))
        return 0
    problems += exceeded(budget, static, counted)
    print("\n" + ("\n".join(problems) if problems else "Everything is within the budget."))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
