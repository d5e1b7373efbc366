"""Whole D2 blocks, ours against the best form of plain torch: ``python -m benchmarks.blocks``.

Every distinct D2 block of D3Net-S, D3Net-L and the vocals network at batch 1, in eval (one forward
pass) and training (forward with batch statistics, then the gradients of x and of all parameters);
in float32 under torch's precisions "highest" and "high", and in eval under bfloat16 autocast. The
baseline is the fastest torch form in the faster of both memory layouts, in the same precision. All
forms run in turns in one process. A ratio is that of the medians; beside it are the quartiles of
the ratios within the rounds. GF/s counts two operations a multiply-add, three times as many for a
training step, with the taps that only see padding.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import d3net_kernels as dk
from benchmarks.block_forms import (
    MODES,
    BlockShape,
    Call,
    forms_of,
    load_blocks,
    precision,
)
from benchmarks.block_plot import plot
from benchmarks.forms import LAYOUTS, OURS
from benchmarks.layers import FOLDER, ratio_line
from benchmarks.timing import Sgemm, seconds_of, time_in_turns
from d3net.machine import describe_machine
from d3net_kernels import reference

PRECISIONS = ("highest", "high", "bf16")
QUICK = 6  # blocks of --quick
TINY = BlockShape(8, 8, 4, 1, 4, 4)
COLUMNS = (
    *("mode", "precision", "channels", "growth", "layers", "out_layers", "height", "width"),
    *("networks", "flops", "form", "layout", "median_ms", "p20_ms", "p80_ms", "samples"),
    *("kept_bytes", "threads_speedup"),
)


@dataclass(frozen=True)
class Race:
    """The samples of one block in one mode and precision, in seconds, by (form, layout).

    kept: bytes kept for backward by (form, layout), of training steps. threads_speedup: how many
    times faster ours is with all threads than with one.
    """

    shape: BlockShape
    mode: str
    precision: str
    samples: dict[tuple[str, str], list[float]]
    kept: dict[tuple[str, str], int] = field(default_factory=dict)
    threads_speedup: float = float("nan")

    def median(self, key: tuple[str, str]) -> float:
        return statistics.median(self.samples[key])

    def ours(self) -> tuple[str, str]:
        """Ours in its faster layout."""
        return min(((OURS, layout) for layout in LAYOUTS), key=self.median)

    def torch(self) -> tuple[str, str]:
        """(form, layout) of the fastest torch form of those that stayed in the race."""
        rounds = len(self.samples[self.ours()])
        raced = [k for k, s in self.samples.items() if k[0] != OURS and len(s) == rounds]
        return min(raced, key=self.median)

    def ratio(self) -> float:
        return self.median(self.torch()) / self.median(self.ours())

    def ratio_quartiles(self) -> tuple[float, float]:
        """Of the ratios within the rounds, in which ours and torch ran next to each other."""
        pairs = zip(self.samples[self.torch()], self.samples[self.ours()], strict=True)
        low, high = np.quantile([theirs / ours for theirs, ours in pairs], (0.25, 0.75))
        return float(low), float(high)

    def gigaflops(self) -> float:
        passes = 3 if self.mode == "train" else 1
        return 1e-9 * passes * self.shape.flops / self.median(self.ours())

    def kept_ratio(self) -> float | None:
        """Bytes of the torch form that keeps least, over ours."""
        if not self.kept:
            return None
        least = min(size for key, size in self.kept.items() if key[0] != OURS)
        return least / self.kept[self.ours()]

    def line(self) -> str:
        low, high = self.ratio_quartiles()
        kept = self.kept_ratio()
        form, layout = self.torch()
        return (
            f"{self.shape!s:22} {self.mode:5} {self.precision:7}"
            + "".join(f" {1e3 * self.median((OURS, layout)):9.3f}" for layout in LAYOUTS)
            + f" {1e3 * self.median(self.torch()):10.3f} {f'{form}, {layout}':35}"
            f" {self.ratio():5.2f}x [{low:5.2f} {high:5.2f}] {self.gigaflops():6.0f}"
            f" {self.threads_speedup:7.2f}x {'' if kept is None else f'{kept:5.2f}x'}"
        )


HEADER = (
    f"{'block':22} {'mode':5} {'prec.':7} {'ours NCHW':>9} {'ch_last':>9} {'torch ms':>10} "
    f"{'best form':35} {'ratio':>6} {'[quartiles]':13} {'GF/s':>6} {'threads':>8} kept"
)


def race(shape: BlockShape, mode: str, name: str, *, fewest_rounds: int, compiled: bool) -> Race:
    """Times one block in one mode and precision."""
    forms = forms_of(mode, compiled=compiled)
    calls = {layout: Call.random(shape, mode, layout) for layout in LAYOUTS}
    keys = [(form, layout) for layout in LAYOUTS for form in forms]
    kept = {}
    with precision(name):
        if mode == "train":
            kept = {key: calls[key[1]].kept_bytes(forms[key[0]]) for key in keys}
        prepared = {key: calls[key[1]].prepared(forms[key[0]]) for key in keys}
        samples = time_in_turns(prepared, lambda key: key[0] == OURS, fewest_rounds)
        result = Race(shape, mode, name, samples, kept)
        speedup = _threads_speedup(prepared[result.ours()], fewest_rounds)
    return Race(shape, mode, name, samples, kept, speedup)


def _threads_speedup(call: object, fewest_rounds: int) -> float:
    """Median seconds of a call with one thread over that with all, taken in turns."""
    assert callable(call)
    threads = torch.get_num_threads()
    seconds: dict[int, list[float]] = {1: [], threads: []}
    try:
        for _ in range(fewest_rounds):
            for number, samples in seconds.items():
                torch.set_num_threads(number)
                call()  # the threads wake up
                samples.append(seconds_of(call, 1))
    finally:
        torch.set_num_threads(threads)
    return statistics.median(seconds[1]) / statistics.median(seconds[threads])


def host_overhead() -> list[str]:
    """A call on a map so small that little but the calling is left."""
    lines = []
    for mode in MODES:
        forms = forms_of(mode)
        call = Call.random(TINY, mode, "NCHW")
        samples = time_in_turns(
            {name: call.prepared(form) for name, form in forms.items()}, lambda name: True, 30
        )
        each = (f"{name} {1e6 * statistics.median(s):.0f} us" for name, s in samples.items())
        lines.append(f"a call on {TINY}, {mode}: {', '.join(each)}")
    return lines


def kept_per_layer(shapes: Sequence[BlockShape]) -> str:
    """What norm="per_layer" keeps for backward, where only the gather form exists in torch."""
    ratios = []
    for shape in shapes:
        kept = []
        for form in (reference.d2_block, dk.d2_block):
            calls = [Call.random(shape, "train", layout, "per_layer") for layout in LAYOUTS]
            kept.append(min(call.kept_bytes(form) for call in calls))
        ratios.append(kept[0] / kept[1])
    return ratio_line("train, per_layer: kept by torch at least / ours", ratios)


def summarise(races: Sequence[Race]) -> list[str]:
    """One line for each mode and precision, and what bfloat16 gains over float32."""
    lines = []
    for mode in MODES:
        for name in PRECISIONS:
            chosen = [r for r in races if (r.mode, r.precision) == (mode, name)]
            if not chosen:
                continue
            lines.append(
                ratio_line(f"{mode}, {name}: best torch / ours", [r.ratio() for r in chosen])
            )
            kept = [ratio for r in chosen if (ratio := r.kept_ratio()) is not None]
            if kept:
                lines.append(ratio_line(f"{mode}, {name}: kept by torch at least / ours", kept))
            speedups = [r.threads_speedup for r in chosen]
            lines.append(ratio_line(f"{mode}, {name}: ours, one thread / all", speedups))
    float32 = {r.shape: r for r in races if (r.mode, r.precision) == ("eval", "highest")}
    low = [r for r in races if r.precision == "bf16" and r.shape in float32]
    if low:
        ratios = [
            float32[r.shape].median(float32[r.shape].torch()) / r.median(r.ours()) for r in low
        ]
        lines.append(ratio_line("eval: best torch in float32 / ours in bf16", ratios))
    return lines


def write_csv(path: Path, races: Sequence[Race]) -> None:
    """One row for each block, mode, precision, form and layout; milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for r in races:
            s = r.shape
            for key, samples in r.samples.items():
                milliseconds = [1e3 * sample for sample in samples]
                writer.writerow(
                    [
                        *(r.mode, r.precision, s.channels, s.growth, s.layers, s.out_layers),
                        *(s.height, s.width, " ".join(s.networks), s.flops, *key),
                        *(f"{np.quantile(milliseconds, share):.5f}" for share in (0.5, 0.2, 0.8)),
                        len(samples),
                        r.kept.get(key, ""),
                        f"{r.threads_speedup:.3f}" if key == r.ours() else "",
                    ]
                )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocks", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="blocks with TEXT in their name")
    parser.add_argument("--quick", action="store_true", help=f"the {QUICK} smallest blocks only")
    parser.add_argument("--eval", action="store_true", help="eval only")
    parser.add_argument("--train", action="store_true", help="training steps only")
    parser.add_argument("--precision", choices=PRECISIONS, help="one only")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds at least")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch")
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile of each form too; slow"
    )
    parser.add_argument("--save", metavar="NAME", help="keep as benchmarks/saved/NAME.*, for git")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    shapes = [shape for shape in load_blocks() if options.only in str(shape)]
    if not shapes:
        parser.error(f"no block has {options.only!r} in its name, such as {load_blocks()[0]}")
    if options.quick:
        shapes = sorted(shapes, key=lambda shape: shape.flops)[:QUICK]
    modes = [mode for mode in MODES if getattr(options, mode)] or MODES

    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = options.save or f"{stamp}-blocks"
    stem = FOLDER / ("saved" if options.save else "results") / name
    print(f"{describe_machine()}\n{HEADER}", flush=True)
    sgemm = Sgemm()
    races = []
    for mode in modes:
        for shape in shapes:
            for chosen in [options.precision] if options.precision else PRECISIONS:
                if mode == "train" and chosen == "bf16":
                    continue
                races.append(
                    race(
                        shape,
                        mode,
                        chosen,
                        fewest_rounds=options.repeat,
                        compiled=options.compiled,
                    )
                )
                print(races[-1].line(), flush=True)
            sgemm.sample()
    summary = [
        *summarise(races),
        *([kept_per_layer(shapes)] if "train" in modes else []),
        *host_overhead(),
        f"sgemm of {Sgemm.SIZE} in this run: {sgemm.gigaflops():.0f} GF/s",
    ]
    write_csv(stem.with_name(f"{name}.csv"), races)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    notes = {"machine": describe_machine(), **versions, "when": stamp, "summary": summary}
    stem.with_name(f"{name}.json").write_text(json.dumps(notes, indent=2) + "\n")
    plot(stem.with_name(f"{name}.png"), races, describe_machine())
    print("\n" + "\n".join(summary) + f"\nall figures: {stem.relative_to(FOLDER.parent)}.*")


if __name__ == "__main__":
    main()
