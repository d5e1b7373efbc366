"""The compilers of the harness: nvcc for kernels, the host compiler for the engine.

Results lie in build/gpu, under names that depend on everything that went in.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "gpu"
_SUFFIXES = {".h", ".cuh", ".cu", ".cpp", ".hpp"}
_ENGINE_FLAGS = (
    *("-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
)


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler and the root of its toolkit, which a wrapper in PATH may hide."""

    nvcc: Path
    root: Path
    version: str

    @property
    def ptxas(self) -> Path:
        return self.root / "bin" / "ptxas"

    @property
    def include(self) -> Path:
        return next(p for p in self._include_choices() if (p / "cuda_fp16.h").exists())

    def _include_choices(self) -> list[Path]:
        return [self.root / "include", *self.root.glob("targets/*/include")]


class CompilerError(RuntimeError):
    """A compiler refused; holds its command and its words."""


@functools.cache
def find_toolkit() -> Toolkit | None:
    """The first nvcc that works: of CUDA_HOME, in PATH, of the compiler wheels from PyPI."""
    for candidate in _nvcc_candidates():
        if not candidate.exists():
            continue
        dry = subprocess.run(
            [candidate, "--dryrun", "-ptx", "-x", "cu", os.devnull],
            capture_output=True,
            text=True,
            check=False,
        )
        top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
        version = subprocess.run(
            [candidate, "--version"], capture_output=True, text=True, check=False
        )
        release = re.search(r"V(\d+\.\d+\.\d+)", version.stdout)
        if top and release:
            return Toolkit(candidate, Path(top.group(1)).resolve(), release.group(1))
    return None


def _nvcc_candidates() -> Iterable[Path]:
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home) / "bin" / "nvcc"
    if found := shutil.which("nvcc"):
        yield Path(found)
    site = Path(sysconfig.get_paths()["purelib"])
    yield from sorted(site.glob("nvidia/*/bin/nvcc"))


def why_no_nvcc() -> str | None:
    """None if kernels can be compiled, else the reason and the cure."""
    if find_toolkit():
        return None
    return (
        "no working nvcc in CUDA_HOME or PATH: install the CUDA toolkit, or the compiler wheels "
        "with pip install nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime "
        "nvidia-cuda-cccl"
    )


def compile_ptx(
    source: Path,
    arch: str,
    *,
    defines: Sequence[str] = (),
    includes: Sequence[Path] = (),
    flags: Sequence[str] = (),
) -> str:
    """PTX of a CUDA source file for an architecture such as "sm_80".

    Raises:
        CompilerError: with nvcc's words, or if there is no nvcc.
    """
    toolkit = find_toolkit()
    if toolkit is None:
        raise CompilerError(why_no_nvcc())
    options = ["-std=c++20", "-ptx", f"-arch={arch}", "-lineinfo", *flags]
    options += [f"-D{define}" for define in defines]
    key = digest([toolkit.version, *options], _with_headers(source, includes))
    options += [f"-I{path}" for path in includes]
    return cached(
        f"{source.stem}-{arch}-{key}.ptx",
        lambda out: run([toolkit.nvcc, *options, "-o", out, source], CUDA_HOME=str(toolkit.root)),
    ).read_text()


def _with_headers(source: Path, includes: Sequence[Path]) -> list[Path]:
    """A source file and the headers of the project that it comes to include."""
    found = [source]
    for path in found:
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            for folder in (path.parent, *includes):
                header = (folder / name).resolve()
                if header.exists():
                    if header not in found:
                        found.append(header)
                    break
    return found


