"""The package imports quickly and everywhere, and says what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import d3net_kernels

PACKAGE = Path(d3net_kernels.__file__).parent


def _python(program: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith("D3NET_KERNELS_")}
        | {"PYTHONPATH": str(folder)}
        | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(params=["missing", "not a library"])
def without_binary(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with the Python files of the package, and no binary that loads."""
    copy = tmp_path / "d3net_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if request.param != "missing":
        (copy / "_C.abi3.so").write_bytes(b"built for something else")
    return tmp_path


def test_import_time() -> None:
    """At most 0.3 s over torch; the best of three, since the machine may be busy."""
    program = (
        "import time, torch; start = time.perf_counter(); import d3net_kernels; "
        "print(time.perf_counter() - start)"
    )
    runs = [_python(program, PACKAGE.parent) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) <= 0.3


def test_import_needs_no_compiler_stack() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import d3net_kernels; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new & {'triton', 'torch._dynamo', 'torch._inductor', 'numpy'}))"
    )
    assert _python(program, PACKAGE.parent).stdout.strip() == "[]"


def test_works_without_binary(without_binary: Path) -> None:
    """The plain torch kernels serve, gradients too, and one warning says why and what to do."""
    program = """
import warnings, torch
import d3net_kernels as dk
block = dk.D2Block(3, 2, 2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        block(torch.randn(1, 3, 4, 5)).sum().backward()
print(len(caught), caught[0].message)
print(dk.why_not("cpu"))
assert torch.ops.d3net_kernels.multidilated_conv2d.default
"""
    run = _python(program, without_binary)
    assert run.returncode == 0, run.stderr
    warning, reason = run.stdout.splitlines()
    assert warning.startswith("1 d3net_kernels runs on plain torch operations: ")
    assert "pip install" in warning
    assert reason in warning
    assert "_C.abi3.so" in reason


def test_forced_cpu_without_binary(without_binary: Path) -> None:
    program = (
        "import torch, d3net_kernels as dk\n"
        "dk.multidilated_conv2d([torch.randn(1, 1, 2, 2)], torch.randn(1, 1, 3, 3))"
    )
    run = _python(program, without_binary, D3NET_KERNELS_BACKEND="cpu")
    assert run.returncode == 1
    assert "RuntimeError: the cpu backend is not available" in run.stderr


def test_cpu_isa_without_binary(without_binary: Path) -> None:
    run = _python(
        "import torch, d3net_kernels; torch.ops.d3net_kernels.cpu_isa('')", without_binary
    )
    assert "the cpu backend is not available" in run.stderr


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("triton", "RuntimeError: the triton backend is not available"),
        ("fastest", "ValueError: D3NET_KERNELS_BACKEND is 'fastest'; accepted are cpu, cuda"),
    ],
)
def test_environment_variable(backend: str, message: str) -> None:
    """A wrong one is an error of the first call, not of the import."""
    program = (
        "import torch, d3net_kernels as dk\nprint('imported')\n"
        "dk.multidilated_conv2d([torch.randn(1, 1, 2, 2)], torch.randn(1, 1, 3, 3))"
    )
    run = _python(program, PACKAGE.parent, D3NET_KERNELS_BACKEND=backend)
    assert run.stdout.strip() == "imported"
    assert message in run.stderr


@pytest.mark.parametrize("command", ["info", "verify", "--help"])
def test_command_line(command: str, without_binary: Path) -> None:
    """Also without a binary; verify then says that it had no kernels to check."""
    run = subprocess.run(
        [sys.executable, "-m", "d3net_kernels", command],
        cwd=without_binary,
        env=os.environ | {"PYTHONPATH": str(without_binary), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == (command == "verify"), run.stderr
    if command == "verify":
        assert (
            "cpu        not checked: there is no compiled" in run.stdout or "not load" in run.stdout
        )
        assert "no kernels were checked" in run.stdout
    assert "verify" in run.stdout or "reference" in run.stdout
