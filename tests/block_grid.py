"""The grid of D2 blocks that `dk.d2_block` must solve, and how its results are judged.

The rule is that of d3net_kernels/numerics.py: the error against float64 is at most that of plain
torch in the same dtype, plus what rounding explains. A block normalises, so that sums of absolute
values say little about it; what rounding explains is measured instead: how far the float64 results
move when every number that enters is off by a few roundings of the accumulator, or by one of the
dtype where that is more. Both parts are what is to be expected at most after a few such perturbed
blocks, for one sample of an error says little about a result of few entries. Float64 has no better
truth: plain torch's error there is that of float32, scaled by the rounding unit, and twice as much
is allowed, for the truth is off as well.

Gradients jump where a ReLU input changes sign, and near a kink one rounding decides about the sign.
Float32 and float64 blocks are therefore drawn until no ReLU input is within reach of rounding; then
signs agree and every error is judged by its largest entry. In 16 bits that is impossible: signs
flip in plain torch too, and errors are judged by their norm.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grid
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import d3net_kernels as dk
from d3net_kernels import ConvParams, D2Params, NormParams, numerics, reference

NORMS = ("per_source", "per_layer")
PARAMETERS = ("weight", "bias", "gamma", "beta")
ALL = ("x", *PARAMETERS)
KINK_MARGIN = 8  # in units of what plain torch's ReLU inputs differ from those in float64
MOST_DRAWS = 200
PERTURBATIONS = 8
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Block:
    """One call of d2_block, and the gradient that comes back to its result.

    `tensors` holds x, the parameters weight[i], bias[i], gamma[i], beta[i], the running statistics
    mean[i], var[i] and grad_output by name.
    """

    case: Case
    tensors: dict[str, Tensor]

    def needed(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.tensors.items() if t.requires_grad}

    def map(self, change: Callable[[Tensor], Tensor]) -> Block:
        """The same with every tensor changed; the same ones require a gradient."""
        return replace(
            self,
            tensors={
                name: change(t.detach()).detach().requires_grad_(t.requires_grad)
                for name, t in self.tensors.items()
            },
        )

    def params(self) -> D2Params:
        """The parameters, with running statistics of their own, which the call may update."""
        t, case = self.tensors, self.case
        convs = [
            ConvParams(t[f"weight[{i}]"], t.get(f"bias[{i}]")) for i in range(len(case.norm_widths))
        ]
        norms = [
            NormParams(
                t[f"gamma[{i}]"],
                t[f"beta[{i}]"],
                t[f"mean[{i}]"].clone() if case.running else None,
                t[f"var[{i}]"].clone() if case.running else None,
                case.mode == "train" and i not in case.frozen,
                case.momentum,
                case.eps,
            )
            for i in range(case.layers)
        ]
        return D2Params(convs, norms)

    def options(self) -> dict[str, Any]:
        return {"norm": self.case.norm, "out_layers": self.case.out_layers}


@dataclass(frozen=True)
class Case:
    """A kind of D2 block; `block` draws one.

    size is (N, H, W). mode: "train" takes batch statistics, but for the `frozen` norms; "eval" the
    running ones. Without `running` there are none to take or update. `layout`, `grad_layout` and
    `weight_layout` name functions of grid.LAYOUTS. `parts` are the channels of the tensors that x
    is given in, () for one. `needs` are the tensors that require a gradient; "weight[1]" stands
    for one alone. `x_offset` and `x_scale` move x away from mean 0, variance 1.
    """

    name: str
    channels: int = 5
    growth: int = 3
    layers: int = 3
    size: tuple[int, int, int] = (2, 7, 9)
    dtype: torch.dtype = torch.float32
    norm: str = "per_source"
    out_layers: int | None = None
    mode: str = "train"
    frozen: tuple[int, ...] = ()
    running: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    bias: bool = True
    norm_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    needs: tuple[str, ...] = ALL
    x_offset: float = 0
    x_scale: float = 1
    parts: tuple[int, ...] = ()
    kernel: int = 3

    @property
    def widths(self) -> list[int]:
        """Channels of the sources x_0, ..., x_{L-1}."""
        return [self.channels] + [self.growth] * (self.layers - 1)

    @property
    def norm_widths(self) -> list[int]:
        """Channels of the norms."""
        if self.norm == "per_source":
            return self.widths
        return [self.channels + i * self.growth for i in range(self.layers)]

    def given(self, x: Tensor) -> Tensor | list[Tensor]:
        """x as the call takes it: slices and copies of other layouts in turns, or x itself."""
        if not self.parts:
            return x
        copies = itertools.cycle(
            (lambda t: t, grid.LAYOUTS["channels_last"], grid.LAYOUTS["contiguous"])
        )
        return [copy(part) for copy, part in zip(copies, x.split(self.parts, 1), strict=False)]

    def block(self, generator: torch.Generator) -> Block:
        """A block of fresh random numbers, whose ReLUs are clear of their kinks if that can be."""
        for _ in range(MOST_DRAWS):
            block = self.draw(generator)
            if self.dtype in HALVES or _is_clear_of_kinks(block.map(Tensor.float)):
                return block
        raise AssertionError(f"{MOST_DRAWS} draws of {self} all had a ReLU input near 0")

    def draw(self, generator: torch.Generator) -> Block:
        """A block of fresh random numbers."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def uniform(width: int) -> Tensor:
            return 0.5 + torch.rand(width, generator=generator, dtype=torch.float64)

        n, h, w = self.size
        drawn = {"x": self.x_offset + self.x_scale * normal(n, self.channels, h, w)}
        for i, width in enumerate(self.widths):
            slots = self.growth * (self.layers - i)
            fan_in = self.kernel**2 * (self.channels + i * self.growth)
            kernel = (self.kernel, self.kernel)
            drawn[f"weight[{i}]"] = normal(slots, width, *kernel) / fan_in**0.5
            if self.bias:
                drawn[f"bias[{i}]"] = normal(slots)
        for i, width in enumerate(self.norm_widths):
            drawn[f"gamma[{i}]"] = uniform(width) * normal(width).sign()
            drawn[f"beta[{i}]"] = normal(width)
            drawn[f"mean[{i}]"] = normal(width)
            drawn[f"var[{i}]"] = uniform(width)
        drawn["grad_output"] = normal(n, self.growth * (self.out_layers or self.layers), h, w)

        layouts = {"x": self.layout, "grad_output": self.grad_layout, "weight": self.weight_layout}
        tensors = {}
        for name, t in drawn.items():
            kind = name.split("[")[0]
            is_norm = kind in ("gamma", "beta", "mean", "var")
            t = t.to(self.norm_dtype if is_norm and self.norm_dtype else self.dtype)
            if kind in layouts:
                t = grid.LAYOUTS[layouts[kind]](t)
            tensors[name] = t.requires_grad_(name in self.needs or kind in self.needs)
        return Block(self, tensors)


