"""What serves a GPU that the CUDA binary has no code for; the driver's answers are made up here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d3net_kernels import _binary, backends
from d3net_kernels.backends import cuda, triton

ON_GPU: Any = [SimpleNamespace(device=torch.device("cuda:0"))]
ON_CPU: Any = [SimpleNamespace(device=torch.device("cpu"))]


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A binary for sm_90 on a machine with an sm_86, and nothing warned of yet."""
    monkeypatch.setattr(_binary, "cuda_missing", None)
    monkeypatch.setattr(_binary, "_warned", set())
    monkeypatch.setattr(backends, "_forced", None)
    monkeypatch.setattr(cuda, "_serves", lambda device: False)
    monkeypatch.setattr(cuda, "archs", lambda: "sm_90")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    cuda.no_code_for.cache_clear()
    yield
    cuda.no_code_for.cache_clear()


REASON = (
    "the CUDA binary holds code for sm_90, Some GPU is sm_86; rebuild with TORCH_CUDA_ARCH_LIST=8.6"
)


def test_why_not_says_what_to_do() -> None:
    assert backends.why_not("cuda", *ON_GPU) == REASON


def test_triton_serves_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "why_not", lambda tensors: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.forced_for(ON_GPU) == "triton"


def test_else_plain_torch_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "why_not", lambda tensors: "triton is not installed")
    with pytest.warns(UserWarning, match=REASON):
        chosen = backends.forced_for(ON_GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = backends.forced_for(ON_GPU)
    assert chosen == again == "reference"


def test_a_binary_with_code_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_serves", lambda device: True)
    assert backends.forced_for(ON_GPU) is None


def test_without_the_binary_the_dispatcher_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_binary, "cuda_missing", "there is none")
    assert backends.forced_for(ON_GPU) is None


def test_other_devices_do_not_ask() -> None:
    assert backends.forced_for(ON_CPU) is None


def test_a_forced_backend_that_cannot_serve_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_forced", "cuda")
    with pytest.raises(RuntimeError, match=REASON):
        backends.forced_for(ON_GPU)
