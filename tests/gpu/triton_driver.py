"""A driver for Triton that launches kernels on the PTX machine instead of on a GPU.

Everything else is Triton's own way: specialization, compilation for the architecture, arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from d3net_kernels.backends.triton import configs, launch, views

from .counters import Counters
from .machine_code import machine_instructions
from .module import Module, load
from .toolchain import Assembler, Resources, resources

_SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 65536}


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's texts by kind ("ptx", ...), its sizes, and what executing it did."""

    name: str
    texts: dict[str, str]
    grid: tuple[int, int, int]
    warps: int
    shared: int
    counters: Counters | None


@dataclass
class EmulatedGpu:
    """What `triton.runtime.driver.active` has to be; keeps a record of the launches.

    `execute` False compiles only, for architectures whose code the machine cannot run.
    """

    arch: str
    execute: bool = True
    options: dict[str, Any] = field(default_factory=dict)  # of Module.launch
    launches: list[Launch] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)  # what packed pointers may reach

    @property
    def launcher_cls(self) -> Callable[..., Callable[..., None]]:
        """A compiled kernel keeps its launcher, which has to find the emulator of the day."""
        return lambda src, metadata: lambda *rest: driver.active._launch(src, metadata, *rest)

    @property
    def utils(self) -> EmulatedGpu:
        return self

    def get_current_target(self) -> GPUTarget:
        if self.arch.startswith("gfx"):
            return GPUTarget("hip", self.arch, 64)
        return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        """A number of its own for every architecture: Triton keeps one target for each device."""
        return list(_SHARED_BYTES).index(self.arch)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED_BYTES[self.arch]}

    def load_binary(self, *_: Any) -> tuple[object, None, int, int, int]:
        """Module, function, registers, spills, most threads."""
        return object(), None, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        """There is nothing to unload."""

    def _launch(self, src: Any, metadata: Any, x: int, y: int, z: int, *others: Any) -> None:
        _stream, _function, _packed, _launch_metadata, _enter, _exit, *arguments = others
        files = get_cache_manager(metadata.hash).get_group(f"{src.name}.json") or {}
        texts = {
            kind: Path(files[name]).read_text()
            for kind in ("ptx", "amdgcn")
            if (name := f"{src.name}.{kind}") in files
        }
        counters = None
        if self.execute:
            counters = self._run(src, metadata, (x, y, z), arguments, texts["ptx"])
        self.launches.append(
            Launch(src.name, texts, (x, y, z), metadata.num_warps, metadata.shared, counters)
        )

    def _run(
        self,
        src: Any,
        metadata: Any,
        grid: tuple[int, int, int],
        arguments: Sequence[Any],
        ptx: str,
    ) -> Counters:
        module = _module(ptx)
        (name,) = module.kernels.values()
        given = [
            value
            for kind, argument in zip(src.signature.values(), arguments, strict=True)
            for value in _flat(kind, argument)
        ]
        scratch = [0] * (len(module.parameters(name)) - len(given))
        buffers = {f"tensor {i}": t for i, t in enumerate(self.tensors) if t.device.type == "cpu"}
        return module.launch(
            name,
            grid=grid,
            block=(32 * metadata.num_warps,),
            shared=metadata.shared,
            args=[*given, *scratch],
            buffers=buffers,
            **self.options,
        )


@contextmanager
def emulated(arch: str, *, execute: bool = True, **options: Any) -> Iterator[EmulatedGpu]:
    """Launches of the Triton backend on CPU tensors go to a GPU of `arch` while this holds."""
    gpu = EmulatedGpu(arch, execute, options)
    plain = views.View.of

    def recorded(t: Tensor) -> views.View:
        gpu.tensors.append(t)
        return plain(t)

    replaced: list[tuple[Any, str, Any]] = [
        (driver, "_active", gpu),
        (configs, "arch_of", lambda _: arch),
        (configs, "tuned", lambda _: {}),
        (views.View, "of", staticmethod(recorded)),
        (launch, "interpreted", lambda: False),
    ]
    before = [(holder, name, vars(holder)[name]) for holder, name, _ in replaced]
    for holder, name, value in replaced:
        setattr(holder, name, value)
    try:
        yield gpu
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


@functools.lru_cache(maxsize=64)
def _module(ptx: str) -> Module:
    """Many cases share a kernel; decoding one takes longer than many a launch."""
    return load(ptx)


def static_resources(done: Launch, arch: str) -> Resources:
    """What the kernel of a launch needs as Triton has it assembled: its ptxas, its options."""
    (used,) = resources(done.texts["ptx"], _assembled_for(arch), _assembler()).values()
    return used


def machine_code(done: Launch) -> Callable[[str], dict[int, int]]:
    """What becomes of the kernel of a launch, by architecture (machine_code.py)."""
    ptx = done.texts["ptx"]
    (name,) = _module(ptx).kernels.values()

    def on(arch: str) -> dict[int, int]:
        return machine_instructions(ptx, name, _assembled_for(arch), _assembler())

    return on


@functools.cache
def _assembler() -> Assembler:
    tool = knobs.nvidia.ptxas
    options = ("-lineinfo", "--fmad=false", "--regAllocOptLevel=2")  # of CUDABackend.make_cubin
    return Assembler(Path(tool.path), f"triton {tool.version}", options)


def _assembled_for(arch: str) -> str:
    """What ptxas has to be told: "a" for wgmma, which Triton chooses on sm_90."""
    return "sm_90a" if arch == "sm_90" else arch


def _flat(kind: Any, argument: Any) -> list[Any]:
    """The kernel's parameters that come from one argument of this signature."""
    if kind == "constexpr":
        return []
    if isinstance(kind, tuple):
        return [v for k, a in zip(kind, argument, strict=True) for v in _flat(k, a)]
    return [argument]
