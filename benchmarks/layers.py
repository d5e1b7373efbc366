"""Forward of one layer, ours against the best form of plain torch: ``python -m benchmarks.layers``.

The baseline of a shape is the fastest torch form in the faster of both memory layouts. All forms of
a shape run in turns in one process; the figures are medians. GF/s counts two operations a
multiply-add, with the taps that only see padding, which ours skips.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.forms import LAYOUTS, OURS, candidates
from benchmarks.records import (
    add_output_options,
    beside,
    parsed,
    ratio_line,
    shown,
    stem_of,
    write_notes,
)
from benchmarks.shapes import Shape, load_shapes, spread
from benchmarks.timing import Sgemm, time_in_turns
from d3net.machine import describe_machine

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LOW_PRECISION_SHAPES = 12
LOW_PRECISION_FLOPS = 5e8  # torch convolves float16 in NCHW at a few GF/s
COLUMNS = (
    *("dtype", "groups", "dilations", "c_out", "height", "width", "networks", "flops"),
    *("form", "layout", "median_ms", "p20_ms", "p80_ms", "samples"),
)


@dataclass(frozen=True)
class Result:
    """The samples of one shape, in seconds, by (form, layout)."""

    shape: Shape
    samples: dict[tuple[str, str], list[float]]

    def median(self, form: str, layout: str) -> float:
        return statistics.median(self.samples[form, layout])

    def ours(self) -> float:
        """Seconds of ours in the faster layout."""
        return min(self.median(OURS, layout) for layout in LAYOUTS)

    def best_torch(self) -> tuple[str, str]:
        """(form, layout) of the fastest torch form."""
        return min((key for key in self.samples if key[0] != OURS), key=lambda k: self.median(*k))

    def torch(self) -> float:
        return self.median(*self.best_torch())

    def torch_nchw(self) -> float:
        """Seconds of the fastest torch form in NCHW."""
        keys = [key for key in self.samples if key[0] != OURS and key[1] == "NCHW"]
        return min(self.median(*key) for key in keys)


def _team(key: tuple[str, str]) -> Hashable:
    """Both layouts of ours are reported, so they do not compete; all forms of torch do."""
    return key if key[0] == OURS else "torch"


def measure(shapes: Sequence[Shape], dtype: str, fewest_rounds: int, sgemm: Sgemm) -> list[Result]:
    """Times every shape and prints a line for each."""
    print(
        f"\n{dtype} forward{'':31}  ours: NCHW  ch_last   best torch ms{'':22} ratio    GF/s",
        flush=True,
    )
    results = []
    for shape in shapes:
        calls = {(form, layout): call for form, layout, call in candidates(shape, DTYPES[dtype])}
        with torch.no_grad():
            samples = time_in_turns(calls, _team, fewest_rounds=fewest_rounds)
        sgemm.sample()
        result = Result(shape, samples)
        results.append(result)
        form, layout = result.best_torch()
        print(
            f"{shape!s:46} {1e3 * result.median(OURS, 'NCHW'):9.3f}"
            f" {1e3 * result.median(OURS, 'channels_last'):9.3f}"
            f" {1e3 * result.torch():11.3f} {f'{form}, {layout}':31}"
            f" {result.torch() / result.ours():5.2f}x {1e-9 * shape.flops / result.ours():7.1f}",
            flush=True,
        )
    return results


def summarise(results: Sequence[Result], dtype: str) -> list[str]:
    """The ratios over all shapes, one line for each way to compare."""
    lines = [
        ratio_line(
            f"{dtype}: ours in its better layout / best torch",
            [result.torch() / result.ours() for result in results],
        )
    ]
    lines += [
        ratio_line(
            f"{dtype}: ours in {layout} / best torch in any layout",
            [result.torch() / result.median(OURS, layout) for result in results],
        )
        for layout in LAYOUTS
    ]
    lines.append(
        ratio_line(
            f"{dtype}: ours in NCHW / best torch in NCHW",
            [result.torch_nchw() / result.median(OURS, "NCHW") for result in results],
        )
    )
    return lines


def write_csv(path: Path, results: Sequence[Result], dtype: str) -> None:
    """One row for each shape, form and layout; milliseconds."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for result in results:
            shape = result.shape
            for (form, layout), samples in result.samples.items():
                milliseconds = [1e3 * sample for sample in samples]
                writer.writerow(
                    [
                        dtype,
                        " ".join(map(str, shape.group_channels)),
                        " ".join(map(str, shape.dilations)),
                        shape.c_out,
                        shape.height,
                        shape.width,
                        " ".join(shape.count),
                        shape.flops,
                        form,
                        layout,
                        *(f"{np.quantile(milliseconds, share):.5f}" for share in (0.5, 0.2, 0.8)),
                        len(samples),
                    ]
                )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, help="one only; default float32, then float16")
    parser.add_argument(
        "--match", default="", metavar="TEXT", help="shapes with TEXT in their name"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="N shapes, spread over the sizes")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds at least")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch")
    add_output_options(parser)
    options = parsed(parser, arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    shapes = [shape for shape in load_shapes() if options.match in str(shape)]
    if not shapes:
        parser.error(f"no shape has {options.match!r} in its name, such as {load_shapes()[1]}")

    stem = stem_of("layers", options)
    print(describe_machine())
    sgemm = Sgemm()
    summary: list[str] = []
    for dtype in [options.dtype] if options.dtype else ["float32", "float16"]:
        chosen = shapes
        if dtype == "float16":
            chosen = spread(shapes, LOW_PRECISION_SHAPES, LOW_PRECISION_FLOPS)
        if options.limit is not None:
            chosen = spread(chosen, options.limit, math.inf)
        results = measure(chosen, dtype, options.repeat, sgemm)
        summary += summarise(results, dtype)
        write_csv(beside(stem, f"-{dtype}.csv"), results, dtype)
    summary.append(f"sgemm of {Sgemm.SIZE} in this run: {sgemm.gigaflops():.0f} GF/s")
    write_notes(stem, summary)
    print("\n" + "\n".join(summary) + f"\nraw figures: {shown(stem, '-*.csv')}")


if __name__ == "__main__":
    main()
