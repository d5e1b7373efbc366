"""Bugs put into the tensor-core kernel of csrc/cuda have to be caught; without them it is right."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from d3net_kernels import numerics
from d3net_kernels.numerics import Problem

from . import toolchain
from .cuda_program import Executed, Program
from .module import Module, load
from .planted import BUGS, NO_BUG, WEIGHT_BUGS, Bug, patched_csrc, single_kernel
from .ptx.syntax import PtxError

pytestmark = pytest.mark.skipif(
    bool(toolchain.why_no_nvcc() or toolchain.why_no_engine()),
    reason=str(toolchain.why_no_nvcc() or toolchain.why_no_engine()),
)

KERNEL = "tensor_forward_relu_1x8_bfloat16"
INSTANTIATION = f"D3NET_TENSOR_KERNEL({KERNEL}, d3net::cuda::bfloat16, 1, 8, true)"
WEIGHT_KERNEL = "tensor_weight_relu_bfloat16"
WEIGHT_INSTANTIATION = f"D3NET_TENSOR_WEIGHT_KERNEL({WEIGHT_KERNEL}, d3net::cuda::bfloat16, true)"
ORDERS: list[dict[str, Any]] = [
    {},
    {"order": "reverse", "cp_async": "early", "blocks": "reverse"},
    {"order": "random", "cp_async": "random", "blocks": "random", "seed": 1},
]


@functools.cache
def ptx_with(bug: Bug) -> str:
    csrc = patched_csrc(bug)
    source = single_kernel(csrc, "tensor", "planted", INSTANTIATION)
    return toolchain.compile_ptx(source, "sm_80", includes=[csrc])


@functools.cache
def weight_ptx_with(bug: Bug) -> str:
    csrc = patched_csrc(bug)
    source = single_kernel(csrc, "tensor_weight", "planted_weight", WEIGHT_INSTANTIATION)
    return toolchain.compile_ptx(source, "sm_80", includes=[csrc])


class Replaced(Executed):
    """Executes one kernel from another module, with less shared memory if wanted."""

    def __init__(
        self, module: Module, shared_fraction: int = 1, replaced: str = KERNEL, **options: Any
    ) -> None:
        super().__init__(**options)
        self._module, self._fraction, self._given = module, shared_fraction, options
        self._replaced = replaced

    def __call__(self, kernel: str, blocks: int, threads: int, shared: int, *rest: Any) -> None:
        if kernel != self._replaced:
            super().__call__(kernel, blocks, threads, shared, *rest)
            return
        arguments, buffers = rest
        self.counters[kernel] = self._module.launch(
            kernel,
            grid=(blocks,),
            block=(threads,),
            args=[arguments],
            shared=shared // self._fraction,
            buffers=buffers,
            **self._given,
        )


def small_problem(generator: torch.Generator) -> Problem:
    """Ragged wherever the tensor-core path allows it.

    Its number of stages is odd: the last one reads the buffer that the epilogue overwrites.
    """
    problem = numerics.random_problem(
        (16, 9, 3),
        7,
        (2, 11, 76),
        generator=generator,
        dtype=torch.bfloat16,
        psi_dtype=torch.float32,
    )
    for t in problem.tensors().values():
        t.requires_grad_(False)
    return problem


def forward(problem: Problem, launch: Replaced) -> Tensor:
    out = Program(launch).results(problem)["out"]
    assert KERNEL in launch.counters, "the host chose another kernel: the test misses its target"
    return out


def is_right(problem: Problem, out: Tensor) -> bool:
    return numerics.error_ratios(problem, {"out": out})["out"] <= 1


@pytest.mark.parametrize("lanes", ["lockstep", "forward", "reverse", "random"])
def test_the_kernel_without_a_bug(generator: torch.Generator, lanes: str) -> None:
    """Right in every order, with the same bits."""
    problem = small_problem(generator)
    module = load(ptx_with(NO_BUG))
    orders = ORDERS if lanes == "lockstep" else ORDERS[-1:]
    outs = [forward(problem, Replaced(module, lanes=lanes, **order)) for order in orders]
    assert is_right(problem, outs[0])
    assert all(torch.equal(outs[0].view(torch.int16), out.view(torch.int16)) for out in outs)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_caught(generator: torch.Generator, bug: Bug) -> None:
    problem = small_problem(generator)
    module = load(ptx_with(bug))
    if bug.error:
        with pytest.raises(toolchain.engine().KernelError, match=bug.error):
            forward(problem, Replaced(module))
    else:
        assert not is_right(problem, forward(problem, Replaced(module)))


@pytest.mark.parametrize(
    "bug", [b for b in BUGS if b.name.startswith("missing_")], ids=lambda bug: bug.name
)
def test_missing_synchronisation_shows_without_the_race_detector(
    generator: torch.Generator, bug: Bug
) -> None:
    """The orders of execution and the times of copies alone tell."""
    problem = small_problem(generator)
    module = load(ptx_with(bug))
    caught = False
    for order in ("forward", "reverse", "random"):
        for when in ("late", "early"):
            launch = Replaced(module, races=False, order=order, cp_async=when)
            try:
                caught |= not is_right(problem, forward(problem, launch))
            except toolchain.engine().KernelError as error:  # the kernel ends before its copies do
                caught |= "never waited for" in str(error)
    assert caught


def weight_gradient_is_right(problem: Problem, module: Module) -> bool:
    launch = Replaced(module, replaced=WEIGHT_KERNEL)
    results = Program(launch).results(problem)
    assert WEIGHT_KERNEL in launch.counters, "the host chose another kernel"
    return all(ratio <= 1 for ratio in numerics.error_ratios(problem, results).values())


@pytest.mark.parametrize("bug", [NO_BUG, *WEIGHT_BUGS], ids=lambda bug: bug.name)
def test_bug_of_the_weight_gradient_is_caught(generator: torch.Generator, bug: Bug) -> None:
    """Walks of several remainders, of which one is cut, and several walks a block, each of an odd
    number of steps: the last one shares memory with the first of the next."""
    problem = numerics.random_problem(
        (16, 9),
        7,
        (2, 13, 76),
        generator=generator,
        dilations=(1, 3),
        dtype=torch.bfloat16,
        psi_dtype=torch.float32,
    )
    for name, t in problem.tensors().items():
        t.requires_grad_(name in ("weight", "bias"))
    module = load(weight_ptx_with(bug))
    if bug.error:
        with pytest.raises(toolchain.engine().KernelError, match=bug.error):
            weight_gradient_is_right(problem, module)
    else:
        assert weight_gradient_is_right(problem, module) is (bug is NO_BUG)


def test_too_little_shared_memory_is_caught(generator: torch.Generator) -> None:
    module = load(ptx_with(NO_BUG))
    with pytest.raises(
        toolchain.engine().KernelError, match="bytes of shared memory of this launch"
    ):
        forward(small_problem(generator), Replaced(module, shared_fraction=2))


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("fma.rn.f32", "fma.rp.f32", "modifier .rp is not supported"),
        ("cvt.rn.relu.bf16x2.f32", "cvt.rn.satfinite.bf16x2.f32", "modifier .satfinite"),
        ("bar.sync", "bar.arrive", "barriers are supported"),
        ("cp.async.cg.shared.global", "cp.reduce.async.bulk.global", "needs one of ca"),
        ("shfl.sync.bfly.b32", "frobnicate.b32", "instruction frobnicate is not supported"),
    ],
)
def test_an_unknown_instruction_is_named_with_its_line(old: str, new: str, what: str) -> None:
    ptx = ptx_with(NO_BUG)
    assert old in ptx
    line = ptx[: ptx.index(old)].count("\n") + 1
    module = load(ptx.replace(old, new, 1))
    with pytest.raises(PtxError, match=what) as caught:
        module.launch(KERNEL, grid=(1,), block=(128,), args=[b""])
    assert caught.value.line == line
