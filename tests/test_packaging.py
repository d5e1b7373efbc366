"""What setup.py builds, with and without torch and a compiler. Slow: each builds a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PARTS = ("csrc", "d3net", "d3net_kernels", "setup.py", "pyproject.toml", "MANIFEST.in")
BACKEND = "from setuptools import build_meta; build_meta.{hook}({folder!r})"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a source tree"),
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources without anything built."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in (*PARTS, "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def build(tree: Path, hook: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Calls the build backend as pip does."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("D3NET_KERNELS_")}
    return subprocess.run(
        [sys.executable, "-c", BACKEND.format(hook=hook, folder=str(tree / "dist"))],
        cwd=tree,
        env=own | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def without_torch(tree: Path) -> dict[str, str]:
    """An environment in which ``import torch`` fails, as in an isolated build."""
    blocker = tree.parent / "blocker"
    blocker.mkdir()
    (blocker / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    return {"PYTHONPATH": str(blocker)}


def only_wheel(tree: Path) -> Path:
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel


def test_wheel_without_torch_is_pure_and_says_why(
    tree: Path, without_torch: dict[str, str]
) -> None:
    done = build(tree, "build_wheel", **without_torch)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("d3net-kernels:"))
    assert "No module named 'torch'" in line
    assert "--no-build-isolation" in line
    assert only_wheel(tree).name.endswith("-py3-none-any.whl")


def test_wheel_without_compiler_is_pure_and_says_why(tree: Path) -> None:
    done = build(tree, "build_wheel", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "d3net-kernels: pure-Python build: the C++ build failed" in done.stderr
    assert only_wheel(tree).name.endswith("-py3-none-any.whl")


def test_binary_can_be_required(tree: Path, without_torch: dict[str, str]) -> None:
    done = build(tree, "build_wheel", D3NET_KERNELS_REQUIRE_BINARY="1", **without_torch)
    assert done.returncode != 0
    assert "No module named 'torch'" in done.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_wheel_holds_one_binary_for_all_pythons(tree: Path) -> None:
    done = build(tree, "build_wheel", D3NET_KERNELS_REQUIRE_BINARY="1", D3NET_KERNELS_CUDA="0")
    assert done.returncode == 0, done.stderr
    wheel = only_wheel(tree)
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")] == ["d3net_kernels/_C.abi3.so"]
    assert {"d3net/py.typed", "d3net_kernels/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_cuda_that_cannot_be_built_leaves_the_cpu_binary(tree: Path) -> None:
    asked = {"D3NET_KERNELS_CUDA": "1", "CUDA_HOME": str(tree / "no-such-toolkit")}
    done = build(tree, "build_wheel", **asked)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "no CUDA kernels" in line)
    assert "no-such-toolkit" in line or "build without CUDA" in line
    names = zipfile.ZipFile(only_wheel(tree)).namelist()
    assert [name for name in names if name.endswith(".so")] == ["d3net_kernels/_C.abi3.so"]


@pytest.mark.skipif(
    shutil.which("nvcc") is None or torch.version.cuda is None,
    reason="needs nvcc and a CUDA build of torch",
)
def test_cuda_binary_is_built_where_it_is_asked_for(tree: Path) -> None:
    asked = {"D3NET_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    done = build(tree, "build_wheel", D3NET_KERNELS_REQUIRE_BINARY="1", **asked)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(only_wheel(tree)).namelist()
    assert "d3net_kernels/_C_cuda.abi3.so" in names


def test_sdist_holds_the_kernels(tree: Path, without_torch: dict[str, str]) -> None:
    done = build(tree, "build_sdist", **without_torch)
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        held = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    sources = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()
    }
    assert sources <= held