def results_of(operation: Callable[..., Tensor], block: Block) -> dict[str, Tensor]:
    """The output of `operation`, the gradients asked for, and the running statistics it leaves."""
    params, needed = block.params(), block.needed()
    out = operation(block.tensors["x"], params, **block.options())
    results = {"out": out.detach()}
    if needed:
        grads = torch.autograd.grad(
            out, list(needed.values()), block.tensors["grad_output"].to(out.dtype)
        )
        results |= {f"grad {name}": g for name, g in zip(needed, grads, strict=True)}
    for i, norm in enumerate(params.norms):
        if norm.running_mean is not None and norm.running_var is not None:
            results |= {f"mean[{i}]": norm.running_mean, f"var[{i}]": norm.running_var}
    return results


def ours(block: Block) -> dict[str, Tensor]:
    """Results of the library."""

    def operation(x: Tensor, params: D2Params, **options: Any) -> Tensor:
        return dk.d2_block(block.case.given(x), params, **options)

    return results_of(operation, block)


def assert_right(
    block: Block,
    results: dict[str, Tensor],
    factor: float = 1,
    autocast: torch.dtype | None = None,
) -> None:
    """Every result has the shape and dtype it should have and obeys the rule of this module.

    `factor` times plain torch's error and times the floor are allowed; `autocast` is the dtype that
    the results were made in.
    """
    ratios = error_ratios(block, results, factor, autocast)
    wrong = {name: round(ratio, 3) for name, ratio in ratios.items() if not ratio <= 1}
    assert not wrong, f"error / allowed error is above 1: {wrong}"


