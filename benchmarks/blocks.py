"""Whole D2 blocks, ours against the best form of plain torch: ``python -m benchmarks.blocks``.

Every distinct D2 block of D3Net-S, D3Net-L and the vocals network at batch 1, in eval (one forward
pass) and training (forward with batch statistics, then the gradients of x and of all parameters);
in float32 under torch's precisions "highest" and "high", and in eval under bfloat16 autocast. The
baseline is the fastest torch form in the faster of both memory layouts, in the same precision. All
forms run in turns in one process; those clearly behind drop out and are listed with the samples
they have. A ratio is that of the medians; beside it are the quartiles of the ratios within the n
rounds. GF/s counts two operations a multiply-add, three times as many for a training step, with the
taps that only see padding; sgemm is the machine's own speed at that moment.

Every race is written as it ends. A run that was interrupted goes on with --resume and its table.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.block_forms import MODES, BlockShape, load_blocks
from benchmarks.block_plot import plot
from benchmarks.block_race import HEADER, Race, append_csv, race, read_csv
from benchmarks.block_report import summarise, write_markdown
from benchmarks.records import (
    add_output_options,
    beside,
    conditions,
    parsed,
    read_conditions,
    shown,
    stem_of,
    write_notes,
)
from benchmarks.timing import Sgemm, threads

PRECISIONS = ("highest", "high", "bf16")
QUICK = 6  # blocks of --quick


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocks", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="blocks with TEXT in their name")
    parser.add_argument("--quick", action="store_true", help=f"the {QUICK} smallest blocks only")
    parser.add_argument("--eval", action="store_true", help="eval only")
    parser.add_argument("--train", action="store_true", help="training steps only")
    parser.add_argument("--precision", choices=PRECISIONS, help="one only")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="at least, default 5")
    parser.add_argument(
        "--seconds", type=float, default=0.5, metavar="S", help="for more rounds, default 0.5"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch")
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile of each form too; slow"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="TABLE.csv",
        help="go on with this table: measure what it lacks, then report on all of it",
    )
    parser.add_argument("--report", action="store_true", help="with --resume: measure nothing")
    add_output_options(parser)
    options = parsed(parser, arguments)
    if options.report and options.resume is None:
        parser.error("--report needs the table to report on: --resume TABLE.csv")
    if options.resume is not None and options.save is not None:
        parser.error("--resume goes on with the files of its table; leave out --save")
    for file in [options.resume, options.resume.with_suffix(".json")] if options.resume else []:
        if not file.is_file():
            parser.error(f"--resume needs a table and its notes; there is no {file}")
    options.shapes = [shape for shape in load_blocks() if options.only in str(shape)]
    if not options.shapes:
        parser.error(f"no block has {options.only!r} in its name, such as {load_blocks()[0]}")
    return options


def wanted(options: argparse.Namespace) -> list[tuple[BlockShape, str, str]]:
    """The block, mode and precision of every race, block by block."""
    shapes: list[BlockShape] = options.shapes
    if options.quick:
        shapes = sorted(shapes, key=lambda shape: shape.flops)[:QUICK]
    modes = [mode for mode in MODES if getattr(options, mode)] or MODES
    precisions = [options.precision] if options.precision else PRECISIONS
    return [
        (shape, mode, name)
        for shape in shapes
        for mode in modes
        for name in precisions
        if (mode, name) != ("train", "bf16")
    ]


def check_conditions(stem: Path, under: Mapping[str, str]) -> None:
    """Leaves with a message where a table was begun on another machine or with other versions."""
    for what, now in conditions().items():
        if under[what] != now:
            raise SystemExit(
                f"cannot resume: {shown(stem, '.csv')} is of {what} {under[what]}, this is {now}"
            )


def resumed(table: Path) -> list[Race]:
    """The races that a table has, which is left with nothing else."""
    races, cleaned = read_csv(table), table.with_name(f"{table.name}.cleaned")
    cleaned.unlink(missing_ok=True)
    for done in races:
        append_csv(cleaned, done)
    if races:
        cleaned.replace(table)
    else:
        table.unlink()
    return races


def run(options: argparse.Namespace, table: Path, races: list[Race]) -> None:
    """Runs the races that are not among `races` yet; adds them there and to the table."""
    done = {race.name for race in races}
    todo = [
        (s, mode, name) for s, mode, name in wanted(options) if (str(s), mode, name) not in done
    ]
    sgemm = Sgemm()
    print(HEADER, flush=True)
    with tqdm(todo, unit="race", dynamic_ncols=True) as bar:
        for shape, mode, name in bar:
            bar.set_description(f"{shape} {mode} {name}")
            races.append(
                race(
                    shape,
                    mode,
                    name,
                    sgemm,
                    fewest_rounds=options.rounds,
                    seconds=options.seconds,
                    compiled=options.compiled,
                )
            )
            append_csv(table, races[-1])
            bar.write(races[-1].line())


def measure_and_report(options: argparse.Namespace) -> None:
    if options.resume is None:
        stem, under = stem_of("blocks", options), conditions()
        table = beside(stem, ".csv")
        if table.exists():
            raise SystemExit(f"{shown(stem, '.csv')} is there already: --resume it or name another")
        write_notes(stem, ["interrupted"])
        races: list[Race] = []
    else:
        table, stem = options.resume, options.resume.with_suffix("")
        under = read_conditions(stem)
        if options.report:
            races = read_csv(table)
        else:
            check_conditions(stem, under)
            races = resumed(table)
    print(f"{under['machine']}\ntable: {shown(stem, '.csv')}")
    if not options.report:
        run(options, table, races)
    summary = summarise(races)
    write_notes(stem, summary, under=under)
    write_markdown(beside(stem, ".md"), races, under["machine"])
    plot(beside(stem, ".png"), races, under["machine"])
    print("\n" + "\n".join(summary) + f"\nall figures: {shown(stem, '.*')}")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with threads(options.threads or torch.get_num_threads()):
        measure_and_report(options)


if __name__ == "__main__":
    main()
