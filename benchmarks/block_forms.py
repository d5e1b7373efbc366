"""Ways to compute a whole D2 block: ours, and every form in which plain torch can write it.

All have the arguments of `d3net_kernels.d2_block`. Source-wise there is one batch normalisation of
a source, as in the official networks, and no norm="per_layer".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import d3net
import d3net_kernels as dk
from benchmarks.forms import LAYOUTS, OURS
from d3net.registry import find
from d3net_kernels import ConvParams, D2Block, D2Params, NormParams, reference
from d3net_kernels.block_params import Norm, Processes

NETWORKS = ("d3net_s", "d3net_l", "d3net_vocals")
MODES = ("eval", "train")
Form = Callable[..., Tensor]


@dataclass(frozen=True)
class BlockShape:
    """One D2 block at batch 1. `networks`: which networks have it."""

    channels: int
    growth: int
    layers: int
    out_layers: int
    height: int
    width: int
    networks: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """Of the forward pass: two a multiply-add, taps that only see padding included."""
        read = sum(self.channels + layer * self.growth for layer in range(self.layers))
        return 2 * 9 * read * self.growth * self.height * self.width

    def __str__(self) -> str:
        return f"{self.channels}+{self.layers}x{self.growth} {self.height}x{self.width}"


@functools.cache
def load_blocks() -> tuple[BlockShape, ...]:
    """Every distinct D2 block of NETWORKS on the input of `d3net models`, from the input on."""
    found: dict[BlockShape, list[str]] = {}
    for name in NETWORKS:

        def note(block: Any, inputs: Any, output: Tensor, name: str = name) -> None:
            height, width = output.shape[2:]
            shape = BlockShape(
                block.in_channels,
                block.growth_rate,
                block.num_layers,
                block.out_layers,
                height,
                width,
            )
            found.setdefault(shape, []).append(name)

        with torch.device("meta"), torch.no_grad():
            model = d3net.create_model(name).eval()
            for module in model.modules():
                if isinstance(module, D2Block):
                    module.register_forward_hook(note)
            model(torch.empty(find(name).input_shape))
    return tuple(
        replace(shape, networks=tuple(dict.fromkeys(names))) for shape, names in found.items()
    )


def source_wise(
    x: Tensor, params: D2Params, *, norm: Norm = "per_source", out_layers: int | None = None
) -> Tensor:
    """One convolution of a source for all its layers, as the official release evaluates it."""
    assert norm == "per_source"
    growth = params.convs[-1].weight.shape[0]
    layers: list[Tensor] = []
    waiting: Tensor | None = None  # the sums of the layers that are not complete yet
    for i, (conv, batch_norm) in enumerate(zip(params.convs, params.norms, strict=True)):
        y = reference.normalise(layers[-1] if layers else x, batch_norm).relu_()
        slots = reference.same_conv2d(y, conv.weight, conv.bias, (1 << i, 1 << i))
        waiting = slots if waiting is None else waiting[:, growth:] + slots
        layers.append(waiting[:, :growth])
    return _last(layers, out_layers)


def source_wise_in_place(
    x: Tensor, params: D2Params, *, norm: Norm = "per_source", out_layers: int | None = None
) -> Tensor:
    """The same with one buffer of sums, which is also the result; not differentiable."""
    assert norm == "per_source"
    growth = params.convs[-1].weight.shape[0]
    y = reference.normalise(x, params.norms[0]).relu_()
    sums = reference.same_conv2d(y, params.convs[0].weight, params.convs[0].bias, (1, 1))
    for i in range(1, len(params.convs)):
        conv = params.convs[i]
        newest = sums[:, (i - 1) * growth : i * growth]
        y = reference.normalise(newest, params.norms[i]).relu_()
        slots = reference.same_conv2d(y, conv.weight, conv.bias, (1 << i, 1 << i))
        sums[:, i * growth :] += slots
    return sums if out_layers is None else sums[:, -out_layers * growth :]


def _last(layers: list[Tensor], out_layers: int | None) -> Tensor:
    returned = layers if out_layers is None else layers[-out_layers:]
    return torch.cat(returned, 1) if len(returned) > 1 else returned[0]


def forms_of(mode: str, *, compiled: bool = False) -> dict[str, Form]:
    """The forms by name. `compiled` adds torch.compile of those of plain torch."""
    plain: dict[str, Form] = {"gather": reference.d2_block, "source-wise": source_wise}
    if mode == "eval":
        plain["source-wise in place"] = source_wise_in_place
    if compiled:
        plain |= {f"{name}, compiled": torch.compile(form) for name, form in plain.items()}
    return {OURS: dk.d2_block, **plain}


@contextmanager
def computed_by(form: Form) -> Iterator[None]:
    """Every D2Block called inside is computed by `form`, and around a form of plain torch all else
    by plain torch too."""

    def block(
        x: Tensor | Sequence[Tensor], params: D2Params, *, process_group: Processes, **options: Any
    ) -> Tensor:
        assert process_group is None
        if form is not dk.d2_block and not isinstance(x, Tensor):
            x = torch.cat(list(x), 1) if len(x) > 1 else x[0]
        return form(x, params, **options)

    backend = nullcontext() if form is dk.d2_block else dk.use_backend("reference")
    with backend, mock.patch("d3net_kernels.modules.d2_block", block):
        yield


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Runs inside under "highest" or "high" float32 precision, or under bfloat16 autocast ("bf16").

    Both of torch's switches are turned, for whatever listens to either.
    """
    conv: Any = torch.backends.mkldnn.conv  # type: ignore[attr-defined, unused-ignore]
    before = torch.get_float32_matmul_precision(), conv.fp32_precision
    if name != "bf16":
        torch.set_float32_matmul_precision(name)
        conv.fp32_precision = {"highest": "ieee", "high": "tf32"}[name]
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        conv.fp32_precision = before[1]


