"""One layer with its psi on a GPU, ours against plain torch: ``python -m d3net_kernels bench``.

Every form runs in both memory layouts, in turns, between CUDA events behind a flush of the L2
cache, which also hides the time that Python takes to launch; a figure is the median with its
95 % confidence interval (order statistics, no assumption on the distribution). Two forms differ
where their intervals do not meet.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import d3net_kernels as dk
from benchmarks.forms import LAYOUTS
from benchmarks.records import SCRATCH
from benchmarks.shapes import Shape, load_shapes, spread

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PASSES = ("forward", "training")
WARM_UP = 5
FLUSHED = 256 << 20  # bytes written between samples, so that no input waits in L2
COLUMNS = (
    *("dtype", "pass", "layer", "form", "layout"),
    *("median_us", "low_us", "high_us", "samples", "gpu", "torch", "cuda"),
)


@dataclass(frozen=True)
class Layer:
    """One layer of D3Net in training: sources, weight, psi and the gradient of the output."""

    inputs: list[Tensor]
    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor
    dilations: tuple[int, ...]
    grad_output: Tensor

    @classmethod
    def random(cls, shape: Shape, batch: int, dtype: torch.dtype, layout: str) -> Layer:
        def normal(*size: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
            values = scale * torch.randn(size, device="cuda")
            if len(size) == 4:
                values = values.contiguous(memory_format=LAYOUTS[layout])
            return values.to(dtype).requires_grad_()

        channels, map_size = sum(shape.group_channels), (shape.height, shape.width)
        return cls(
            [normal(batch, c, *map_size) for c in shape.group_channels],
            normal(shape.c_out, channels, 3, 3, scale=(9 * channels) ** -0.5),
            normal(shape.c_out),
            normal(channels, dtype=torch.float32),
            normal(channels, dtype=torch.float32),
            shape.dilations,
            normal(batch, shape.c_out, *map_size).detach(),
        )

    def run(self, form: Callable[..., Tensor]) -> Tensor:
        return form(
            self.inputs,
            self.weight,
            self.bias,
            dilations=list(self.dilations),
            scale=self.scale,
            shift=self.shift,
            relu=True,
        )

    def leaves(self) -> list[Tensor]:
        return [*self.inputs, self.weight, self.bias, self.scale, self.shift]


def _with_backend(name: str) -> Callable[..., Tensor]:
    def form(*arguments: object, **named: object) -> Tensor:
        with dk.use_backend(name):
            return dk.multidilated_conv2d(*arguments, **named)  # type: ignore[arg-type]

    return form


def forms() -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """Ours in every backend that serves this GPU, and the ways of plain torch."""
    for backend in ("cuda", "triton"):
        reason = dk.why_not(backend, torch.empty(1, device="cuda"))
        if reason is None:
            yield f"ours ({backend})", _with_backend(backend)
        else:
            print(f"no {backend} backend: {reason}")
    yield "conv a source + sum", dk.reference.multidilated_conv2d
    yield "the same, compiled", torch.compile(dk.reference.multidilated_conv2d, dynamic=False)


def call_of(layer: Layer, form: Callable[..., Tensor], which: str) -> Callable[[], object]:
    """What is timed: the forward pass alone, or with the gradients of everything."""

    def forward() -> Tensor:
        with torch.no_grad():
            return layer.run(form)

    def training() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer.run(form), layer.leaves(), layer.grad_output)

    return forward if which == "forward" else training


def time_in_turns(
    calls: dict[tuple[str, str], Callable[[], object]], rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Microseconds of every call, one sample a round, each after a flush of the L2 cache."""
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    events: dict[tuple[str, str], list[list[torch.cuda.Event]]] = {key: [] for key in calls}
    for turn in range(rounds):
        keys = list(calls) if turn % 2 == 0 else list(calls)[::-1]
        for key in keys:
            flush.zero_()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            calls[key]()
            pair[1].record()
            events[key].append(pair)
        torch.cuda.synchronize()
    return {key: [1e3 * a.elapsed_time(b) for a, b in pairs] for key, pairs in events.items()}


def median_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """The median and its 95 % confidence interval: ranks n/2 -+ 1.96 sqrt(n)/2 (binomial)."""
    ordered, n = sorted(samples), len(samples)
    reach = 0.98 * math.sqrt(n)
    low, high = math.floor(n / 2 - reach), math.ceil(n / 2 + reach)
    return statistics.median(ordered), ordered[max(0, low)], ordered[min(n - 1, high)]


def plot(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Ours over the best form of plain torch, a bar a layer; needs matplotlib."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    times: dict[tuple[object, ...], dict[bool, float]] = {}
    for row in rows:
        best = times.setdefault((row["dtype"], row["pass"], row["layer"]), {})
        ours = str(row["form"]).startswith("ours")
        best[ours] = min(best.get(ours, math.inf), float(str(row["median_us"])))
    kept = {" ".join(map(str, key)): b[False] / b[True] for key, b in times.items() if len(b) == 2}
    figure, axis = plt.subplots(figsize=(9, 1 + 0.25 * len(kept)), layout="constrained")
    axis.barh(list(kept), list(kept.values()))
    axis.axvline(1, color="black")
    axis.set_xlabel("time of the best form of plain torch / time of ours")
    figure.savefig(path)
    print(f"plot: {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m d3net_kernels bench", description=__doc__)
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="one only; default all")
    parser.add_argument("--match", default="", metavar="TEXT", help="layers with TEXT in the name")
    parser.add_argument("--limit", type=int, default=12, metavar="N", help="layers (default 12)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="default 4")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="default 30")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no CUDA GPU here (torch.cuda.is_available() is False): nothing to time")
        return 1
    shapes = spread([s for s in load_shapes() if options.match in str(s)], options.limit, math.inf)
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, torch {torch.__version__}, CUDA {torch.version.cuda}, {platform.platform()}")
    ways = list(forms())
    rows: list[dict[str, object]] = []
    for dtype in [options.dtype] if options.dtype else list(DTYPES):
        for which in PASSES:
            for shape in shapes:
                torch.compiler.reset()  # every layer is compiled for its own shape
                calls = {
                    (name, layout): call_of(layer, form, which)
                    for layout in LAYOUTS
                    for layer in [Layer.random(shape, options.batch, DTYPES[dtype], layout)]
                    for name, form in ways
                }
                for (name, layout), samples in time_in_turns(calls, options.rounds).items():
                    median, low, high = median_interval(samples)
                    print(
                        f"{dtype:9} {which:9} {shape!s:40} {name:20} {layout:14}"
                        f"{median:9.1f} us  [{low:.1f}, {high:.1f}]",
                        flush=True,
                    )
                    figures = (f"{t:.2f}" for t in (median, low, high))
                    row = (dtype, which, str(shape), name, layout, *figures, len(samples))
                    versions = (gpu, torch.__version__, torch.version.cuda)
                    rows.append(dict(zip(COLUMNS, (*row, *versions), strict=True)))
    SCRATCH.mkdir(exist_ok=True)
    stem = SCRATCH / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}"
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"raw figures: {stem.with_suffix('.csv')}")
    plot(rows, stem.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
