"""How csrc/cuda cuts the work: the plan of its host program, recorded without a GPU or nvcc."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace

import grid
import pytest
import torch
from gpu.cuda_program import CSRC, Program, source_of
from gpu.toolchain import host_compiler
from torch import Tensor

from d3net_kernels.__main__ import KINDS_ON_GPU, VERIFIED, VERIFIED_ON_GPU

pytestmark = pytest.mark.skipif(
    shutil.which(host_compiler()) is None, reason=f"no C++ compiler {host_compiler()}"
)


class Recorded:
    """Keeps launches instead of running them."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, int, int, int]] = []

    def __call__(
        self,
        kernel: str,
        blocks: int,
        threads: int,
        shared: int,
        arguments: bytes,
        buffers: Mapping[str, Tensor],
    ) -> None:
        assert len(arguments) <= 4096, "kernel parameters hold 4 KiB on every architecture"
        self.launches.append((kernel, blocks, threads, shared))

    def kernels(self) -> set[str]:
        return {kernel for kernel, *_ in self.launches}


def record(
    case: grid.Case,
    *,
    capability: int = 80,
    multiprocessors: int = 108,
    tf32: bool = False,
    moments: bool = False,
) -> Recorded:
    launches = Recorded()
    problem = case.problem(torch.Generator().manual_seed(0))
    program = Program(launches, capability, multiprocessors, tf32=tf32)
    program.results(problem, moments=moments)
    return launches


def half(**arguments: object) -> grid.Case:
    defaults = {"channels": (20, 9), "size": (1, 12, 64), "dtype": torch.bfloat16}
    return grid.Case("", **(defaults | arguments))  # type: ignore[arg-type]


def takes_tensor_cores(case: grid.Case, capability: int = 80) -> bool:
    kernels = record(case, capability=capability).kernels()
    return any(kernel.startswith("tensor_forward") for kernel in kernels)


@pytest.mark.parametrize(
    ("case", "capability", "expected"),
    [
        (half(), 80, True),
        (half(dtype=torch.float16), 90, True),
        (half(layout="shared"), 120, True),
        (half(dilations=(3, 16)), 80, True),
        (half(dilations=(32, 128)), 80, True),
        (half(dilations=((12, 70), (20, 64))), 80, True),  # taps beyond the map have no dilation
        (half(dilations=(1, 21)), 80, True),
        (half(size=(1, 12, 63)), 80, True),
        (half(size=(1, 1, 1)), 80, True),
        (half(layout="channels_last"), 80, True),
        (half(layout="transposed"), 80, True),
        (half(layout="every_other", grad_layout="rows_expanded"), 80, True),
        (half(), 75, False),
        (half(dtype=torch.float32), 80, False),
        (half(kernel=(3, 1)), 80, False),
        (half(kernel=(5, 5)), 80, False),
        (half(dilations=((1, 2), (2, 2))), 80, False),
    ],
)
def test_path(case: grid.Case, capability: int, expected: bool) -> None:
    assert takes_tensor_cores(case, capability) is expected


FLOAT32 = {
    "direct_forward_float32",
    "direct_backward_data_float32",
    "direct_backward_weight_float32",
}
TF32 = {
    "tensor_forward_relu_2x8_tf32",
    "tensor_backward_data_3x6_tf32",
    "tensor_weight_relu_tf32",
}


@pytest.mark.parametrize(
    ("tf32", "capability", "arguments", "expected"),
    [
        (False, 80, {}, FLOAT32),
        (True, 80, {}, TF32),
        (True, 120, {"layout": "channels_last"}, TF32),
        (True, 75, {}, FLOAT32),
        (True, 80, {"kernel": (5, 5)}, FLOAT32),
    ],
)
def test_float32_goes_to_tensor_cores_where_torch_allows_tf32(
    tf32: bool, capability: int, arguments: dict[str, object], expected: set[str]
) -> None:
    case = half(**({"dtype": torch.float32, "out_channels": 12} | arguments))
    kernels = record(case, capability=capability, tf32=tf32).kernels()
    assert {k for k in kernels if k.startswith(("direct_", "tensor_"))} == expected


