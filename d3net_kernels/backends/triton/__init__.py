"""The Triton kernels: compiled when first needed, for GPUs that no binary was built for.

Where no compiled CUDA kernels are registered the dispatcher comes here with CUDA tensors (which
ROCm's are too, to torch); elsewhere use_backend("triton") does. With TRITON_INTERPRET=1 Triton runs
the kernels on CPU tensors, to be tested and debugged.

dispatch.py registers, launch.py starts on what prepared.py has laid out, kernels/ is what runs,
configs.py says in which block sizes, tune.py finds better ones.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import checks

OLDEST_CAPABILITY = (8, 0)  # the first with bfloat16 and TF32
MOST_SOURCES = 64  # their numbers travel as arguments of the kernel: 8 KB of 32


def interpreted() -> bool:
    """Whether Triton runs kernels in Python on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(tensors: Sequence[Tensor]) -> str | None:
    """The reason why this backend cannot serve `tensors`, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if not interpreted() and not torch.cuda.is_available():
        return (
            "torch finds no GPU here (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"
        )
    wanted = "cpu" if interpreted() else "cuda"
    for t in tensors:
        if t.device.type != wanted:
            return f"a tensor is on {t.device}; the triton backend serves {wanted} tensors here"
        if t.dtype not in checks.ACCEPTED_DTYPES:
            return f"a tensor has dtype {t.dtype}, for which there is no kernel"
        # torch.compile must not trace this question to the driver; the launch asks it again.
        ask_driver = wanted == "cuda" and not torch.compiler.is_compiling()
        if ask_driver and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(t.device)
            if capability < OLDEST_CAPABILITY:
                name, (major, minor) = torch.cuda.get_device_name(t.device), capability
                return f"{name} is sm_{major}{minor}; the kernels need sm_80 or newer"
    if len(tensors) > MOST_SOURCES:
        return f"there are {len(tensors)} sources; the kernels take at most {MOST_SOURCES}"
    return None
