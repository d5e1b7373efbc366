"""The least time that counted work can take on a GPU: one bound a resource, the largest binds.

A bound is no prediction: it says that no counted resource forbids this time. Everything is counted
on emulated PTX, not measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.shapes import Shape

from .counters import Counters

_MACS = {  # of one warp instruction
    "mma.m16n8k16": 16 * 8 * 16,
    "mma.m16n8k8": 16 * 8 * 8,
    "mma.m16n8k4": 16 * 8 * 4,
    "mma.m8n8k4": 8 * 8 * 4,
}
# Of four warps: 64 x columns += 64 x 16 times 16 x columns, A in registers ("{") or, as B, shared.
_WGMMA = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<columns>\d+)k16\.f32\.(?P<kind>bf16|f16)\.\S+"
    r"\s*\{[^}]*\},\s*(?P<a>.)"
)


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU.

    capability as in the 80 of sm_80, clock in GHz (boost), dram in GB/s, tensor in dense TFLOP/s
    with float32 accumulation by type of the operands. `mma_share`: what mma.sync reaches of that at
    most (1 where nothing is known).
    Every SM: 128 bytes of shared memory or L1, 4 warp instructions and 64 bytes of L2 a clock (CUDA
    C++ Programming Guide, "Compute Capabilities"; L2: whitepapers, 5120 bytes a clock on A100).
    """

    name: str
    source: str
    capability: int
    multiprocessors: int
    clock: float
    dram: float
    tensor: dict[str, float]
    mma_share: float = 1.0


GPUS = (
    Gpu(
        "A100",
        "NVIDIA A100 Tensor Core GPU datasheet, SXM4 80 GB",
        *(80, 108, 1.41, 2039.0),
        {"bf16": 312.0, "f16": 312.0, "tf32": 156.0, "f64": 19.5},
    ),
    Gpu(
        "H100",
        "NVIDIA H100 Tensor Core GPU datasheet, SXM5, half of the rates with sparsity; share of "
        "mma.sync: Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture",
        *(90, 132, 1.83, 3350.0),
        {"bf16": 989.0, "f16": 989.0, "tf32": 494.0, "f64": 67.0},
        mma_share=0.62,
    ),
    Gpu(
        "RTX 4090",
        "NVIDIA Ada GPU Architecture whitepaper, appendix A",
        *(89, 128, 2.52, 1008.0),
        {"bf16": 165.2, "f16": 165.2, "tf32": 82.6, "f64": 1.3},
    ),
)


@dataclass(frozen=True)
class _Products:
    """Matrix instructions of one kind: multiply-adds, and bytes of operands in shared memory."""

    kind: str
    macs: int
    shared_bytes: int
    share_of_peak: float


def _products(counters: Counters, gpu: Gpu) -> Iterator[_Products]:
    """One entry for every matrix instruction of the PTX text."""
    for i in counters.instructions:
        shape, _, kind = i.operation.rpartition(".")
        if shape in _MACS:
            yield _Products(kind, i.issued * _MACS[shape], 0, gpu.mma_share)
        elif i.operation == "wgmma":  # of four warps, each of which counts as one that issued it
            found = _WGMMA.search(i.text)
            assert found, i.text
            columns, from_registers = int(found["columns"]), found["a"] == "{"
            read = 16 * columns + (0 if from_registers else 64 * 16)
            yield _Products(
                found["kind"], i.issued * 16 * columns * 16, i.issued * 2 * read // 4, 1.0
            )


def bounds(counters: Counters, gpu: Gpu, dram_bytes: int, issued: int) -> dict[str, float]:
    """Nanoseconds a resource needs at least, with work spread evenly over the whole GPU."""
    tensor = shared_bytes = 0.0
    for product in _products(counters, gpu):
        rate = gpu.tensor[product.kind] * product.share_of_peak * 1e3  # operations a nanosecond
        tensor += 2 * product.macs / rate
        shared_bytes += product.shared_bytes
    clocks = gpu.multiprocessors * gpu.clock  # of all SMs, a nanosecond
    shared = counters.shared_traffic.units + (counters.load_bytes + shared_bytes) / 128
    return {
        "tensor": tensor,
        "shared": shared / clocks,
        "issue": issued / 4 / clocks,
        "L2": counters.global_traffic.units / 2 / clocks,
        "DRAM": dram_bytes / gpu.dram,
    }


def ideal(shape: Shape, operation: str, kind: str, element_bytes: int, gpu: Gpu) -> float:
    """max(compulsory bytes / DRAM bandwidth, useful MACs / tensor peak), in nanoseconds."""
    time = 2 * useful_macs(shape) / (gpu.tensor[kind] * 1e3)
    return max(compulsory_bytes(shape, operation, element_bytes) / gpu.dram, time)


def useful_macs(shape: Shape) -> int:
    """Multiply-adds of a 3x3 layer whose tap lies inside the map: the same in all operations."""
    total = 0
    for channels, dilation in zip(shape.group_channels, shape.dilations, strict=True):
        live = 1
        for size in (shape.height, shape.width):
            live *= size + 2 * max(0, size - dilation)
        total += channels * live
    return total * shape.c_out


def compulsory_bytes(shape: Shape, operation: str, element_bytes: int) -> int:
    """What an operation has to read and to write, once each.

    forward: sources, weight, output. backward_data: grad_output, weight, the sources (for psi) and
    their gradients. backward_weight: sources, grad_output, the weight's gradient. Scale, shift,
    bias and their gradients in float32.
    """
    channels, pixels = sum(shape.group_channels), shape.height * shape.width
    maps = {"forward": 1, "backward_data": 2, "backward_weight": 1}[operation] * channels
    vectors = {
        "forward": 2 * channels + shape.c_out,
        "backward_data": 4 * channels,
        "backward_weight": 2 * channels + shape.c_out,
    }[operation]
    elements = (maps + shape.c_out) * pixels + 9 * channels * shape.c_out
    return elements * element_bytes + 4 * vectors


def composition_bytes(shape: Shape, element_bytes: int) -> int:
    """What plain torch moves for the forward pass: psi and a convolution a source, and a sum.

    psi reads and writes its source once (one fused elementwise kernel), the convolution reads that
    and writes a whole output, and each sum reads two outputs and writes one.
    """
    pixels, sources = shape.height * shape.width, len(shape.group_channels)
    channels = sum(shape.group_channels)
    elements = (3 * channels + sources * shape.c_out + 3 * (sources - 1) * shape.c_out) * pixels
    return (elements + 9 * channels * shape.c_out) * element_bytes
