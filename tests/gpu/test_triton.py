"""The Triton kernels as compiled for GPUs: their PTX executed on the CPU, their resources.

Triton compiles for any architecture anywhere; what differs from a GPU is the machine that executes.
"""

from __future__ import annotations

import grid
import pytest
import torch

import gpu

pytest.importorskip("triton")

from d3net_kernels.backends.triton import launch

from .triton_driver import emulated

pytestmark = [
    pytest.mark.skipif(gpu.why_no_engine() is not None, reason=str(gpu.why_no_engine())),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on"),
]

EXECUTED = (
    "one_source",
    "no_batch",
    "dilation_beyond_both",
    "dilation_pairs",
    "sixteen_sources",
    "uneven_sources",
    "growth_36",
    "growth_72",
    "kernel_1x1",
    "kernel_3x5",
    "psi_None_relu_True_bias_False",
    "psi_same_relu_False_bias_True",
    "layout_mixed_bfloat16",
    "layout_shared_last_bfloat16",
    "grad_all_expanded_of_channels_last",
    "float64_psi_same_wide_channels_last",
    "bfloat16_psi_float32_wide_contiguous",
    "bfloat16_psi_same_wide_channels_last",
    "float16_psi_None_wide_contiguous",
    "float16_psi_float32_wide_channels_last",
    "needs_inputs[0]_inputs[2]_bias",
)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "case",
    [
        case if case.name in EXECUTED else pytest.param(case, marks=pytest.mark.slow)
        for case in grid.CASES
    ],
    ids=lambda case: case.name,
)
def test_right(arch: str, case: grid.Case, generator: torch.Generator) -> None:
    problem = case.problem(generator)
    with emulated(arch):
        results = grid.direct(launch, problem)
    grid.assert_right(problem, results)
