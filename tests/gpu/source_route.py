"""The kernels' C++ sources on the CPU, compiled with the host compiler's sanitizers.

A copy of csrc is compiled in which ptx.cuh, the one header with inline PTX, is replaced by
source/ptx.cuh, and dynamic shared memory by that of source/runtime.h. Every launch is a process of
its own: a sanitizer ends it at its first finding.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .planted import NO_BUG, Bug, patched_csrc
from .toolchain import CompilerError, cached, digest, find_toolkit, host_compiler, run

HERE = Path(__file__).parent
_FLAGS = ("-std=c++20", "-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=off", "-w")
SANITIZERS: dict[str, tuple[str, ...]] = {
    "none": ("-O2",),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-fsanitize=thread",),
}
_EXTERN_SHARED = re.compile(r"extern\s+__shared__[^;]*?(\w+)\[\];")


@dataclass(frozen=True)
class KernelSource:
    """A kernel by name, the file in csrc/cuda to include for it, and the code that makes it."""

    name: str
    include: str
    code: str = ""


class SanitizerError(RuntimeError):
    """What a sanitizer or the runtime found, in its own words."""


@functools.cache
def program(kernels: tuple[KernelSource, ...], sanitizer: str, bug: Bug = NO_BUG) -> Path:
    """An executable with these kernels; `sanitizer` is a key of SANITIZERS, `bug` planted before.

    Raises:
        CompilerError: with the compiler's words.
    """
    toolkit = find_toolkit()
    if toolkit is None:
        raise CompilerError("the CUDA headers are missing")
    csrc = patched_csrc(bug)
    options = [
        host_compiler(),
        *_FLAGS,
        *SANITIZERS[sanitizer],
        *("-x", "c++", "-include", str(HERE / "source" / "cuda.h")),
        *(f"-I{HERE / 'source'}", f"-I{HERE / 'engine'}", f"-isystem{toolkit.include}"),
    ]
    key = digest(
        [*options, repr(kernels), toolkit.version],
        [csrc, HERE / "source", HERE / "engine" / "fragments.h", HERE / "engine" / "numbers.h"],
    )

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            main = _prepared(csrc, Path(folder), kernels)
            run([*options, main, "-o", out])

    return cached(f"source-{sanitizer}-{key}", make)


def _prepared(csrc: Path, folder: Path, kernels: Sequence[KernelSource]) -> Path:
    """The sources for the host compiler, and a main file with these kernels."""
    for path in csrc.rglob("*"):
        if path.suffix not in (".h", ".cuh", ".cu"):
            continue
        text = path.read_text()
        if path.name == "ptx.cuh":
            text = (HERE / "source" / "ptx.cuh").read_text()
        # nvcc hides this name from the launches' side; here it is the address of the moment.
        text = _EXTERN_SHARED.sub(
            lambda match: (
                f"#define {match.group(1)} reinterpret_cast<unsigned char*>(gpu::machine.shared)"
            ),
            text,
        )
        target = folder / path.relative_to(csrc)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    main = folder / "cuda" / "main.cu"
    main.write_text(
        "\n".join(
            [
                *dict.fromkeys(f'#include "{kernel.include}"' for kernel in kernels),
                '#include "main.h"',
                *(kernel.code for kernel in kernels),
                "int main(int count, char** arguments) {",
                "  gpu::KernelTable kernels;",
                *(f'  kernels.add("{kernel.name}", &{kernel.name});' for kernel in kernels),
                "  return gpu::run_job(kernels, count, arguments);",
                "}",
            ]
        )
    )
    return main


def launch(
    executable: Path,
    kernel: str,
    grid: Sequence[int],
    block: Sequence[int],
    shared: int,
    arguments: bytes,
    buffers: Mapping[str, Tensor],
    *,
    order: str = "forward",
    cp_async: str = "late",
) -> None:
    """Run one launch of `executable`; the buffers change in place.

    Raises:
        SanitizerError: with the report, if a sanitizer or the runtime found something.
    """

    def text(words: str | bytes) -> bytes:
        data = words.encode() if isinstance(words, str) else words
        return struct.pack("<Q", len(data)) + data

    flat = [b.view(torch.uint8) for b in buffers.values() if b.numel()]
    memory = [ctypes.string_at(b.data_ptr(), b.numel()) for b in flat]
    job = [
        text(order),
        struct.pack("<Q", cp_async == "early"),
        text(kernel),
        struct.pack("<6Q", *_three(grid), *_three(block)),
        struct.pack("<Q", shared),
        text(arguments),
        struct.pack("<Q", len(flat)),
    ]
    for buffer, content in zip(flat, memory, strict=True):
        job += [struct.pack("<Q", buffer.data_ptr()), text(content)]
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "job", Path(folder) / "result"
        paths[0].write_bytes(b"".join(job))
        environment = {
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        done = subprocess.run(
            [executable, *paths],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **environment},
        )
        if done.returncode:
            raise SanitizerError(done.stderr)
        result = paths[1].read_bytes()
    at = 0
    for buffer in flat:
        size = buffer.numel()
        ctypes.memmove(buffer.data_ptr(), result[at : at + size], size)
        at += size


def _three(sizes: Sequence[int]) -> list[int]:
    return [*sizes, *[1] * (3 - len(sizes))]
