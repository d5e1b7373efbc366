"""What threads gain, and what a call costs by itself: ``python -m benchmarks.threads``.

A few blocks from large to small maps, at batch 1 under "high" precision: the time with one thread
over that with all, taken in turns. Then calls on a map so small that little but the calling is
left, ours and every form of plain torch.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.block_forms import MODES, BlockShape, Call, forms_of, load_blocks, precision
from benchmarks.forms import OURS
from benchmarks.records import (
    Verdict,
    add_output_options,
    beside,
    conditions,
    geometric_mean,
    parsed,
    shown,
    stem_of,
    verdict_lines,
    write_notes,
)
from benchmarks.timing import seconds_of, threads, time_in_turns

# Four scales of D3Net-S, and the vocals network at its largest and its smallest maps.
BLOCKS = (
    *("144+4x36 128x256", "144+4x36 64x128", "144+4x36 32x64", "144+4x36 16x32"),
    *("32+4x26 256x1600", "32+5x32 256x256", "16+8x34 16x100"),
)
TINY = BlockShape(8, 8, 4, 1, 4, 4)
TWO_THREADS = 1.85
HOST_MICROSECONDS = 30.0
SHORTEST = 2e-2  # seconds of a sample; quicker calls are repeated


def seconds_by_threads(call: Callable[[], object], rounds: int) -> dict[int, float]:
    """Median seconds of a call with one thread and with all, taken in turns."""
    everything = torch.get_num_threads()
    samples: dict[int, list[float]] = {1: [], everything: []}
    call()
    times = max(1, round(SHORTEST / seconds_of(call, 1)))
    for _ in range(rounds):
        for number, taken in samples.items():
            with threads(number):
                call()  # they wake up
                taken.append(seconds_of(call, times))
    return {number: statistics.median(taken) for number, taken in samples.items()}


def host_microseconds(mode: str) -> dict[str, dict[str, float]]:
    """Median microseconds of one call on TINY by each form, in NCHW.

    "in a row": of many calls of the same form, one after the other. "in turns": of few, each form
    after all others, whose code has taken the place of its own in the caches.
    """
    call = Call.random(TINY, mode, "NCHW")
    calls = {name: call.prepared(form).call for name, form in forms_of(mode).items()}
    in_turns = time_in_turns(calls, lambda name: name, fewest_rounds=30)
    in_a_row: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(7):
        for name, one in calls.items():
            in_a_row[name].append(seconds_of(one, max(1, round(SHORTEST / seconds_of(one, 3)))))
    return {
        way: {name: 1e6 * statistics.median(taken) for name, taken in samples.items()}
        for way, samples in (("in a row", in_a_row), ("in turns", in_turns))
    }


def measure(shapes: Sequence[BlockShape], rounds: int) -> list[tuple[str, str, int, float]]:
    """(block, mode, threads, seconds) of ours in channels_last."""
    form = forms_of("eval")[OURS]
    rows = []
    for shape, mode in tqdm([(s, m) for m in MODES for s in shapes], unit="block"):
        call = Call.random(shape, mode, "channels_last").prepared(form).call
        for number, seconds in seconds_by_threads(call, rounds).items():
            rows.append((str(shape), mode, number, seconds))
    return rows


def write_csv(path: Path, rows: Sequence[tuple[str, str, int, float]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("block", "mode", "threads", "median_ms"))
        writer.writerows((*row[:3], f"{1e3 * row[3]:.5g}") for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="blocks with TEXT in their name")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5")
    add_output_options(parser)
    options = parsed(parser, arguments)
    everything = torch.get_num_threads()
    if everything == 1:
        parser.error("torch has one thread here: nothing to compare")
    chosen = [name for name in BLOCKS if options.only in name]
    if not chosen:
        parser.error(f"--only is {options.only!r}; the blocks are {', '.join(BLOCKS)}")
    shapes = [shape for shape in load_blocks() if str(shape) in chosen]
    stem = stem_of("threads", options)
    print(conditions()["machine"], flush=True)
    with precision("high"):
        rows = measure(shapes, options.rounds)
        host = {mode: host_microseconds(mode) for mode in MODES}

    seconds = {row[:3]: row[3] for row in rows}
    summary = []
    verdicts = []
    for mode in MODES:
        ratios = []
        for shape in shapes:
            one, many = (seconds[str(shape), mode, number] for number in (1, everything))
            ratios.append(one / many)
            summary.append(
                f"{shape!s:22} {mode:5} {1e3 * one:9.3f} ms with one thread,"
                f" {1e3 * many:9.3f} with {everything}: {one / many:.2f}x"
            )
        if everything == 2:
            for words, value in (
                ("geometric mean", geometric_mean(ratios)),
                ("worst", min(ratios)),
            ):
                what = f"{mode}, 2 threads over 1, {words}"
                verdicts.append(Verdict(what, TWO_THREADS, value, of=f"{len(ratios)} blocks"))
    for mode, by_way in host.items():
        for way, times in by_way.items():
            each = (f"{name} {value:.0f} us" for name, value in times.items())
            summary.append(f"a call on {TINY}, {mode}, {way}: {', '.join(each)}")
    what, value = f"a call on {TINY}, eval, in a row", host["eval"]["in a row"][OURS]
    verdicts.append(Verdict(what, HOST_MICROSECONDS, value, "us", at_most=True))
    summary += ["", *verdict_lines(verdicts)]
    write_csv(beside(stem, ".csv"), rows)
    write_notes(stem, summary, host_microseconds=host)
    print("\n".join(summary) + f"\nall figures: {shown(stem, '.*')}")


if __name__ == "__main__":
    main()
