"""GPU kernels without a GPU: see README.md."""

from .counters import Counters
from .module import Module, launch_triton, load, pointer
from .toolchain import compile_ptx, resources, why_no_engine, why_no_nvcc

__all__ = [
    "Counters",
    "Module",
    "compile_ptx",
    "launch_triton",
    "load",
    "pointer",
    "resources",
    "why_no_engine",
    "why_no_nvcc",
]