@dataclass(frozen=True)
class Call:
    """One block in one layout: its input and parameters, and whether it takes a training step."""

    shape: BlockShape
    mode: str
    norm: Norm
    x: Tensor
    params: D2Params

    @classmethod
    def random(cls, shape: BlockShape, mode: str, layout: str, norm: Norm = "per_source") -> Call:
        """Numbers of size 1 whose sums have size 1, the same for every layout."""
        generator = torch.Generator().manual_seed(0)
        trains = mode == "train"

        def normal(*size: int) -> Tensor:
            values = torch.randn(size, generator=generator)
            if len(size) == 4:
                values = values.contiguous(memory_format=LAYOUTS[layout])
            return values

        x = normal(1, shape.channels, shape.height, shape.width).requires_grad_(trains)
        convs, norms = [], []
        for i in range(shape.layers):
            width = shape.growth if i else shape.channels
            slots = shape.growth * (shape.layers - i)
            fan_in = 9 * (shape.channels + i * shape.growth)
            weight = normal(slots, width, 3, 3) / fan_in**0.5
            convs.append(ConvParams(weight.requires_grad_(trains), normal(slots)))
            if norm == "per_layer":
                width = shape.channels + i * shape.growth
            gamma, beta = normal(width).abs() + 0.5, normal(width)
            running = (torch.zeros(width), torch.ones(width))
            norms.append(NormParams(gamma, beta, *running, trains, 0.1, 1e-5))
        call = cls(shape, mode, norm, x, D2Params(convs, norms))
        for t in call.parameters():
            t.requires_grad_(trains)
        return call

    def parameters(self) -> list[Tensor]:
        """What a training step wants the gradients of, besides x."""
        convs, norms = self.params.convs, self.params.norms
        both = [t for conv in convs for t in (conv.weight, conv.bias) if t is not None]
        return both + [t for norm in norms for t in (norm.weight, norm.bias)]

    def forward(self, form: Form) -> Tensor:
        return form(self.x, self.params, norm=self.norm, out_layers=self.shape.out_layers)

    def prepared(self, form: Form) -> Prepared:
        """What is timed: the forward pass, or with it the gradients of x and all parameters."""
        if self.mode == "eval":
            return Prepared(torch.no_grad()(lambda: self.forward(form)))
        out, kept_bytes = self.kept(form)
        grad_output = torch.randn_like(out)
        wanted = [self.x, *self.parameters()]

        def step() -> Any:
            return torch.autograd.grad(self.forward(form), wanted, grad_output)

        return Prepared(step, kept_bytes)

    def kept(self, form: Form) -> tuple[Tensor, int]:
        """The output without its graph, and the bytes that autograd keeps from forward to backward,
        each storage once, no parameter."""
        parameters = {t.untyped_storage().data_ptr() for t in self.parameters()}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return t.detach()  # with its graph, an output would keep itself alive for ever

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = self.forward(form)  # alive until here: no address is used twice
        assert out.requires_grad
        return out.detach(), sum(kept.values())


@dataclass(frozen=True)
class Prepared:
    """A call to be timed, and in training the bytes that it keeps for its backward pass."""

    call: Callable[[], object]
    kept_bytes: int | None = None
