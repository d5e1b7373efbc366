"""The Triton kernels' entries in the report: a layer through d3net_kernels.backends.triton."""

from __future__ import annotations

import torch

from d3net_kernels.backends.triton import launch

from . import report
from .triton_driver import Launch, emulated, machine_code, static_resources


def family(arch: str) -> report.Family:
    """What executes a case as compiled for `arch`."""

    def execute(case: report.Case) -> list[report.Launched]:
        problem = case.problem()
        dilations = [d for pair in problem.dilations for d in pair]
        options = (dilations, problem.scale, problem.shift, problem.relu, int(case.tf32))
        inputs, weight = problem.inputs, problem.weight
        with torch.no_grad(), emulated(arch) as emulator:
            if case.operation == "forward":
                launch.forward(inputs, weight, problem.bias, *options)
            elif case.operation == "backward_data":
                wanted = [1] * len(inputs)
                launch.backward_data(problem.grad_output, inputs, weight, *options, wanted)
            else:
                launch.backward_weight(problem.grad_output, inputs, weight, *options)
        return [_launched(done, arch) for done in emulator.launches]

    return execute


def _launched(done: Launch, arch: str) -> report.Launched:
    assert done.counters is not None
    used = {arch: static_resources(done, arch)}
    sizes = 32 * done.warps, done.shared
    code = machine_code(done)
    return report.Launched(f"triton {done.name}", *sizes, done.counters, code, used)