@pytest.mark.parametrize(
    ("outputs", "tile"),
    [(2, "1x8"), (8, "1x8"), (13, "2x8"), (24, "3x6"), (32, "4x4"), (36, "5x4")],
)
def test_tile_has_least_padding(outputs: int, tile: str) -> None:
    assert f"tensor_forward_relu_{tile}_bfloat16" in record(half(out_channels=outputs)).kernels()


def test_a_plan_can_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3NET_KERNELS_CUDA_PLAN", "tiles=2,parts=3")
    launches = record(half(out_channels=36)).launches
    assert "tensor_forward_relu_2x8_bfloat16" in {kernel for kernel, *_ in launches}
    (blocks,) = (blocks for kernel, blocks, *_ in launches if kernel.startswith("tensor_weight"))
    assert blocks == 3 * 3  # 20 and 9 channels are three chunks


@pytest.mark.parametrize(
    "plan", ["tiles=6", "tiles=0", "tiles", "parts=", "parts=-1", "parts=2x", "rows=4", "tiles=1,,"]
)
def test_a_plan_that_makes_no_sense(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3NET_KERNELS_CUDA_PLAN", plan)
    with pytest.raises(RuntimeError, match=f'is "{plan}"; accepted are tiles=1 to tiles=5'):
        record(half())


def test_blocks_cover_the_map_once() -> None:
    launches = record(half(size=(3, 13, 132), out_channels=72, needs=())).launches
    (blocks,) = (blocks for kernel, blocks, *_ in launches if kernel.startswith("tensor_forward"))
    tiles = {kernel.split("_")[-2] for kernel, *_ in launches if kernel.startswith("tensor")}
    ((columns, rows),) = (map(int, tile.split("x")) for tile in tiles)
    jobs = -(-72 // (8 * columns))
    assert blocks == 3 * -(-13 // rows) * -(-132 // 64) * jobs


def test_two_blocks_fit_an_a100() -> None:
    for outputs in range(1, 100):
        for kernel, _, _, shared in record(half(out_channels=outputs)).launches:
            assert 2 * (shared + 1024) <= 164 << 10, kernel


def test_many_sources_upload_in_pieces() -> None:
    launches = record(grid.Case("", channels=(1,) * 100, size=(1, 3, 5), needs=())).launches
    assert sum(kernel == "upload_table" for kernel, *_ in launches) == 2  # 100 * 64 B and one job


def listed_kernels() -> set[str]:
    """The names in kernels.h, spelled out by the preprocessor."""
    text = f'#include "{CSRC}/cuda/kernels.h"\n#define NAME(KERNEL, PARAMS) @KERNEL\n'
    text += "D3NET_CUDA_KERNELS(NAME)\n"
    command = [host_compiler(), "-E", "-P", "-x", "c++", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return set(re.findall(r"@\s*(\w+)", done.stdout))


def test_every_kernel_has_a_source() -> None:
    for kernel in listed_kernels():
        assert kernel in source_of(kernel).read_text() or kernel in _instantiated(kernel), kernel


def _instantiated(kernel: str) -> set[str]:
    """What the macros of an instantiation file make."""
    words = re.findall(r"D3NET_\w+_KERNELS\(([^)]*)\)", source_of(kernel).read_text())
    (arguments,) = (re.split(r",\s*", word) for word in words)
    if len(arguments) == 2:
        return {
            f"direct_{name}_{arguments[1]}"
            for name in ("forward", "backward_data", "backward_weight")
        }
    tile, dtype = f"{arguments[0]}x{arguments[1]}", arguments[2]
    names = ("forward", "forward_relu", "backward_data")
    return {f"tensor_{name}_{tile}_{dtype}" for name in names}


def test_verify_runs_every_kernel() -> None:
    """`python -m d3net_kernels verify` on a GPU leaves no kernel out."""
    run = set()
    for kind, dtype in KINDS_ON_GPU.items():
        for channels, out_channels, size, kernel in (*VERIFIED, *VERIFIED_ON_GPU):
            case = grid.Case("", tuple(channels), out_channels, size, (kernel, kernel), dtype=dtype)
            for relu in (True, False):
                run |= record(replace(case, relu=relu), tf32=kind == "tf32", moments=True).kernels()
    assert run == listed_kernels()
