"""Whole networks, ours against plain torch: ``python -m benchmarks.nets``.

Forward passes in eval, training steps (forward, loss, backward), and the peak of resident memory.

Time: in turns in one process. Every form of plain torch runs in both layouts, those that are not
clearly behind a second time; the fastest one then races against ours, both under "highest" and
under "high" precision. A ratio is that of the medians in the same precision.

Memory: the peak of a process never falls, so each figure is that of a process of its own, which
takes two training steps. Plain torch is in the form that was fastest. What a process holds before
its first step, mostly torch itself, is given too.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import d3net
from benchmarks.block_forms import computed_by, forms_of, precision
from benchmarks.forms import LAYOUTS, OURS
from benchmarks.records import (
    Verdict,
    add_output_options,
    beside,
    conditions,
    parsed,
    shown,
    stem_of,
    verdict_lines,
    write_notes,
)
from benchmarks.timing import Sgemm, time_in_turns
from d3net.registry import find

PRECISIONS = ("highest", "high")
# Network, mode, and the ratio under "high" that is asked for.
RUNS = (
    ("d3net_vocals", "eval", 3.0),
    ("d3net_s_fcn", "eval", 2.5),
    ("d3net_s_fcn", "train", None),
    ("d3net_vocals", "train", None),
)
SLOW_RUN = ("d3net_vocals", "train")  # of --all
MEMORY_NETWORK, MEMORY_RATIO = "d3net_s_fcn", 2.0
STEPS = 2  # the second one allocates while the heap is no longer new
SMALL = {"d3net_vocals": (1, 2, 32, 2049), "d3net_s_fcn": (1, 3, 64, 128)}  # inputs of --quick
COLUMNS = (
    *("network", "input", "mode", "form", "layout", "precision"),
    *("median_s", "samples", "peak_mib", "before_mib"),
)


@dataclass(frozen=True)
class Task:
    """One way to run a network. `form` computes the D2 blocks."""

    network: str
    input_shape: tuple[int, ...]
    mode: str
    form: str
    layout: str
    precision: str

    def __str__(self) -> str:
        return f"{self.form}, {self.layout}, {self.precision}"


@dataclass(frozen=True)
class Figures:
    """Seconds of every timed call, or the peak of resident memory in MiB and what it was before."""

    seconds: tuple[float, ...] = ()
    peak_mib: float | None = None
    before_mib: float | None = None

    def median(self) -> float:
        return statistics.median(self.seconds)


Table = dict[Task, Figures]  # of one network in one mode


def build(network: str, mode: str, layout: str) -> nn.Module:
    """The network with random weights, the same ones every time."""
    torch.manual_seed(0)
    model: nn.Module = d3net.create_model(network).train(mode == "train")
    return model.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload, no-any-return, unused-ignore]


def call_of(task: Task, model: nn.Module) -> Callable[[], None]:
    """One forward pass in eval, or one training step that leaves no gradients behind."""
    x = torch.rand(task.input_shape).contiguous(memory_format=LAYOUTS[task.layout])
    form = forms_of(task.mode)[task.form]

    def call() -> None:
        with precision(task.precision), computed_by(form):
            if task.mode == "eval":
                with torch.no_grad():
                    model(x)
            else:
                out: Tensor = model(x)
                out.square().mean().backward()
                model.zero_grad()

    return call


def time_network(network: str, shape: tuple[int, ...], mode: str, rounds: int) -> Table:
    """All torch forms for a round, then the fastest of them against ours, in both precisions."""
    models = {layout: build(network, mode, layout) for layout in LAYOUTS}
    plain = [name for name in forms_of(mode) if name != OURS]
    ways = [(form, layout) for form in plain for layout in LAYOUTS]
    finalists = len(PRECISIONS) * (len(LAYOUTS) + 1)
    with tqdm(
        desc=f"{network} {mode}",
        total=2 * len(ways) + (1 + rounds) * finalists,  # less those that drop out
        unit="call",
        leave=False,
    ) as bar:

        def calls_of(tasks: list[Task]) -> dict[Task, Callable[[], object]]:
            return {task: _counted(call_of(task, models[task.layout]), bar) for task in tasks}

        trials = [Task(network, shape, mode, *way, PRECISIONS[0]) for way in ways]
        tried = time_in_turns(calls_of(trials), lambda task: 0, fewest_rounds=1, seconds=0)
        best = min(tried, key=lambda task: min(tried[task]))
        ways = [*((OURS, layout) for layout in LAYOUTS), (best.form, best.layout)]
        racing = [Task(network, shape, mode, *way, name) for name in PRECISIONS for way in ways]
        samples = time_in_turns(calls_of(racing), _team, fewest_rounds=rounds, seconds=0)
    return {task: Figures(tuple(taken)) for task, taken in {**tried, **samples}.items()}


def _team(task: Task) -> Hashable:
    """Only both layouts of ours are alternatives."""
    return task.form, task.precision


def _counted(call: Callable[[], None], bar: tqdm) -> Callable[[], None]:
    def counted() -> None:
        call()
        bar.update()

    return counted


def best_of(table: Table, name: str, *, ours: bool) -> Task:
    """The fastest way in this precision of those that raced to the end."""
    team = [t for t in table if t.precision == name and (t.form == OURS) == ours]
    most = max(len(table[t].seconds) for t in team)
    return min((t for t in team if len(table[t].seconds) == most), key=lambda t: table[t].median())


def ratio(table: Table, name: str) -> float:
    theirs, mine = (table[best_of(table, name, ours=ours)].median() for ours in (False, True))
    return theirs / mine


def peak_mib() -> float:
    """The most resident memory that this process ever had."""
    # Linux hands ru_maxrss down from the parent; VmHWM starts anew with the program.
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (text for text in status.read_text().splitlines() if text.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def memory_here(task: Task) -> Figures:
    """Takes STEPS steps in this process."""
    call = call_of(task, build(task.network, task.mode, task.layout))
    before = peak_mib()
    for _ in range(STEPS):
        call()
    return Figures(peak_mib=peak_mib(), before_mib=before)


def memory_apart(task: Task) -> Figures:
    """The same in a new process with as many threads."""
    command = [sys.executable, "-m", "benchmarks.nets", "--task", json.dumps(asdict(task))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def time_lines(table: Table) -> Iterator[str]:
    first = next(iter(table))
    yield f"{first.network}, {first.mode}, input {' x '.join(map(str, first.input_shape))}"
    for task, figures in table.items():
        yield f"    {task!s:45} {figures.median():8.3f} s, samples: {len(figures.seconds)}"
    for name in PRECISIONS:
        theirs, mine = (best_of(table, name, ours=ours) for ours in (False, True))
        yield (
            f'  "{name}": {ratio(table, name):.2f}x ({table[mine].median():.3f} s, '
            f"torch {table[theirs].median():.3f} s: {theirs.form}, {theirs.layout})"
        )


def memory_lines(table: Table) -> Iterator[str]:
    first = next(iter(table))
    yield f"{first.network}, peak of resident memory in a training step"
    for task, figures in table.items():
        yield f"    {task!s:45} {figures.peak_mib:8.0f} MiB, {figures.before_mib:.0f} MiB before"


def write_csv(path: Path, rows: Sequence[tuple[Task, Figures]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for task, figures in rows:
            shape = " x ".join(map(str, task.input_shape))
            median = f"{figures.median():.5g}" if figures.seconds else ""
            memory = [
                "" if mib is None else f"{mib:.0f}"
                for mib in (figures.peak_mib, figures.before_mib)
            ]
            way = (task.network, shape, task.mode, task.form, task.layout, task.precision)
            writer.writerow([*way, median, len(figures.seconds), *memory])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nets", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="networks with TEXT in the name")
    parser.add_argument("--eval", action="store_true", help="eval only, no memory")
    parser.add_argument("--train", action="store_true", help="training steps and memory only")
    parser.add_argument("--all", action="store_true", help=f"{' '.join(SLOW_RUN)} too, minutes")
    parser.add_argument("--quick", action="store_true", help="small inputs: does it run")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="default 4")
    add_output_options(parser)
    parser.add_argument("--task", help=argparse.SUPPRESS)  # of memory_apart
    options = parsed(parser, arguments)
    if options.task is not None:
        fields = json.loads(options.task)
        task = Task(**{**fields, "input_shape": tuple(fields["input_shape"])})
        print(json.dumps(asdict(memory_here(task))))
        return
    if options.rounds < 2:  # with one, trials could not be told from the race
        parser.error(f"--rounds is {options.rounds}; accepted are 2 and more")
    modes = [mode for mode in ("eval", "train") if getattr(options, mode)] or ["eval", "train"]
    runs = [
        run
        for run in RUNS
        if options.only in run[0] and run[1] in modes and (options.all or run[:2] != SLOW_RUN)
    ]
    if not runs:
        parser.error(f"nothing to run; there are {', '.join(f'{n} ({m})' for n, m, _ in RUNS)}")

    stem = stem_of("nets", options)
    print(conditions()["machine"], flush=True)
    sgemm = Sgemm()
    summary: list[str] = []
    rows: list[tuple[Task, Figures]] = []
    verdicts: list[Verdict] = []

    def report(lines: Iterator[str], table: Table) -> None:
        text = list(lines)
        print("\n".join(text), flush=True)
        summary.extend(text)
        rows.extend(table.items())

    for network, mode, asked in runs:
        shape = SMALL[network] if options.quick else find(network).input_shape
        table = time_network(network, shape, mode, options.rounds)
        sgemm.sample()
        report(time_lines(table), table)
        if asked is not None:
            verdicts.append(Verdict(f'{network}, {mode}, "high"', asked, ratio(table, "high")))
        if (network, mode) == (MEMORY_NETWORK, "train"):
            both = [best_of(table, "high", ours=ours) for ours in (False, True)]
            peaks = {task: memory_apart(task) for task in tqdm(both, desc="memory", leave=False)}
            report(memory_lines(peaks), peaks)
            theirs, mine = (peaks[task].peak_mib or 0 for task in both)
            what = f"{network}, peak memory of a training step, torch / ours"
            verdicts.append(Verdict(what, MEMORY_RATIO, theirs / mine))
    summary += ["", *verdict_lines(verdicts)] if verdicts else []
    summary.append(f"sgemm of {Sgemm.SIZE} in this run: {sgemm.gigaflops():.0f} GF/s")
    write_csv(beside(stem, ".csv"), rows)
    write_notes(stem, summary, figures=[{**asdict(task), **asdict(f)} for task, f in rows])
    print("\n".join(summary[summary.index("") :] if verdicts else summary[-1:]))
    print(f"all figures: {shown(stem, '.*')}")


if __name__ == "__main__":
    main()
