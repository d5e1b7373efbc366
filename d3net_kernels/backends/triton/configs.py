"""How large the blocks of a kernel are: shipped, or tuned on this machine; pure functions.

Tuned sizes lie in $D3NET_KERNELS_CACHE (default: d3net_kernels in $XDG_CACHE_HOME or ~/.cache), one
file for every device name, torch and triton version and KERNELS_VERSION;
`python -m d3net_kernels tune` writes it.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

KERNELS = ("forward", "backward_data", "backward_weight")
KERNELS_VERSION = 4  # to be raised where other block sizes may be the best ones for the kernels
GRAIN = 16  # channels that the weight gradient's workspace and blocks come in
MOST_TAPS = 3  # of a column of them, in one program of the weight gradient
_SHARED = 32  # a program's common work, in outputs: what reading a pixel for all of them is worth
_WAVES = 4  # programs a multiprocessor should get of the weight gradient, where rows allow it


class Config(NamedTuple):
    """Block sizes and compiler options of one launch.

    pixels: those of a tile, or of a piece of a row in the weight gradient. channels: those of a
    chunk, or of the largest block in the weight gradient.
    warps, stages: Triton's num_warps and num_stages.
    """

    pixels: int
    channels: int
    warps: int
    stages: int


class Key(NamedTuple):
    """What a configuration depends on; `outputs` are those of one program.

    scattered: the kernel reads or writes elements one by one, or less than 8 bytes at once, or with
    64-bit offsets.
    """

    kernel: str
    arch: str
    dtype: torch.dtype
    outputs: int
    scattered: bool = False

    @property
    def bucket(self) -> int:
        """The number of the first bucket that holds the outputs, or of the last one."""
        buckets = _BUCKETS[self.kernel]
        return min(sum(self.outputs > most for most in buckets), len(buckets) - 1)

    @property
    def name(self) -> str:
        """Kernel, dtype and bucket of outputs: what tuned files call it."""
        dtype = str(self.dtype).removeprefix("torch.")
        name = f"{self.kernel}/{dtype}/{_BUCKETS[self.kernel][self.bucket]}"
        return name + ("/scattered" if self.scattered else "")


# Outputs of a program, up to. The weight gradient keeps sums of all of them for every tap: one warp
# has the registers for 40.
_BUCKETS = {
    "forward": (16, 48, 64, 96),
    "backward_data": (16, 48, 96),
    "backward_weight": (16, 40, 96),
}

# Chosen by spills, counted traffic and instructions: nothing spills on sm_80 and sm_90, whatever
# the layout (see tests/gpu). The same for both. Two warps cannot take wgmma on sm_90, and are
# better off: counted on layers of D3Net-S, shared memory bounds them by 0.46 ns a pixel, and by
# 0.63 (blocks of 32 + 8 outputs) or 0.55 (one of 64) the wgmma of four, which reads a tile anew
# for every block.
_INTERPRETER = {
    "forward": Config(1024, 64, 1, 1),
    "backward_data": Config(1024, 64, 1, 1),
    "backward_weight": Config(256, 64, 1, 1),
}
# By the bytes of an element, the kernel, and the bucket of outputs.
_SHIPPED = {
    2: {
        "forward": (
            Config(256, 16, 2, 3),
            Config(128, 16, 2, 3),
            Config(128, 16, 4, 3),
            Config(128, 16, 4, 3),
        ),
        "backward_data": (Config(256, 16, 2, 3), Config(128, 16, 2, 3), Config(128, 16, 4, 3)),
        "backward_weight": (Config(32, 16, 1, 2), Config(16, 32, 1, 2), Config(16, 32, 2, 2)),
    },
    4: {
        "forward": (
            Config(64, 16, 4, 3),
            Config(64, 16, 4, 2),
            Config(64, 16, 4, 2),
            Config(64, 16, 4, 3),
        ),
        "backward_data": (Config(64, 16, 4, 2), Config(64, 16, 4, 2), Config(64, 16, 8, 2)),
        "backward_weight": (Config(32, 16, 4, 2), Config(16, 16, 4, 2), Config(16, 16, 8, 2)),
    },
    8: {
        "forward": (
            Config(32, 16, 4, 2),
            Config(32, 16, 4, 2),
            Config(64, 16, 4, 3),
            Config(64, 16, 4, 3),
        ),
        "backward_data": (Config(32, 16, 4, 2),) * 3,
        "backward_weight": (Config(32, 16, 4, 2), Config(32, 16, 4, 2), Config(32, 16, 8, 2)),
    },
}
# Elements of scattered tensors have offsets of their own, in registers: fewer elements a thread.
_SCATTERED = {
    2: {
        "forward": (
            Config(64, 16, 4, 3),
            Config(128, 16, 4, 3),
            Config(128, 16, 4, 3),
            Config(128, 16, 4, 3),
        ),
        "backward_data": (Config(64, 16, 4, 2), Config(32, 16, 4, 2), Config(16, 16, 4, 2)),
        "backward_weight": (Config(32, 16, 2, 2), Config(16, 32, 2, 2), Config(16, 32, 4, 2)),
    },
    4: {
        "forward": (
            Config(64, 16, 4, 3),
            Config(64, 16, 4, 2),
            Config(64, 16, 8, 2),
            Config(64, 16, 8, 2),
        ),
        "backward_data": (Config(64, 16, 4, 2), Config(32, 16, 4, 2), Config(16, 16, 4, 2)),
        "backward_weight": (Config(32, 16, 4, 2), Config(16, 16, 4, 2), Config(16, 16, 8, 2)),
    },
    8: {
        "forward": (
            Config(32, 16, 4, 2),
            Config(32, 16, 4, 2),
            Config(64, 16, 4, 3),
            Config(64, 16, 4, 3),
        ),
        "backward_data": (Config(32, 16, 4, 2), Config(32, 16, 4, 2), Config(16, 16, 4, 2)),
        "backward_weight": (Config(32, 16, 4, 2), Config(16, 16, 4, 2), Config(16, 16, 8, 2)),
    },
}


def config_for(key: Key, device: torch.device) -> Config:
    """The tuned configuration of `key` on `device` where there is one, else the shipped one."""
    if key.arch == "interpreter":
        return _INTERPRETER[key.kernel]
    return tuned(device).get(key.name) or shipped(key)


def shipped(key: Key) -> Config:
    """The configuration that comes with the package."""
    by_bytes = _SCATTERED if key.scattered else _SHIPPED
    return by_bytes[key.dtype.itemsize][key.kernel][key.bucket]


def output_blocks(groups: Sequence[int]) -> tuple[int, int]:
    """BLOCK and REST of the kernels, for outputs in groups each of which fills whole blocks."""
    return _blocks(groups, 8, 64)


def convolved_blocks(groups: Sequence[int], arch: str, dtype: torch.dtype) -> tuple[int, int]:
    """Those of the forward pass and the data gradient: halves instead of one block on sm_8x.

    There Triton prefetches the operands of a loop's only product from shared memory, 16 bits at a
    time: 76 of 252 machine instructions with 16 outputs. It leaves a loop of two products alone.
    """
    block, rest = output_blocks(groups)
    alone = rest == 0 and block > 8
    if alone and dtype.itemsize == 2 and arch.startswith("sm_8"):
        return block // 2, block // 2
    return block, rest


def channel_blocks(groups: Sequence[int], largest: int, rest: bool) -> tuple[int, int]:
    """The like for the channels of sources in the weight gradient; without `rest`, one block."""
    return _blocks(groups, GRAIN, largest, rest)


def _blocks(
    groups: Sequence[int], smallest: int, largest: int, rest: bool = True
) -> tuple[int, int]:
    """A power of two from `smallest` to `largest`, and 0 or a smaller one, to cover all groups.

    A program costs what it covers, in vain too, and what it does once for all of that.
    """

    def cost(pieces: tuple[int, int]) -> tuple[int, int]:
        programs = sum(-(-group // sum(pieces)) for group in groups)
        return programs * (sum(pieces) + _SHARED), pieces[1]

    powers = [1 << i for i in range(smallest.bit_length() - 1, largest.bit_length())]
    smaller = powers if rest else []
    return min(((b, r) for b in powers for r in (0, *smaller) if r < b), key=cost)


def slabs(device: torch.device, programs: int, rows: int) -> int:
    """Into how many slabs the weight gradient's rows go, each with so many programs."""
    wanted = _WAVES * _multiprocessors(device)
    return max(1, min(rows, -(-wanted // programs)))


def arch_of(device: torch.device) -> str:
    """The architecture of a device, as in "sm_90" or "gfx942"; "interpreter" for the CPU."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 16
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def cache_file(device: torch.device) -> Path:
    """Where the tuned configurations of `device` are kept."""
    import triton

    given = os.environ.get("D3NET_KERNELS_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(given) if given else user / "d3net_kernels"
    name = (
        f"{torch.cuda.get_device_name(device)}-torch{torch.__version__}-triton{triton.__version__}"
        f"-kernels{KERNELS_VERSION}"
    )
    return folder / "triton" / (re.sub(r"[^\w.+-]+", "_", name) + ".json")


@functools.cache
def tuned(device: torch.device) -> dict[str, Config]:
    """The tuned configurations of `device` by name, read once a process."""
    return read(cache_file(device))


def read(path: Path) -> dict[str, Config]:
    """What write() wrote; empty where there is no such file, or (with a warning) a damaged one."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        return _damaged(path, error)
    try:
        configs = {name: Config(**numbers) for name, numbers in json.loads(text).items()}
        for name, config in configs.items():
            if not all(type(n) is int and n > 0 and n & (n - 1) == 0 for n in config[:3]):
                raise ValueError(f"{config} holds numbers that are no powers of two")
            if type(config.stages) is not int or config.stages < 1:
                raise ValueError(f"{config} holds no number of stages")
            if name.startswith("backward_weight/") and min(config.pixels, config.channels) < GRAIN:
                raise ValueError(f"{name} has fewer than {GRAIN} pixels or channels: {config}")
    except (ValueError, TypeError, AttributeError) as error:
        return _damaged(path, error)
    return configs


def write(path: Path, configs: dict[str, Config]) -> None:
    """Replace a file of tuned configurations at once: readers see the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: config._asdict() for name, config in configs.items()}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text + "\n")
    Path(file.name).replace(path)


def _damaged(path: Path, error: Exception) -> dict[str, Config]:
    warnings.warn(
        f"{path} is not used, the shipped configurations are: {error}; "
        "`python -m d3net_kernels tune` writes it anew",
        stacklevel=2,
    )
    return {}
