"""The one grid of problems that every backend must solve, and the backends that are here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import d3net_kernels as dk
from d3net_kernels import numerics
from d3net_kernels.backends import composite, triton
from d3net_kernels.functional import multidilated_conv2d_with_moments
from d3net_kernels.numerics import Problem

ALL = ("inputs", "weight", "bias", "scale", "shift")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One problem of the grid; see numerics.random_problem for the first fields.

    psi is the dtype of scale and shift: "same", "float32" or None for neither. `layout` and
    `grad_layout` name functions of LAYOUTS. `needs` are the arguments that require a gradient;
    "inputs[1]" stands for one source alone.
    """

    name: str
    channels: tuple[int, ...] = (4, 3, 3)
    out_channels: int = 5
    size: tuple[int, int, int] = (2, 9, 11)
    kernel: tuple[int, int] = (3, 3)
    dilations: tuple[int | tuple[int, int], ...] | None = None
    dtype: torch.dtype = torch.float32
    psi: str | None = "same"
    bias: bool = True
    relu: bool = True
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    needs: tuple[str, ...] = ALL

    def problem(self, generator: torch.Generator) -> Problem:
        """The problem with fresh random numbers."""
        psi_dtype = {"same": self.dtype, "float32": torch.float32, None: None}[self.psi]
        problem = numerics.random_problem(
            self.channels,
            self.out_channels,
            self.size,
            generator=generator,
            kernel=self.kernel,
            dilations=self.dilations,
            dtype=self.dtype,
            psi_dtype=psi_dtype,
            bias=self.bias,
            relu=self.relu,
        )
        problem = replace(
            problem,
            inputs=_lay_out_all([x.detach() for x in problem.inputs], self.layout),
            grad_output=LAYOUTS[self.grad_layout](problem.grad_output),
        )
        for name, t in problem.tensors().items():
            t.requires_grad_(name in self.needs or name.split("[")[0] in self.needs)
        return problem


def _slice(t: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """A piece from the middle of a larger buffer whose other entries are NaN."""
    n, c, h, w = t.shape
    buffer = t.new_full((n + 1, c + 3, h + 2, w + 1), torch.nan).contiguous(
        memory_format=memory_format
    )
    return buffer[1:, 2 : 2 + c, 1 : 1 + h, :w].copy_(t)


def _every_other(t: Tensor) -> Tensor:
    """Every second row and column of a buffer whose other entries are NaN."""
    n, c, h, w = t.shape
    return t.new_full((n, c, 2 * h, 2 * w), torch.nan)[:, :, ::2, ::2].copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "slice": _slice,
    "slice_last": lambda t: _slice(t, torch.channels_last),
    "every_other": _every_other,
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_inside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "rows_expanded": lambda t: t[:, :, :1].expand_as(t),
    "all_expanded": lambda t: t.flatten()[0].expand_as(t) if t.numel() else t,
}


def _lay_out_all(inputs: list[Tensor], layout: str) -> list[Tensor]:
    """`inputs` in a layout of LAYOUTS, or as neighbours in one buffer, or each in another."""
    if layout.startswith("shared"):
        buffer = torch.cat(inputs, 1)
        if layout == "shared_last":
            buffer = buffer.contiguous(memory_format=torch.channels_last)
        return [x.detach() for x in buffer.split([x.shape[1] for x in inputs], 1)]
    if layout == "mixed":
        kinds = list(LAYOUTS)[:-1]
        return [LAYOUTS[kinds[(i + 1) % len(kinds)]](x) for i, x in enumerate(inputs)]
    return [LAYOUTS[layout](x) for x in inputs]


_HALVES = (torch.bfloat16, torch.float16)