def error_ratios(
    block: Block,
    results: dict[str, Tensor],
    factor: float = 1,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """The error of each result over what is allowed; up to 1 is right. See assert_right."""
    dtype = autocast or block.case.dtype
    size = _norm if dtype in HALVES else _largest
    truth = results_of(reference.d2_block, block.map(Tensor.double))
    plain: dict[str, list[float]] = {name: [] for name in truth}
    moved: dict[str, list[float]] = {name: [] for name in truth}
    for near in _perturbed(block, dtype):
        near_truth = results_of(reference.d2_block, near.map(Tensor.double))
        errors = _errors_of_plain_torch(near, autocast, size)
        for name, t in near_truth.items():
            plain[name].append(errors[name])
            moved[name].append(size(t - truth[name]))
    if dtype == torch.float64:
        factor *= 2
    assert set(results) == set(truth)
    ratios = {}
    for name, expected in truth.items():
        result = results[name]
        kept = block.tensors.get(name.removeprefix("grad "))  # None for out
        assert result.dtype == (dtype if kept is None else kept.dtype), name
        assert result.shape == expected.shape, name
        stored = size(torch.finfo(result.dtype).eps * expected)  # one rounding of the result
        rounding = _expected_at_most(plain[name]) + _expected_at_most(moved[name])
        allowed = max(factor * rounding + stored, torch.finfo(torch.float64).tiny)
        ratios[name] = size(result.double() - expected) / allowed
    return ratios


def _perturbed(block: Block, dtype: torch.dtype) -> Iterator[Block]:
    """The block with every number off by a few roundings of what computes in `dtype`."""
    accumulator = torch.finfo(torch.promote_types(dtype, torch.float32))
    step = max(numerics._ACCUMULATOR_ROUNDINGS * accumulator.eps, torch.finfo(dtype).eps)
    generator = torch.Generator().manual_seed(0)

    def change(t: Tensor) -> Tensor:
        signs = torch.randint(0, 2, t.shape, generator=generator).double() * 2 - 1
        return (t.double() * (1 + step * signs)).to(t.dtype)

    for _ in range(PERTURBATIONS):
        yield block.map(change)


def _errors_of_plain_torch(
    block: Block, autocast: torch.dtype | None, size: Callable[[Tensor], float]
) -> dict[str, float]:
    """How far plain torch is from float64."""
    scale = 1.0
    if block.case.dtype == torch.float64:
        block = block.map(Tensor.float)
        scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    truth = results_of(reference.d2_block, block.map(Tensor.double))
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        plain = results_of(reference.d2_block, block)
    return {name: scale * size(t.double() - truth[name]) for name, t in plain.items()}


def _expected_at_most(samples: list[float]) -> float:
    """Five standard deviations above the mean."""
    return statistics.fmean(samples) + 5 * statistics.stdev(samples)


def _largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def _norm(t: Tensor) -> float:
    return t.norm().item()


class _ReluInputs(TorchFunctionMode):
    """Collects what enters every ReLU of plain torch inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.relu_:
            self.seen.append(args[0].detach().clone())
        return func(*args, **(kwargs or {}))


def relu_inputs(block: Block) -> list[Tensor]:
    """What enters the ReLUs of the block in plain torch, source by source or layer by layer."""
    with _ReluInputs() as inputs, torch.no_grad():
        reference.d2_block(block.tensors["x"], block.params(), **block.options())
    return inputs.seen


def _is_clear_of_kinks(block: Block) -> bool:
    """Whether float32 rounding cannot change the sign of any ReLU input.

    An exact 0 on both sides is no danger: there all have the derivative 0.
    """
    truth = relu_inputs(block.map(Tensor.double))
    for exact, rounded in zip(truth, relu_inputs(block), strict=True):
        reach = _largest(rounded - exact) + torch.finfo(torch.float32).eps * _largest(exact)
        if ((exact.abs() <= KINK_MARGIN * reach) & (exact != 0)).any():
            return False
        # A source that no ReLU lets through makes features without variance, and normalising those
        # amplifies rounding beyond any bound.
        if exact.numel() > 0 and not (exact > 0).any():
            return False
    return True


_SHAPES = [
    Case("one_layer", layers=1),
    Case("one_layer_of_1", channels=1, growth=1, layers=1, size=(1, 4, 5)),
    Case("one_of_everything", channels=1, growth=1, layers=3, size=(1, 3, 5)),
    Case("map_of_1", size=(7, 1, 1)),
    Case("map_of_1_eval", size=(1, 1, 1), mode="eval"),
    Case("one_row", size=(2, 1, 23)),
    Case("one_column", size=(2, 23, 1)),
    Case("two_by_two", size=(3, 2, 2)),
    Case("no_batch", size=(0, 5, 6)),
    Case("no_rows", size=(2, 0, 6)),
    Case("no_columns_eval", size=(2, 6, 0), mode="eval"),
    Case("dilation_beyond_height", layers=5, size=(1, 5, 40)),
    Case("dilation_beyond_width", layers=5, size=(1, 40, 5)),
    Case("dilation_beyond_both", layers=6, size=(2, 7, 6)),
    Case("dilation_is_size", layers=4, size=(1, 8, 8)),
    Case("eight_layers", channels=6, growth=4, layers=8, size=(1, 16, 25), out_layers=1),
    Case("eight_layers_odd", channels=3, growth=5, layers=8, size=(2, 9, 33)),
    Case("batch_of_three", size=(3, 11, 13)),
    Case("growth_1", growth=1, size=(1, 10, 12)),
    Case("growth_7", channels=9, growth=7, size=(1, 12, 14)),
    Case("growth_8", channels=8, growth=8, size=(1, 12, 16)),
    Case("growth_15", channels=16, growth=15, size=(1, 9, 13)),
    Case("growth_16", channels=16, growth=16, size=(2, 8, 16)),
    Case("growth_17", channels=17, growth=17, size=(1, 11, 12)),
    Case("growth_32", channels=32, growth=32, size=(1, 9, 12)),
    Case("growth_33", channels=10, growth=33, size=(1, 9, 12)),
    Case("growth_36", channels=64, growth=36, size=(1, 8, 12)),
    Case("growth_40", channels=40, growth=40, layers=2, size=(1, 9, 17)),
    Case("channels_1", channels=1, growth=12, size=(1, 10, 20)),
    Case("channels_31", channels=31, growth=4, size=(2, 6, 11)),
    Case("channels_70", channels=70, growth=10, size=(1, 13, 11)),
    Case("map_16x32", channels=12, growth=9, layers=4, size=(1, 16, 32), out_layers=1),
    Case("map_16x32_two", channels=8, growth=6, size=(2, 16, 32)),
    Case("map_5x100", channels=6, growth=8, layers=4, size=(1, 5, 100)),
    Case("map_9x150_two", channels=4, growth=5, layers=2, size=(2, 9, 150)),
    Case("map_100x5", channels=6, growth=8, layers=4, size=(1, 100, 5)),
    Case("map_37x41", channels=4, growth=5, size=(1, 37, 41)),
]
_NORMS = [
    Case(f"{mode}_{outs or 'all'}", size=(2, 6, 7), layers=4, mode=mode, out_layers=outs)
    for mode in ("train", "eval")
    for outs in (1, 2, 3, None)
] + [
    Case("frozen_first", layers=4, frozen=(0,)),
    Case("frozen_last", layers=4, frozen=(3,)),
    Case("frozen_some", layers=4, frozen=(1, 3)),
    Case("frozen_all", layers=4, frozen=(0, 1, 2, 3)),
    Case("frozen_parameters", frozen=(1,), needs=("x", "weight", "bias", "gamma[0]", "beta[0]")),
    Case("no_running_train", running=False),
    Case("no_running_eval", running=False, mode="eval"),
    Case("momentum_0", momentum=0.0),
    Case("momentum_1", momentum=1.0),
    Case("eps_large", eps=0.1),
    Case("no_bias_train", bias=False),
    Case("no_bias_eval", bias=False, mode="eval", out_layers=1),
    Case("mean_30", x_offset=30, size=(2, 6, 8)),
    Case("tiny_values", x_scale=1e-3, size=(2, 6, 8)),
    Case("huge_values", x_scale=1e4, size=(2, 6, 8)),
]
_NEEDS = [
    Case(name, needs=needs, mode=mode)
    for mode in ("train", "eval")
    for name, needs in {
        f"{mode}_needs_nothing": (),
        f"{mode}_needs_x": ("x",),
        f"{mode}_needs_parameters": PARAMETERS,
        f"{mode}_needs_weights": ("weight",),
        f"{mode}_needs_one_weight": ("weight[1]",),
        f"{mode}_needs_one_bias": ("bias[2]",),
        f"{mode}_needs_norms": ("gamma", "beta"),
        f"{mode}_needs_first_gamma": ("gamma[0]",),
        f"{mode}_needs_last_beta": ("beta[2]",),
        f"{mode}_needs_x_and_last": ("x", "weight[2]", "gamma[2]"),
    }.items()
]
_LAYOUTS = [
    Case(f"layout_{layout}_{mode}", layout=layout, mode=mode, size=(2, 6, 10))
    for layout in (*list(grid.LAYOUTS)[1:-1],)
    for mode in ("train", "eval")
] + [
    *(
        Case(f"grad_{layout}_{last}", grad_layout=layout, layout=last, size=(2, 6, 10))
        for layout in list(grid.LAYOUTS)[1:]
        for last in ("contiguous", "channels_last")
    ),
    *(
        Case(f"weight_{layout}", weight_layout=layout, layout="channels_last")
        for layout in ("channels_last", "slice", "transposed")
    ),
    Case("last_out_1", layout="channels_last", grad_layout="channels_last", out_layers=1),
    Case("last_large", 33, 17, 3, (2, 9, 11), layout="slice_last", grad_layout="slice_last"),
]
_DTYPES = [
    Case(f"{str(dtype)[6:]}_{mode}", 9, 8, 4, (2, 9, 14), dtype, mode=mode, layout=layout)
    for dtype in (torch.float64, *HALVES)
    for mode, layout in (("train", "contiguous"), ("eval", "channels_last"))
] + [
    Case(f"{str(dtype)[6:]}_norms_in_float32", 9, 8, 4, (2, 9, 14), dtype, norm_dtype=torch.float32)
    for dtype in HALVES
]


def _both_norms(cases: Sequence[Case]) -> list[Case]:
    return [
        replace(case, name=f"{norm}-{case.name}", norm=norm) for norm in NORMS for case in cases
    ]


_PARTS = [
    Case("parts_2", channels=12, parts=(5, 7), size=(2, 6, 10)),
    Case("parts_2_eval", channels=12, parts=(5, 7), size=(2, 6, 10), mode="eval", out_layers=1),
    Case("parts_of_1", channels=5, parts=(1, 1, 1, 1, 1), growth=8),
    Case("parts_of_vectors", channels=48, parts=(16, 32), growth=9, layers=2),
    Case("parts_across_vectors", channels=70, parts=(33, 9, 28), growth=12, size=(1, 12, 20)),
    Case("parts_bfloat16", 21, 8, 2, (2, 9, 14), torch.bfloat16, parts=(9, 12)),
    Case("parts_float64", 21, 8, 2, (2, 9, 14), torch.float64, parts=(9, 12)),
    Case("parts_no_batch", channels=12, parts=(5, 7), size=(0, 5, 6)),
    Case("kernel_1", channels=12, growth=9, layers=1, kernel=1),
    Case("kernel_1_layers", channels=12, growth=9, layers=3, kernel=1, mode="eval"),
    Case("kernel_1_parts", 70, 12, 1, (1, 12, 20), parts=(33, 9, 28), kernel=1),
    Case("kernel_1_eval", 70, 50, 1, (2, 5, 21), mode="eval", parts=(33, 9, 28), kernel=1),
    Case("kernel_1_float16", 21, 24, 1, (2, 9, 14), torch.float16, parts=(9, 12), kernel=1),
    Case("kernel_5", channels=12, growth=8, layers=2, kernel=5),
]


CASES = _both_norms([*_SHAPES, *_NORMS, *_NEEDS, *_LAYOUTS, *_DTYPES, *_PARTS])
assert len({case.name for case in CASES}) == len(CASES)
# Wide enough for every algorithm: several tiles, vectors and dilations, and remainders of each.
LARGE = Case("large", channels=17, growth=18, layers=4, size=(1, 18, 27))


def random_module(**options: Any) -> dk.D2Block:
    """A block whose statistics and affines are all but trivial."""
    block = dk.D2Block(17, 9, 3, **options)
    for norm in block.norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return block


# An input for it.
X = torch.linspace(0, 300, 2 * 17 * 9 * 14).sin().view(2, 17, 9, 14)
