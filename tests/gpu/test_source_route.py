"""The kernels of csrc/cuda compiled for the CPU, under sanitizers: clean, and not blind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from d3net_kernels import numerics
from d3net_kernels.numerics import Problem

from . import toolchain
from .cuda_program import Executed, Program
from .planted import BUGS, NO_BUG, Bug
from .source_route import KernelSource, SanitizerError, launch, program

pytestmark = pytest.mark.skipif(
    bool(toolchain.why_no_nvcc() or toolchain.why_no_engine()),
    reason=str(toolchain.why_no_nvcc() or toolchain.why_no_engine()),
)

TENSOR = KernelSource(
    "tensor_forward_relu_1x8_bfloat16",
    "tensor_impl.cuh",
    "D3NET_TENSOR_KERNEL(tensor_forward_relu_1x8_bfloat16, d3net::cuda::bfloat16, 1, 8, true)",
)
TF32 = KernelSource(
    "tensor_forward_relu_1x8_tf32",
    "tensor_impl.cuh",
    "D3NET_TENSOR_KERNEL(tensor_forward_relu_1x8_tf32, d3net::cuda::tf32, 1, 8, true)",
)
WEIGHT = KernelSource(
    "tensor_weight_relu_bfloat16",
    "tensor_weight_impl.cuh",
    "D3NET_TENSOR_WEIGHT_KERNEL(tensor_weight_relu_bfloat16, d3net::cuda::bfloat16, true)",
)
DIRECT = tuple(
    KernelSource(name, file)
    for file, names in {
        "common.cu": (
            *("upload_table", "widen_coefficients", "pack_weights"),
            *("finish_sums", "finish_channel_moments"),
        ),
        "direct_float32.cu": (
            *("direct_forward_float32", "direct_backward_data_float32"),
            "direct_backward_weight_float32",
        ),
    }.items()
    for name in names
)


class FromSource(Executed):
    """Runs the kernels of one executable there, others on the PTX machine."""

    def __init__(
        self,
        kernels: tuple[KernelSource, ...],
        sanitizer: str,
        bug: Bug = NO_BUG,
        *,
        shared_fraction: int = 1,
        order: str = "forward",
        cp_async: str = "late",
    ) -> None:
        super().__init__()
        self._names = {kernel.name for kernel in kernels}
        self._executable: Path = program(kernels, sanitizer, bug)
        self._fraction, self._order, self._cp_async = shared_fraction, order, cp_async
        self.seen: set[str] = set()

    def __call__(
        self,
        kernel: str,
        blocks: int,
        threads: int,
        shared: int,
        arguments: bytes,
        buffers: Mapping[str, Tensor],
    ) -> None:
        if kernel not in self._names:
            super().__call__(kernel, blocks, threads, shared, arguments, buffers)
            return
        self.seen.add(kernel)
        launch(
            self._executable,
            kernel,
            (blocks,),
            (threads,),
            shared // self._fraction,
            arguments,
            buffers,
            order=self._order,
            cp_async=self._cp_async,
        )


def tensor_problem(generator: torch.Generator) -> Problem:
    """As small as shows everything: two sources, ragged tiles, an odd number of stages."""
    problem = numerics.random_problem(
        (16, 9, 3),
        7,
        (1, 9, 68),
        generator=generator,
        dtype=torch.bfloat16,
        psi_dtype=torch.float32,
    )
    for t in problem.tensors().values():
        t.requires_grad_(False)
    return problem


def is_right(
    problem: Problem, launched: FromSource, kernels: set[str], *, tf32: bool = False
) -> bool:
    results = Program(launched, tf32=tf32).results(problem)
    assert launched.seen == kernels, "the host chose other kernels: the test misses its target"
    return all(ratio <= 1 for ratio in numerics.error_ratios(problem, results, tf32=tf32).values())


@pytest.mark.parametrize("sanitizer", ["none", "address", "thread"])
@pytest.mark.parametrize(("order", "cp_async"), [("forward", "late"), ("random", "early")])
def test_tensor_kernel_is_clean(
    generator: torch.Generator, sanitizer: str, order: str, cp_async: str
) -> None:
    launched = FromSource((TENSOR,), sanitizer, order=order, cp_async=cp_async)
    assert is_right(tensor_problem(generator), launched, {TENSOR.name})


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_tf32_kernel_is_clean(generator: torch.Generator, sanitizer: str) -> None:
    launched = FromSource((TF32,), sanitizer, order="random", cp_async="early")
    problem = tensor_problem(generator).map(Tensor.float)
    assert is_right(problem, launched, {TF32.name}, tf32=True)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_weight_gradient_is_clean(generator: torch.Generator, sanitizer: str) -> None:
    """Several walks a block, cut at the map's border and between remainders."""
    problem = numerics.random_problem(
        (12,),
        7,
        (1, 7, 68),
        generator=generator,
        dilations=(3,),
        dtype=torch.bfloat16,
        psi_dtype=torch.float32,
    )
    for name, t in problem.tensors().items():
        t.requires_grad_(name in ("weight", "bias"))
    launched = FromSource((WEIGHT,), sanitizer, order="random", cp_async="early")
    assert is_right(problem, launched, {WEIGHT.name})


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_direct_kernels_are_clean(generator: torch.Generator, sanitizer: str) -> None:
    """Forward, both gradients, and everything around them."""
    problem = numerics.random_problem(
        (3, 2), 4, (1, 5, 9), generator=generator, psi_dtype=torch.float32
    )
    launched = FromSource(DIRECT, sanitizer)
    assert is_right(problem, launched, {k.name for k in DIRECT} - {"finish_channel_moments"})


FINDINGS = {
    "missing_syncthreads": ("thread", "data race"),
    "missing_syncthreads_before_epilogue": ("thread", "data race"),
    "off_by_one_store": ("address", "heap-buffer-overflow"),
    "off_by_one_load": ("address", "heap-buffer-overflow"),
    "missing_wait": ("none", "never waited for"),
}
QUICK = ("missing_syncthreads", "off_by_one_store", "missing_wait")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FINDINGS],
)
def test_bug_is_found(generator: torch.Generator, name: str) -> None:
    sanitizer, finding = FINDINGS[name]
    (bug,) = (bug for bug in BUGS if bug.name == name)
    with pytest.raises(SanitizerError, match=finding):
        Program(FromSource((TENSOR,), sanitizer, bug)).results(tensor_problem(generator))


@pytest.mark.parametrize("name", ["zero_padding_before_psi", "swapped_halves"])
def test_wrong_arithmetic_shows_in_the_result(generator: torch.Generator, name: str) -> None:
    (bug,) = (bug for bug in BUGS if bug.name == name)
    launched = FromSource((TENSOR,), "none", bug)
    assert not is_right(tensor_problem(generator), launched, {TENSOR.name})


def test_too_little_shared_memory_is_found(generator: torch.Generator) -> None:
    launched = FromSource((TENSOR,), "address", shared_fraction=2)
    with pytest.raises(SanitizerError, match="use-after-poison"):
        Program(launched).results(tensor_problem(generator))


def test_a_changed_kernel_does_not_hide_a_bug_that_no_longer_applies() -> None:
    (bug,) = (bug for bug in BUGS if bug.name == "missing_wait")
    moved = replace(bug, changes=(replace(bug.changes[0], old="wait_for_copies_of_yesterday();"),))
    with pytest.raises(LookupError, match="0 times, not once"):
        program((TENSOR,), "none", moved)
