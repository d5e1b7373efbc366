"""How large the blocks of a kernel are: numbers that change its speed and never its result's rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

_SHARED = 32


class Config(NamedTuple):
    """Block sizes and compiler options of one launch.

    pixels: those of a tile, or of a step in the weight gradient. channels: those of a chunk, or of
    a block in the weight gradient. warps, stages: Triton's num_warps and num_stages.
    """

    pixels: int
    channels: int
    warps: int
    stages: int


def output_blocks(outputs: Sequence[int], largest: int = 64) -> tuple[int, int]:
    """BLOCK and REST of kernels.py for outputs that come in groups, each of which fills blocks.

    BLOCK is a power of two from 8 to `largest`, REST 0 or a smaller one. A program costs its
    outputs, padded ones too, and what it does once for all of them: as much as _SHARED outputs.
    """

    def cost(blocks: tuple[int, int]) -> tuple[int, int]:
        programs = sum(-(-group // sum(blocks)) for group in outputs)
        return programs * (sum(blocks) + _SHARED), blocks[1]

    powers = [1 << i for i in range(3, largest.bit_length())]
    return min(((b, r) for b in powers for r in (0, *powers) if r < b), key=cost)


def config_for(kernel: str, arch: str, dtype: torch.dtype, outputs: int) -> Config:
    if arch == "interpreter":
        return Config(1024, 64, 1, 1) if kernel != "backward_weight" else Config(256, 64, 1, 1)
    if dtype == torch.float64:
        return Config(32, 16, 4, 2)
    if kernel == "backward_weight":
        return Config(64, 64, 4, 3)
    return Config(128, 16, 4, 3)


def arch_of(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def slabs(device: torch.device, programs: int, rows: int) -> int:
    processors = (
        16 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
    )
    return max(1, min(rows, -(-4 * processors // programs)))


def patch_columns(height: int, width: int, pixels: int) -> int:
    """How wide a patch of `pixels` is that covers a map with the fewest padded ones."""

    def cost(columns: int) -> tuple[int, int]:
        rows = pixels // columns
        return -(-width // columns) * -(-height // rows), -columns

    return min((1 << i for i in range(3, pixels.bit_length())), key=cost)
