"""The Triton kernels as compiled for GPUs: their PTX executed on the CPU, their resources.

Triton compiles for any architecture anywhere; what differs from a GPU is the machine that executes.
Most cases are slow because every dtype, layout and block size is a kernel to compile; README.md
says how long they take.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import grid
import pytest
import torch

import gpu

pytest.importorskip("triton", reason="pip install triton")

from d3net_kernels.backends.triton import configs, launch, prepared
from d3net_kernels.precision import PRECISIONS

from .triton_driver import Launch, emulated, static_resources

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
needs_engine = pytest.mark.skipif(gpu.why_no_engine() is not None, reason=str(gpu.why_no_engine()))

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
KINDS = {  # dtype, and the precision that the operators are given
    **{str(dtype).removeprefix("torch."): (dtype, PRECISIONS["highest"]) for dtype in DTYPES},
    "tf32": (torch.float32, PRECISIONS["high"]),
}
SHIPPED_FOR = ("sm_80", "sm_90")
MEMORY = {  # how all sources lie, in the words of grid.LAYOUTS; "mixed" takes turns
    "planes": "contiguous",
    "fours": "contiguous",  # rows start at multiples of four numbers, or of two, but no more
    "pairs": "contiguous",
    "odd": "contiguous",  # of an odd number of pixels, which are loaded one by one
    "last": "channels_last",
    "strided": "every_other",
    "mixed": "",
}
SIZES = {"fours": (31, 60), "pairs": (31, 62), "odd": (31, 63)}  # by MEMORY, else 32 x 64
# Sources and outputs: a layer of D3Net for every bucket of outputs of configs.py, and blocks of
# outputs in two pieces beside them.
LAYERS = {
    "narrow": ([32, 12, 12], 12),
    "middle": ([64, 36, 36, 36], 36),
    "44": ([20, 44, 44], 44),
    "broad": ([128, 64], 64),
    "72": ([48, 40], 72),
    "96": ([64, 96], 96),
}
DEFAULT = {  # by architecture, cases of the grid that are not slow
    "sm_80": ("bfloat16_psi_float32_wide_contiguous", "one_source"),
    "sm_90": ("bfloat16_psi_float32_wide_contiguous",),
}


@needs_engine
@pytest.mark.parametrize(
    ("arch", "case"),
    [
        pytest.param(
            arch,
            case,
            marks=() if case.name in names else pytest.mark.slow,
            id=f"{arch}-{case.name}",
        )
        for arch, names in DEFAULT.items()
        for case in grid.CASES
    ],
)
def test_right(arch: str, case: grid.Case, generator: torch.Generator) -> None:
    problem = case.problem(generator)
    with emulated(arch) as emulator:
        results = grid.direct(launch, problem)
    grid.assert_right(problem, results)
    if case.dtype == torch.bfloat16 and problem.grad_output.numel() > 0:
        instruction = "mma.sync.aligned.m16n8k16"
        assert any(instruction in done.texts["ptx"] for done in emulator.launches)


@needs_engine
@pytest.mark.parametrize("offset", [0, 1e3])
@pytest.mark.parametrize(
    ("dtype", "outputs"), [(torch.bfloat16, 12), (torch.float32, 36), (torch.float64, 5)]
)
def test_moments(
    dtype: torch.dtype, outputs: int, offset: float, generator: torch.Generator
) -> None:
    """On ragged tiles, of one block of outputs and of two."""
    psi = "same" if dtype == torch.float64 else "float32"
    case = grid.Case("", (19, 12), outputs, (2, 9, 35), dtype=dtype, psi=psi, needs=())
    problem = case.problem(generator)
    assert problem.bias is not None
    problem.bias.add_(offset)
    dilations = [d for pair in problem.dilations for d in pair]
    rest = (dilations, problem.scale, problem.shift, problem.relu, 0)
    with emulated("sm_80"):
        out, mean, var = launch.forward_with_moments(
            problem.inputs, problem.weight, problem.bias, *rest
        )
    grid.assert_right(problem, {"out": out})
    grid.assert_moments(out, mean, var)


@needs_engine
def test_wgmma(generator: torch.Generator) -> None:
    """Where a configuration has the warps for it."""
    case = grid.Case(
        "",
        channels=(20,),
        out_channels=64,
        size=(1, 6, 30),
        dtype=torch.bfloat16,
        psi="float32",
        needs=(),
    )
    problem = case.problem(generator)
    with emulated("sm_90") as emulator:
        grid.assert_right(problem, grid.direct(launch, problem))
    assert "wgmma.mma_async" in emulator.launches[-1].texts["ptx"]


@needs_engine
@pytest.mark.parametrize(
    "options",
    [
        {"order": "reverse", "blocks": "reverse", "cp_async": "early"},
        {"order": "random", "blocks": "random", "cp_async": "random", "lanes": "reverse"},
    ],
    ids=["reverse", "random"],
)
def test_same_bits_in_any_order(options: dict[str, Any], generator: torch.Generator) -> None:
    """Of warps, lanes, blocks and copies: nothing depends on what the hardware leaves open."""
    case = next(c for c in grid.CASES if c.name == DEFAULT["sm_80"][0])
    problem = case.problem(generator)
    with emulated("sm_80"):
        expected = grid.direct(launch, problem)
    with emulated("sm_80", **options):
        results = grid.direct(launch, problem)
    for name, result in expected.items():
        assert torch.equal(result, results[name]), name


@needs_engine
def test_numbers_of_sources_make_few_kernels(generator: torch.Generator) -> None:
    """Channels, dilations and strides are no reason to compile, nor is one more source."""
    texts: set[str] = set()
    for channels, dilations in (((5, 7, 6), None), ((16, 1, 3, 2), ((1, 3), 16, 2, 1))):
        case = grid.Case("", channels=channels, out_channels=6, dilations=dilations, needs=())
        problem = case.problem(generator)
        with emulated("sm_80") as emulator:
            grid.assert_right(problem, grid.direct(launch, problem))
        texts.update(done.texts["ptx"] for done in emulator.launches)
    assert len(texts) == 2  # prepare and forward


def compiled(
    arch: str,
    dtype: torch.dtype,
    layer: str,
    layout: str = "planes",
    kernel: int = 3,
    precision: int = 0,
) -> list[Launch]:
    """The three kernels of a layer and what prepares for them, compiled and not executed."""
    channels, outputs = LAYERS[layer]
    size = SIZES.get(layout, (32, 64))

    def image(c: int, layout: str) -> torch.Tensor:
        lay_out = grid.LAYOUTS[MEMORY[layout]]
        return lay_out(torch.empty(2, c, *size, dtype=dtype))

    layouts = itertools.cycle(["planes", "last"] if layout == "mixed" else [layout])
    inputs = [image(c, own) for c, own in zip(channels, layouts, strict=False)]
    weight = torch.empty(outputs, sum(channels), kernel, kernel, dtype=dtype)
    scale = torch.empty(sum(channels))
    dilations = [d for i in range(len(channels)) for d in (1 << i, 1 << i)]
    options = (dilations, scale, scale, True, precision)
    grad_output = image(outputs, "planes")
    with emulated(arch, execute=False) as emulator:
        launch.forward(inputs, weight, weight[:, 0, 0, 0], *options)
        launch.forward_with_moments(inputs, weight, weight[:, 0, 0, 0], *options)
        launch.backward_data(grad_output, inputs, weight, *options, [1] * len(inputs))
        launch.backward_weight(grad_output, inputs, weight, *options)
    return emulator.launches


def spilling(arch: str, launches: list[Launch]) -> list[str]:
    """The kernels that keep registers in memory."""
    found = []
    for done in launches:
        used = static_resources(done, arch)
        if used.spill_stores or used.spill_loads:
            found.append(f"{done.name}: {used}")
    return found


@pytest.mark.parametrize("layer", ["middle", "44"])
@pytest.mark.parametrize("arch", SHIPPED_FOR)
def test_no_spills(arch: str, layer: str) -> None:
    assert spilling(arch, compiled(arch, torch.bfloat16, layer)) == []


@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", SHIPPED_FOR)
def test_no_spills_in_any_variant(
    arch: str, kind: str, layer: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the shipped configurations: all layouts, 64-bit offsets, TF32, 5x5."""
    dtype, precision = KINDS[kind]
    for module in (launch, prepared):
        monkeypatch.setattr(module, "need_wide_offsets", lambda _: wide)
    of_layer = functools.partial(compiled, arch, dtype, layer, precision=precision)
    found = {layout: spilling(arch, of_layer(layout)) for layout in MEMORY}
    found["5x5"] = spilling(arch, of_layer(kernel=5))
    assert {variant: kernels for variant, kernels in found.items() if kernels} == {}


@pytest.mark.parametrize("layout", ["planes", "last"])
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            dtype, marks=() if dtype == torch.bfloat16 else pytest.mark.slow, id=str(dtype)
        )
        for dtype in DTYPES
    ],
)
@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_compiles(arch: str, dtype: torch.dtype, layout: str) -> None:
    """For Blackwell and for AMD's MI300, whose code nothing here can execute."""
    kernels = compiled(arch, dtype, "middle", layout)
    assert {done.name for done in kernels} == {"prepare", "finish_moments", *configs.KERNELS}
    kind = "amdgcn" if arch.startswith("gfx") else "ptx"
    assert all(done.name in done.texts[kind] for done in kernels)
