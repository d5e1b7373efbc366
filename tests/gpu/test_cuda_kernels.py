"""Every kernel of csrc/cuda, executed as PTX, against float64: the small cases of the grid, and
those that the tensor-core kernels take.

Their host program chooses the kernels, so these tests also say which path served.
"""

from __future__ import annotations

from dataclasses import replace

import grid
import pytest
import torch
from torch import Tensor

from d3net_kernels import numerics, reference
from d3net_kernels.numerics import Problem

from . import toolchain
from .cuda_program import Executed, Program

pytestmark = pytest.mark.skipif(
    bool(toolchain.why_no_nvcc() or toolchain.why_no_engine()),
    reason=str(toolchain.why_no_nvcc() or toolchain.why_no_engine()),
)

_HALF = torch.bfloat16
# All of these fit the tensor-core kernels; between them every kind of stage, ragged in each way.
TENSOR_CASES = [
    grid.Case("ragged", channels=(20, 36, 5), out_channels=13, size=(1, 9, 72)),
    grid.Case("dilations_1_to_32", channels=(16,) * 6, out_channels=16, size=(2, 16, 100)),
    grid.Case(
        "odd_dilations", channels=(17, 8), out_channels=9, size=(1, 20, 24), dilations=(3, 5)
    ),
    grid.Case(
        "wide_dilations",
        channels=(7, 3, 3),
        out_channels=16,
        size=(1, 7, 132),
        dilations=(20, 64, 128),
    ),
    grid.Case("two_rows", channels=(7, 3, 3), out_channels=12, size=(3, 2, 32)),
    grid.Case(
        "one_row", channels=(7, 3, 3, 4), out_channels=16, size=(1, 1, 68), dilations=(1, 4, 16, 64)
    ),
    grid.Case(
        "four_columns", channels=(7, 3, 3), out_channels=16, size=(1, 40, 4), dilations=(1, 4, 16)
    ),
    grid.Case(
        "feature_buffer", channels=(12, 24), out_channels=10, size=(2, 10, 40), layout="shared"
    ),
    grid.Case("odd_width", channels=(20, 9), out_channels=9, size=(2, 9, 67)),
    grid.Case("one_column", channels=(3, 9), out_channels=9, size=(1, 9, 1)),
    grid.Case("odd_wide_dilations", channels=(7, 3), size=(1, 7, 96), dilations=(21, 35)),
    grid.Case(
        "channels_last",
        channels=(20, 12),
        out_channels=12,
        size=(2, 9, 35),
        layout="channels_last",
        grad_layout="channels_last",
    ),
    grid.Case(
        "buffer_of_channels_last",
        channels=(12, 24),
        out_channels=36,
        size=(1, 10, 40),
        layout="shared_last",
        dilations=(2, 21),
        grad_layout="slice_last",
    ),
    grid.Case(
        "two_jobs_of_channels_last",
        channels=(8, 4),
        out_channels=44,
        size=(1, 5, 21),
        layout="channels_last",
        grad_layout="channels_last",
    ),
    grid.Case("odd_channels_last", channels=(13, 5), size=(1, 6, 66), layout="channels_last"),
    grid.Case(
        "mixed_layouts",
        channels=(8, 4, 4, 12, 8, 4, 5),
        size=(1, 8, 24),
        layout="mixed",
        grad_layout="every_other",
    ),
]
TF32_CASES = [replace(case, psi="float32") for case in TENSOR_CASES]
TENSOR_CASES = [replace(case, dtype=_HALF) for case in TF32_CASES]
_SMALL = 40_000  # multiply-adds of a tap; larger cases are marked slow


def _is_small(case: grid.Case) -> bool:
    n, h, w = case.size
    return n * h * w * sum(case.channels) * case.out_channels <= _SMALL


def check(
    case: grid.Case, generator: torch.Generator, launch: Executed, *, tf32: bool = False
) -> None:
    problem = case.problem(generator)
    results = Program(launch, tf32=tf32).results(problem, moments=True)
    mean, variance = results.pop("mean"), results.pop("variance")
    grid.assert_right(problem, results, tf32=tf32)
    if tf32:
        assert_factors_are_rounded(problem, results)
    grid.assert_moments(results["out"], mean, variance)


def as_tf32(t: Tensor) -> Tensor:
    """The nearest numbers of TF32, ties away from zero."""
    t = t.detach()
    rounded = (t.view(torch.int32) + 0x1000) & ~0x1FFF
    return torch.where(t.isfinite(), rounded.view(torch.float32), t)


