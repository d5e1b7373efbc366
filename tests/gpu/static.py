"""What the kernels of csrc/cuda need of a multiprocessor, as ptxas says: "static" figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from d3net_kernels import numerics
from d3net_kernels.__main__ import KINDS_ON_GPU

from .cuda_program import CSRC, Program
from .toolchain import Resources, compile_ptx, resources

ARCHS = ("sm_80", "sm_90")
"""In the budget."""
LATER_ARCHS = ("sm_86", "sm_89", "sm_100", "sm_120")
"""Assembled on demand; they must not spill either."""
_SHARED_BYTES = {  # of an SM: CUDA C++ Programming Guide, "Compute Capabilities"
    **{"sm_80": 164 << 10, "sm_86": 100 << 10, "sm_89": 100 << 10},
    **{"sm_90": 228 << 10, "sm_100": 228 << 10, "sm_120": 100 << 10},
}
_THREADS = {"sm_86": 1536, "sm_89": 1536, "sm_120": 1536}  # of an SM; else 2048
_RESERVED_SHARED = 1 << 10  # of a block, by the system

Static = Mapping[str, Mapping[str, Resources]]
"""Resources by kernel and architecture."""


def kernel_sources() -> list[Path]:
    """The instantiation files that hold kernels."""
    found = sorted((CSRC / "cuda").glob("*.cu"))
    return [path for path in found if path.stem != "kernels"]  # the table of names


def static_figures(
    archs: Iterable[str] = ARCHS, sources: Iterable[Path] | None = None
) -> dict[str, dict[str, Resources]]:
    """Resources of kernels by kernel and architecture; of all sources where none are named.

    The PTX is that of sm_80, which is also what the tests execute, assembled for each architecture.
    """
    found: dict[str, dict[str, Resources]] = {}
    for source in kernel_sources() if sources is None else sources:
        ptx = compile_ptx(source, "sm_80", includes=[CSRC])
        for arch in archs:
            for kernel, figures in resources(ptx, arch).items():
                found.setdefault(kernel, {})[arch] = figures
    return found


class Recorded:
    """Keeps threads and dynamic shared memory of launches, and passes them on to `run`, if any."""

    def __init__(self, run: Callable[..., None] | None = None) -> None:
        self.launches: dict[str, tuple[int, int]] = {}
        self._run = run

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
        if self._run is not None:
            self._run(kernel, blocks, threads, shared, arguments, buffers)


def launch_sizes() -> dict[str, tuple[int, int]]:
    """Threads and bytes of dynamic shared memory of a block, of every kernel."""
    recorded = Recorded()
    for kind, dtype in KINDS_ON_GPU.items():
        for kernel in (3, 1):  # on tensor cores, and not
            for outputs in (8, 16, 24, 32, 40):
                for relu in (True, False):
                    problem = numerics.random_problem(
                        (outputs,),
                        outputs,
                        (1, 2, 8),
                        generator=torch.Generator().manual_seed(0),
                        kernel=(kernel, kernel),
                        dtype=dtype,
                        psi_dtype=torch.float32,
                        relu=relu,
                    )
                    for t in problem.tensors().values():
                        t.requires_grad_(True)
                    Program(recorded, tf32=kind == "tf32").results(problem, moments=True)
    return recorded.launches


def blocks_an_sm(figures: Resources, threads: int, dynamic_shared: int, arch: str) -> int:
    """Blocks of a kernel that fit on an SM: by registers, shared memory and threads."""
    registers = (figures.registers + 7) // 8 * 8 * threads
    shared = figures.shared + dynamic_shared + _RESERVED_SHARED
    return min(
        65536 // registers, _SHARED_BYTES[arch] // shared, _THREADS.get(arch, 2048) // threads, 32
    )


def spilling(static: Static) -> list[str]:
    """Kernels that keep anything in local memory: none may."""
    return [
        f"{kernel} {arch}: {f.spill_stores + f.spill_loads} bytes spilled, stack {f.stack}"
        for kernel, by_arch in static.items()
        for arch, f in by_arch.items()
        if f.spill_stores or f.spill_loads or f.stack
    ]


def static_table(static: Static) -> str:
    """Registers, spills, stack, static and dynamic shared memory and occupancy of every kernel."""
    sizes = launch_sizes()
    lines = [
        "static, from ptxas: registers / spilled bytes / stack / static shared / blocks an SM",
        "",
    ]
    width = max(len(kernel) for kernel in static)
    for kernel, by_arch in sorted(static.items()):
        threads, shared = sizes[kernel]
        cells = [
            f"{arch} {f.registers:4} {f.spill_stores + f.spill_loads:3} {f.stack:3} {f.shared:5} "
            f"{blocks_an_sm(f, threads, shared, arch):3}"
            for arch, f in by_arch.items()
        ]
        lines.append(
            f"{kernel:{width}}  {threads:4} threads, dynamic shared {shared:6}   "
            + "   ".join(cells)
        )
    return "\n".join(lines)