_GEOMETRY = [
    Case("one_source", channels=(5,)),
    Case("one_of_everything", channels=(1,), out_channels=1, size=(1, 1, 1)),
    Case("one_row", size=(2, 1, 37)),
    Case("one_column", size=(2, 37, 1)),
    Case("two_by_two", size=(3, 2, 2)),
    Case("no_batch", size=(0, 5, 6)),
    Case("no_rows", size=(2, 0, 6)),
    Case("no_columns", size=(2, 6, 0)),
    Case("dilation_beyond_height", channels=(3, 3, 3, 3, 3), size=(1, 5, 40)),
    Case("dilation_beyond_width", channels=(3, 3, 3, 3, 3), size=(1, 40, 5)),
    Case("dilation_beyond_both", dilations=(7, 100, 1_000_000), size=(2, 6, 7)),
    Case("dilation_is_size", dilations=(9, 8, 10), size=(1, 9, 9)),
    Case("dilation_pairs", dilations=((1, 3), (4, 2), (20, 1)), size=(2, 13, 10)),
    Case("equal_dilations", dilations=(2, 2, 2)),
    Case("decreasing_dilations", dilations=(8, 3, 1)),
    Case("sixteen_sources", channels=(2,) * 16, out_channels=3, size=(1, 7, 19)),
    Case("uneven_sources", channels=(17, 1, 6, 33), out_channels=9),
    Case("growth_1", out_channels=1),
    Case("growth_8", out_channels=8, size=(1, 12, 33)),
    Case("growth_16", channels=(16, 16), out_channels=16, size=(1, 16, 48)),
    Case("growth_17", channels=(9, 17), out_channels=17, size=(1, 10, 35)),
    Case("growth_36", channels=(36, 36), out_channels=36, size=(1, 8, 24)),
    Case("growth_72", channels=(24, 12), out_channels=72, size=(1, 6, 20)),
    Case("kernel_1x1", kernel=(1, 1)),
    Case("kernel_5x5", kernel=(5, 5), size=(1, 12, 14)),
    Case("kernel_1x7", kernel=(1, 7)),
    Case("kernel_7x1", kernel=(7, 1)),
    Case("kernel_3x5", kernel=(3, 5), dilations=((2, 1), (1, 2), (3, 3))),
    Case("wide", channels=(4, 3), size=(1, 3, 333)),
    Case("tall", channels=(4, 3), size=(1, 211, 3)),
    Case("large", channels=(20, 12), out_channels=12, size=(2, 37, 53)),
]
# Enough channels, outputs and columns for every instruction set to transform rows (Winograd).
_TRANSFORMED = [
    Case("transformed", channels=(33, 20), out_channels=13, size=(2, 9, 70)),
    Case(
        "transformed_to_32",
        channels=(7,) * 6,
        out_channels=9,
        size=(1, 5, 130),
        dilations=(1, 2, 4, 8, 16, 32),
    ),
    Case(
        "transformed_in_part",
        channels=(16, 16, 16),
        out_channels=8,
        size=(1, 30, 100),
        dilations=(3, (1, 24), (8, 2)),
    ),
    Case("transformed_strips", channels=(32,), out_channels=17, size=(1, 3, 900)),
    Case("transformed_beyond_width", channels=(20, 20), size=(1, 4, 60), dilations=(64, (1, 48))),
    Case(
        "transformed_last",
        channels=(37, 5),
        out_channels=20,
        size=(1, 6, 83),
        layout="channels_last",
    ),
    *(
        Case(
            f"transformed_{str(half).removeprefix('torch.')}",
            channels=(34, 8),
            out_channels=10,
            size=(1, 7, 66),
            dtype=half,
            psi="float32",
            layout="slice_last",
        )
        for half in _HALVES
    ),
]
_PSI = [
    Case(f"psi_{psi}_relu_{relu}_bias_{bias}", psi=psi, relu=relu, bias=bias)
    for psi in ("same", None)
    for relu in (True, False)
    for bias in (True, False)
]
_LAYOUT = [
    Case(f"layout_{layout}_{dtype_name}", layout=layout, dtype=dtype, channels=channels)
    for layout in (*list(LAYOUTS)[1:-1], "shared", "shared_last", "mixed")
    for dtype_name, dtype, channels in (
        ("float32", torch.float32, (4, 3, 3)),
        ("bfloat16", torch.bfloat16, (16, 8, 1)),
    )
]
_GRAD_LAYOUT = [
    Case(f"grad_{grad}_of_{layout}", grad_layout=grad, layout=layout)
    for grad in list(LAYOUTS)[1:]
    for layout in ("contiguous", "channels_last")
]
_DTYPE = [
    Case(
        f"{str(dtype).removeprefix('torch.')}_psi_{psi}_{shape}_{layout}",
        dtype=dtype,
        psi=psi,
        layout=layout,
        **arguments,
    )
    for dtype, psis in (
        (torch.float64, ("same", None)),
        *((half, ("same", "float32", None)) for half in _HALVES),
    )
    for psi in psis
    for shape, arguments in (
        ("small", {}),
        ("wide", {"channels": (19, 12, 12), "out_channels": 12, "size": (1, 9, 35)}),
        ("one", {"channels": (1,), "out_channels": 1, "size": (1, 1, 1)}),
    )
    for layout in ("contiguous", "channels_last")
]
_NEEDS = [
    Case(f"needs_{'_'.join(needs) or 'nothing'}", needs=needs)
    for needs in (
        (),
        ("inputs",),
        ("inputs[1]",),
        ("inputs[0]", "inputs[2]", "bias"),
        ("weight",),
        ("bias",),
        ("scale",),
        ("shift",),
        ("scale", "shift"),
        ("weight", "scale"),
    )
]
CASES = [*_GEOMETRY, *_TRANSFORMED, *_PSI, *_LAYOUT, *_GRAD_LAYOUT, *_DTYPE, *_NEEDS]
assert len({case.name for case in CASES}) == len(CASES)