def assert_factors_are_rounded(problem: Problem, results: dict[str, Tensor]) -> None:
    """Once psi(x), the weight and grad_output are rounded, all is as exact as in float32."""

    def ratios(rounded: Problem) -> dict[str, float]:
        """Of what `rounded` has; its other results stand for themselves."""
        plain = numerics.results_of(reference.multidilated_conv2d, rounded)
        wanted = {name: results[name] for name in plain if name != "out" or rounded is layer}
        return numerics.error_ratios(rounded, plain | wanted)

    p = problem.map(lambda t: t)
    assert p.scale is not None
    assert p.shift is not None
    sources, start = [], 0
    for x in p.inputs:
        group = slice(start, start := start + x.shape[1])
        y = reference.psi(x.double(), p.scale[group].double(), p.shift[group].double(), p.relu)
        sources.append(as_tf32(y.float()).detach())
    weight, grad_output = as_tf32(p.weight), as_tf32(p.grad_output)
    bias = None if p.bias is None else p.bias.detach()
    data = replace(p, weight=weight, bias=None, grad_output=grad_output)
    layer = replace(data, inputs=sources, bias=bias, scale=None, shift=None, relu=False)
    of_weight = replace(layer, weight=p.weight)
    of_bias = replace(layer, bias=p.bias, grad_output=p.grad_output)
    found = [ratio for each in (data, layer, of_weight, of_bias) for ratio in ratios(each).values()]
    assert max(found) <= 1, found


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if _is_small(case) else pytest.mark.slow)
        for case in grid.CASES
        if case.name[:5] not in ("needs", "no_ba", "no_ro", "no_co")
    ],
)
def test_grid(case: grid.Case, generator: torch.Generator) -> None:
    check(case, generator, Executed())


@pytest.mark.parametrize("case", TENSOR_CASES, ids=lambda case: case.name)
def test_tensor_cores(case: grid.Case, generator: torch.Generator) -> None:
    launch = Executed()
    check(case, generator, launch)
    assert {"tensor_forward_relu", "tensor_backward_data", "tensor_weight"} <= {
        kernel.rsplit("_", 2)[0] for kernel in launch.counters
    }


@pytest.mark.parametrize("case", TF32_CASES, ids=lambda case: case.name)
def test_tf32(case: grid.Case, generator: torch.Generator) -> None:
    """float32 on tensor cores."""
    launch = Executed()
    check(case, generator, launch, tf32=True)
    kernels = {kernel.rsplit("_", 2)[0] for kernel in launch.counters if kernel.endswith("_tf32")}
    assert kernels == {"tensor_forward_relu", "tensor_backward_data", "tensor_weight"}


@pytest.mark.parametrize(
    ("dtype", "one", "four"), [(_HALF, ".u16", ".v2.u32"), (torch.float32, ".nc.u32", ".v4.u32")]
)
@pytest.mark.parametrize(
    ("layout", "width", "elements"),
    [("contiguous", 24, False), ("channels_last", 23, False), ("contiguous", 23, True)],
)
def test_pixels_come_as_wide_as_they_can(
    layout: str,
    width: int,
    elements: bool,
    dtype: torch.dtype,
    one: str,
    four: str,
    generator: torch.Generator,
) -> None:
    """Four elements a load, by rows or by pixels, where the layout allows it; else one."""
    case = grid.Case(
        "",
        channels=(20, 12),
        out_channels=8,
        size=(1, 6, width),
        dtype=dtype,
        layout=layout,
        needs=(),
    )
    launch = Executed()
    Program(launch, tf32=dtype == torch.float32).results(case.problem(generator))
    (counters,) = (c for kernel, c in launch.counters.items() if kernel.startswith("tensor_"))
    loads = [i.text for i in counters.instructions if "ld.global.nc" in i.text and i.issued]
    assert any(one in load for load in loads) is elements
    assert any(four in load for load in loads) is not elements


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("outputs", [3, 13, 24, 32, 36, 72])
def test_every_tile(
    dtype: torch.dtype, relu: bool, outputs: int, generator: torch.Generator
) -> None:
    case = replace(TENSOR_CASES[0], dtype=dtype, relu=relu, out_channels=outputs)
    check(case, generator, Executed(), tf32=dtype == torch.float32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("dtype", "tf32"), [(torch.float32, False), (torch.float32, True), (_HALF, False)], ids=str
)
def test_not_finite(
    value: float, dtype: torch.dtype, tf32: bool, generator: torch.Generator
) -> None:
    """NaN passes the ReLU and infinity stays, in the pixels that see them and in no other."""
    case = grid.Case("", channels=(4, 3), size=(2, 9, 12), dtype=dtype, needs=())
    problem = case.problem(generator)
    problem.inputs[0][0, 1, 3, 4] = value
    problem.inputs[1][1, 2, 0, 0] = value
    launch = Executed()
    grid.assert_right(problem, Program(launch, tf32=tf32).results(problem), tf32=tf32)
    on_tensor_cores = any(kernel.startswith("tensor_forward") for kernel in launch.counters)
    assert on_tensor_cores is (tf32 or dtype == _HALF)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dilations", [(1, 2), (8, 16), (20, 32)])
