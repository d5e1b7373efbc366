"""Words for the machine that a measurement was taken on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from d3net_kernels import _binary


def describe_machine() -> str:
    """The processor, torch's threads, the instruction set of the kernels, torch's version."""
    absent = _binary.missing is not None
    isa = "no compiled kernels" if absent else torch.ops.d3net_kernels.cpu_isa("")
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} threads, {isa}, torch {torch.__version__}"


def processor_name() -> str:
    """The model's name on Linux, the architecture elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