def _public(backend: str | None) -> Callable[[Problem], dict[str, Tensor]]:
    """Results through the public function, autograd included."""

    def run(problem: Problem) -> dict[str, Tensor]:
        if backend is None:
            return numerics.results_of(dk.multidilated_conv2d, problem)
        with dk.use_backend(backend):
            return numerics.results_of(dk.multidilated_conv2d, problem)

    return run


def direct(kernels: Any, problem: Problem) -> dict[str, Tensor]:
    """Results of a module's three kernels themselves: of those that the dispatcher hides here."""
    p = problem.map(lambda t: t)
    dilations = [d for pair in p.dilations for d in pair]
    options = (dilations, p.scale, p.shift, p.relu, 0)
    needed = {name for name, t in p.tensors().items() if t.requires_grad}
    wanted = [int(x.requires_grad) for x in p.inputs]
    with torch.no_grad():
        results = {"out": kernels.forward(p.inputs, p.weight, p.bias, *options)}
        if not needed:
            return results
        by_name = dict(
            zip(
                ("inputs", "scale", "shift"),
                kernels.backward_data(p.grad_output, p.inputs, p.weight, *options, wanted),
                strict=True,
            )
        )
        by_name |= {f"inputs[{i}]": g for i, g in enumerate(by_name.pop("inputs"))}
        by_name |= dict(
            zip(
                ("weight", "bias"),
                kernels.backward_weight(p.grad_output, p.inputs, p.weight, *options),
                strict=True,
            )
        )
    return results | {f"grad {name}": g for name, g in by_name.items() if name in needed}


def _to_gpu(t: Tensor) -> Tensor:
    """`t` on the GPU, with its strides and with what lies between its elements."""
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return whole.cuda().as_strided(t.shape, t.stride(), t.storage_offset())


def _on_gpu(backend: str) -> Callable[[Problem], dict[str, Tensor]]:
    """Results of a backend for CUDA tensors, brought back."""
    run = _public(backend)
    return lambda problem: {name: t.cpu() for name, t in run(problem.map(_to_gpu)).items()}


# "default" is what users get: the compiled kernels, or the plain torch ones through the dispatcher.
# Triton's interpreter takes a process of its own, in which it is the only one: see test_triton.py.
BACKENDS: dict[str, Callable[[Problem], dict[str, Tensor]]] = (
    {"triton": _public("triton")}
    if triton.interpreted()
    else {"default": _public(None), "composite": functools.partial(direct, composite)}
)
if dk.why_not("cuda") is None:
    BACKENDS["cuda"] = _on_gpu("cuda")


def assert_right(problem: Problem, results: dict[str, Tensor], *, tf32: bool = False) -> None:
    """Every result within the rule of numerics.py, of the right shape and memory layout."""
    ratios = numerics.error_ratios(problem, results, tf32=tf32)
    wrong = {name: round(ratio, 3) for name, ratio in ratios.items() if not ratio <= 1}
    assert not wrong, f"error / allowed error is above 1: {wrong}"
    assert set(results) == set(ratios)
    models = {"out": problem.inputs[0]} | {
        f"grad inputs[{i}]": x for i, x in enumerate(problem.inputs)
    }
    for name, result in results.items():
        if name in models:
            assert result.stride() == _expected_strides(result, models[name]), name


def with_moments(problem: Problem, **changes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and variance, maybe with other tensors."""
    out, mean, var = call(multidilated_conv2d_with_moments, problem, **changes)
    return out, mean, var


def call(operation: Callable[..., Any], problem: Problem, **changes: Tensor) -> Any:
    """The operation on the problem, with other tensors where `changes` name them."""
    given = problem.tensors() | changes
    return operation(
        [given[f"inputs[{i}]"] for i in range(len(problem.inputs))],
        given["weight"],
        given.get("bias"),
        dilations=problem.dilations,
        scale=given.get("scale"),
        shift=given.get("shift"),
        relu=problem.relu,
    )


def assert_moments(out: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean and variance of the channels of `out` within the rule of numerics.py.

    They are not finite where the channel is not, and only there.
    """
    kept = torch.float64 if out.dtype == torch.float64 else torch.float32
    assert mean.dtype == var.dtype == kept
    assert mean.shape == var.shape == out.shape[1:2]
    finite = out.isfinite().all(3).all(2).all(0)
    assert torch.equal(mean.isfinite(), finite)
    assert torch.equal(var.isfinite(), finite)
    ratios = numerics.moments_error_ratios(out[:, finite], mean[finite], var[finite])
    assert all(ratio <= 1 for ratio in ratios.values()), ratios


def _expected_strides(result: Tensor, model: Tensor) -> tuple[int, ...]:
    _, c, h, w = result.shape
    channels_last = model.stride(1) == 1 and model.shape[1] > 1 and model.shape[2:].numel() > 1
    return (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