@pytest.mark.parametrize("width", [72, 100])
@pytest.mark.parametrize(("dtype", "kind"), [(_HALF, "bfloat16"), (torch.float32, "tf32")])
def test_not_finite_at_the_border(
    value: float,
    dilations: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    kind: str,
    generator: torch.Generator,
) -> None:
    """What lies beside the padding of a tile reaches no tap of the weights that misses it there."""
    case = grid.Case(
        "",
        channels=(4, 3),
        size=(1, 9, width),
        dilations=dilations,
        dtype=dtype,
        psi="float32",
        relu=False,
        needs=("weight", "bias"),
    )
    problem = case.problem(generator)
    problem.inputs[0][0, 0, 3, -1] = value
    problem.inputs[0][0, 2, 4, 0] = value
    problem.inputs[1][0, 1, 8, -6] = value
    launch, tf32 = Executed(), kind == "tf32"
    grid.assert_right(problem, Program(launch, tf32=tf32).results(problem), tf32=tf32)
    assert f"tensor_weight_{kind}" in launch.counters


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("dtype", "kind"), [(_HALF, "bfloat16"), (torch.float32, "tf32")])
def test_not_finite_gradient(
    value: float, dtype: torch.dtype, kind: str, generator: torch.Generator
) -> None:
    """It reaches the inputs that see it, and all sums of its output."""
    needs = ("inputs", "bias", "scale", "shift")
    case = grid.Case(
        "", channels=(4, 3), size=(1, 9, 72), dtype=dtype, psi="float32", relu=False, needs=needs
    )
    problem = case.problem(generator)
    problem.grad_output[0, 1, 3, -1] = value
    problem.grad_output[0, 2, 0, 5] = value
    launch = Executed()
    tf32 = kind == "tf32"
    grid.assert_right(problem, Program(launch, tf32=tf32).results(problem), tf32=tf32)
    assert f"tensor_backward_data_1x8_{kind}" in launch.counters


@pytest.mark.parametrize(
    ("dtype", "tf32", "layout"),
    [
        (torch.float32, False, "contiguous"),
        (torch.float32, True, "contiguous"),
        (torch.float32, True, "channels_last"),
        (torch.bfloat16, False, "contiguous"),
        (torch.bfloat16, False, "channels_last"),
    ],
)
def test_same_bits_in_any_order(
    dtype: torch.dtype, tf32: bool, layout: str, generator: torch.Generator
) -> None:
    """Nothing hangs on which warp, lane, block or copy comes first: no race, no float atomic."""
    case = grid.Case(
        "", channels=(20, 9), out_channels=7, size=(2, 11, 76), dtype=dtype, psi="float32"
    )
    if layout == "channels_last":
        case = replace(case, channels=(20, 12), size=(2, 11, 67), layout=layout, grad_layout=layout)
    problem = case.problem(generator)
    once = Program(Executed(), tf32=tf32).results(problem, moments=True)
    for options in (
        {"order": "reverse", "blocks": "reverse", "cp_async": "early"},
        {"order": "random", "blocks": "random", "cp_async": "random", "seed": 1},
        {"lanes": "random", "seed": 2},
    ):
        again = Program(Executed(**options), tf32=tf32).results(problem, moments=True)
        for name, t in once.items():
            assert _same_bits(t, again[name]), f"{name} differs with {options}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize(
    ("dtype", "layout", "offset"),
    [
        (torch.float32, "contiguous", 1e3),
        (torch.float32, "channels_last", 1e5),
        (torch.float64, "contiguous", 1e9),
        (torch.bfloat16, "contiguous", 1e3),
        (torch.bfloat16, "channels_last", 1e5),
        (torch.float16, "contiguous", 1e3),
    ],
)
def test_large_mean_does_not_cancel(
    dtype: torch.dtype, layout: str, offset: float, generator: torch.Generator
) -> None:
    """The moments of outputs around a mean many deviations away, on ragged tiles."""
    case = grid.Case(
        "", (4, 3), 9, (2, 13, 70), dtype=dtype, psi="float32", layout=layout, needs=()
    )
    if dtype == torch.float64:
        case = replace(case, psi="same")
    problem = case.problem(generator)
    assert problem.bias is not None
    problem.bias.fill_(offset)
    results = Program(Executed()).results(problem, moments=True)
    grid.assert_right(problem, {"out": results["out"]})
    grid.assert_moments(results["out"], results["mean"], results["variance"])


def test_moments_that_are_not_finite(generator: torch.Generator) -> None:
    """They stay in their channels."""
    problem = grid.Case("", (4, 3), 6, (1, 9, 40), dtype=_HALF, needs=()).problem(generator)
    assert problem.bias is not None
    problem.bias[1], problem.bias[4] = torch.nan, torch.inf
    results = Program(Executed()).results(problem, moments=True)
    grid.assert_moments(results["out"], results["mean"], results["variance"])