@dataclass(frozen=True)
class Resources:
    """What ptxas says of one kernel; sizes in bytes. `shared` is static shared memory."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Assembler:
    """A ptxas and the options that it is given."""

    ptxas: Path
    version: str
    options: tuple[str, ...] = ()


def toolkit_assembler() -> Assembler:
    """The toolkit's own ptxas.

    Raises:
        CompilerError: if there is no toolkit.
    """
    toolkit = find_toolkit()
    if toolkit is None:
        raise CompilerError(why_no_nvcc())
    return Assembler(toolkit.ptxas, toolkit.version)


def resources(ptx: str, arch: str, assembler: Assembler | None = None) -> dict[str, Resources]:
    """Resources by kernel of a PTX text, assembled for `arch`; by the toolkit's ptxas by default.

    Raises:
        CompilerError: with the words of ptxas, or if there is no toolkit.
    """
    assembler = assembler or toolkit_assembler()
    key = digest([assembler.version, *assembler.options, arch, ptx], [])

    def assemble(out: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "kernel.ptx"
            text.write_text(ptx)
            binary = Path(folder) / "kernel.cubin"
            command: list[str | Path] = [
                assembler.ptxas,
                "-v",
                f"-arch={arch}",
                *assembler.options,
                text,
            ]
            out.write_text(run([*command, "-o", binary]))

    report = cached(f"ptxas-{arch}-{key}.txt", assemble).read_text()
    found = {}
    for part in re.split(r"Compiling entry function", report)[1:]:
        name = re.match(r" '([^']+)'", part)
        assert name, part

        def number(pattern: str, text: str = part) -> int:
            match = re.search(pattern, text)
            return int(match.group(1)) if match else 0

        found[name.group(1)] = Resources(
            registers=number(r"Used (\d+) registers"),
            spill_stores=number(r"(\d+) bytes spill stores"),
            spill_loads=number(r"(\d+) bytes spill loads"),
            stack=number(r"(\d+) bytes stack frame"),
            shared=number(r"(\d+) bytes smem"),
        )
    return found


@functools.cache
def engine() -> ModuleType:
    """The compiled engine; the first call builds it.

    Raises:
        CompilerError: if there is no host compiler or pybind11, or it refuses.
    """
    if reason := why_no_engine():
        raise CompilerError(reason)
    import pybind11

    compiler = host_compiler()
    options = [
        *_ENGINE_FLAGS,
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_paths()['include']}",
    ]
    sources = sorted((HERE / "engine").glob("*.cpp"))
    key = digest([*options, platform.machine(), _cpu(), sys.version], [HERE / "engine"])

    def link(out: Path) -> None:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
            objects = [Path(folder) / f"{source.stem}.o" for source in sources]
            commands = [
                [compiler, *options, "-c", source, "-o", o]
                for source, o in zip(sources, objects, strict=True)
            ]
            list(pool.map(run, commands))
            run([compiler, "-shared", *objects, "-o", out])

    library = cached(f"engine-{key}.so", link)
    spec = importlib.util.spec_from_file_location("_engine", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_no_engine() -> str | None:
    """None if the engine can be built, else the reason and the cure."""
    if not shutil.which(host_compiler()):
        return "no C++ compiler: install g++, or name one in CXX"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11: pip install pybind11"
    return None


def host_compiler() -> str:
    """Name of the C++ compiler: CXX, or g++."""
    return os.environ.get("CXX", "g++")


def cached(name: str, make: Callable[[Path], object]) -> Path:
    """The file build/gpu/`name`; `make(path)` writes it where it is missing."""
    path = BUILD / name
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder) / name
            make(made)
            made.replace(path)
    return path


def digest(words: Iterable[str], paths: Iterable[Path]) -> str:
    """Hash of words, of files, and of all source files below folders."""
    state = hashlib.sha256("\0".join(words).encode())
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES)
        for file in files:
            state.update(file.name.encode() + b"\0" + file.read_bytes())
    return state.hexdigest()[:20]


def run(command: Sequence[str | Path], **environment: str) -> str:
    """Output of a command.

    Raises:
        CompilerError: with the command and its words, if it fails.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode:
        words = " ".join(str(part) for part in command)
        raise CompilerError(f"{words}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _cpu() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    flags = re.search(r"^(?:flags|Features)\s*:.*$", info.read_text(), re.MULTILINE)
    return flags.group() if flags else ""
