"""Fresh random numbers in every session, repeatable by the seed in the header."""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Iterator

import pytest
import torch

from d3net_kernels.backends import triton

SEED = int(os.environ.get("D3NET_KERNELS_TEST_SEED") or secrets.randbits(31))


def pytest_report_header() -> str:
    return f"d3net_kernels: D3NET_KERNELS_TEST_SEED={SEED}, torch {torch.__version__}"


if triton.interpreted():
    import triton_interpreter

    triton_interpreter.make_device_calls_cheap()
    triton_interpreter.add_in_pairs()


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers of this test: the session's seed and the test's own name."""
    return torch.Generator().manual_seed(SEED ^ zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """One instruction set of the CPU in force; skipped where the machine lacks it."""
    cpu_isa = torch.ops.d3net_kernels.cpu_isa
    before = cpu_isa("")
    try:
        forced = cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield forced
    cpu_isa(before)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed torch's global generator too, and use one thread: the problems are small."""
    torch.manual_seed(SEED ^ zlib.crc32(request.node.nodeid.encode()))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
