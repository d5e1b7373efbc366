"""Builds the binary ``d3net_kernels/_C.abi3.so``, and ``_C_cuda.abi3.so`` where CUDA is.

Everything else is in pyproject.toml. An install never fails for a binary's sake: where one cannot
be built (no torch at build time, no compiler, a compile error) the package is made without, and
one line says why and how to get the compiled one.

Environment: D3NET_KERNELS_REQUIRE_BINARY=1 turns that line into an error; D3NET_KERNELS_CUDA is
explained in csrc/cuda/extension.py; MAX_JOBS, CXX, CUDA_HOME and TORCH_CUDA_ARCH_LIST mean what
they mean for every torch extension.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
from extension import SWITCH, CudaUnavailableError, cuda_extension  # noqa: E402

REQUIRED = os.environ.get("D3NET_KERNELS_REQUIRE_BINARY") == "1"
ADVICE = (
    "for the compiled one install a C++20 compiler, torch>=2.10 and setuptools, then run: "
    "pip install --no-build-isolation --no-deps --editable ."
)
OLDEST_TORCH = (2, 10)
BYTES_PER_JOB = 3 * 2**29  # what one compiler may take: torch headers and unrolled kernels
COMPILE_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    # Only what the stable ABI of the oldest torch has: the binary then loads in every later one.
    f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
]


class BinaryUnavailableError(Exception):
    """The binary cannot be built here; the message is the reason."""


def available_memory() -> int:
    """Bytes of memory a build may use: the machine's, or the container's limit if lower."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(name).read_text()))
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
    return min(limits)


def compile_jobs() -> int:
    """How many compilers may run at once: one a core, fewer when memory is short."""
    pinned = hasattr(os, "sched_getaffinity")  # Linux only
    cores = len(os.sched_getaffinity(0)) if pinned else os.cpu_count() or 1
    return max(1, min(cores, available_memory() // BYTES_PER_JOB))


def files(folder: str, pattern: str) -> list[str]:
    """Paths relative to this file, as setuptools wants them, in one order on every machine."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(pattern))


def no_cuda(reason: str) -> None:
    """Say why there is no CUDA binary; an error where both it and a binary are asked for."""
    if REQUIRED and os.environ.get(SWITCH) == "1":
        raise BinaryUnavailableError(f"no CUDA kernels: {reason}")
    print(f"d3net-kernels: no CUDA kernels: {reason}", file=sys.stderr)


def extension_arguments() -> dict[str, Any]:
    """What setup() needs to build the binary, or BinaryUnavailableError where it cannot work."""
    if os.name != "posix":
        raise BinaryUnavailableError("compiled kernels are built on Linux and macOS only")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise BinaryUnavailableError("free-threaded Python has no stable ABI")
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except Exception as error:  # a broken torch raises more than ImportError
        raise BinaryUnavailableError(f"torch cannot be imported by the build ({error})") from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise BinaryUnavailableError(f"torch {torch.__version__} is older than 2.10")

    class Build(BuildExtension):
        extensions: list[Any]

        def finalize_options(self) -> None:
            super().finalize_options()
            # An editable install would build in a fresh temporary folder each time:
            # keep the objects, so that only what changed is compiled again.
            self.build_temp = str(ROOT / "build" / f"objects-torch{torch.__version__}")

        def run(self) -> None:
            try:
                os.environ.setdefault("MAX_JOBS", str(compile_jobs()))
                super().run()
            except (Exception, SystemExit) as error:
                raise BinaryUnavailableError(f"the C++ build failed ({error})") from error

        def build_extensions(self) -> None:
            both, self.extensions = self.extensions, [binary]
            super().build_extensions()
            if len(both) > 1:
                try:
                    self.extensions = both[1:]
                    super().build_extensions()
                    self.extensions = both
                except (Exception, SystemExit) as error:
                    self.extensions = [binary]
                    no_cuda(f"the CUDA build failed ({error})")

    binary = CppExtension(
        "d3net_kernels._C",
        [*files("csrc", "*.cpp"), *files("csrc/cpu", "*.cpp")],
        include_dirs=[str(ROOT / "csrc")],
        depends=[*files("csrc", "*.h"), *files("csrc/cpu", "*.h")],
        extra_compile_args={"cxx": COMPILE_FLAGS},
        py_limited_api=True,
    )
    extensions: list[Any] = [binary]
    try:
        sources = [*files("csrc/cuda", "*.cu"), *files("csrc/cuda", "*.cpp")]
        depends = [*files("csrc/cuda", "*.*h"), *files("csrc", "*.h")]
        extensions.append(cuda_extension(torch, sources, depends, COMPILE_FLAGS))
    except CudaUnavailableError as error:
        no_cuda(str(error))
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


BUILDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install"}
if BUILDS.isdisjoint(sys.argv):  # metadata and source distributions need no torch
    setup()
else:
    try:
        setup(**extension_arguments())
    except BinaryUnavailableError as reason:
        if REQUIRED:
            sys.exit(f"d3net-kernels: {reason}; {ADVICE}")
        print(f"d3net-kernels: pure-Python build: {reason}; {ADVICE}", file=sys.stderr)
        setup()
