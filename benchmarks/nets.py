"""Whole networks, ours against plain torch: ``python -m benchmarks.nets``.

Forward passes in eval, and the peak memory of a training step. Every figure comes from a process of
its own, since the peak of resident memory (ru_maxrss) never falls: one for each network, way to
compute the D2 blocks, memory layout and precision; their order alternates from round to round.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

import d3net
from benchmarks.block_forms import NETWORKS, computed_by, forms_of, precision
from benchmarks.forms import LAYOUTS, OURS
from benchmarks.layers import FOLDER
from benchmarks.timing import seconds_of
from d3net.machine import describe_machine
from d3net.registry import find

CALLS = 3  # timed in each process, after one that is not
assert set(NETWORKS) <= set(d3net.list_models())


@dataclass(frozen=True)
class Task:
    """What one process computes. `form` computes the D2 blocks."""

    network: str
    mode: str
    form: str
    layout: str
    precision: str


@dataclass(frozen=True)
class Figures:
    """The median seconds of one call, and the peak of resident memory in MiB, before and after."""

    seconds: float
    start_mib: float
    peak_mib: float


def run_here(task: Task) -> Figures:
    """Builds the network with random weights and runs it, in this process."""
    torch.manual_seed(0)
    model = d3net.create_model(task.network).train(task.mode == "train")
    model.to(memory_format=LAYOUTS[task.layout])  # type: ignore[call-overload, unused-ignore]
    x = torch.rand(find(task.network).input_shape).contiguous(memory_format=LAYOUTS[task.layout])
    start = peak_mib()

    def call() -> None:
        if task.mode == "eval":
            with torch.no_grad():
                model(x)
            return
        out = model(x)
        loss = sum(t.square().mean() for t in (out if isinstance(out, (list, tuple)) else [out]))
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        model.zero_grad()

    with precision(task.precision), computed_by(forms_of(task.mode)[task.form]):
        call()
        seconds = statistics.median(seconds_of(call, 1) for _ in range(CALLS))
    return Figures(seconds, start, peak_mib())


def peak_mib() -> float:
    """The most resident memory that this process ever had; kibibytes on Linux, bytes on macOS."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def run_apart(task: Task) -> Figures:
    """The same in a new process."""
    command = [sys.executable, "-m", "benchmarks.nets", "--task", json.dumps(asdict(task))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def tasks_of(network: str, mode: str) -> list[Task]:
    """Ours in both precisions, and all forms of plain torch; each in both layouts."""
    tasks = []
    for form in forms_of(mode):
        for layout in LAYOUTS:
            for name in ("highest", "high"):
                tasks.append(Task(network, mode, form, layout, name))
    return tasks


def compare(network: str, mode: str, rounds: int) -> tuple[list[str], list[dict[str, object]]]:
    """The lines of a table, and the raw figures."""
    tasks = tasks_of(network, mode)
    figures: dict[Task, list[Figures]] = {task: [] for task in tasks}
    for turn in range(rounds):
        for task in tasks if turn % 2 == 0 else tasks[::-1]:
            figures[task].append(run_apart(task))
    seconds = {task: statistics.median(f.seconds for f in figures[task]) for task in tasks}
    peak = {task: statistics.median(f.peak_mib for f in figures[task]) for task in tasks}
    lines = [f"{network}, {mode}, input {' x '.join(map(str, find(network).input_shape))}"]
    for task in tasks:
        start = statistics.median(f.start_mib for f in figures[task])
        lines.append(
            f"    {task.form:20} {task.layout:13} {task.precision:7} {seconds[task]:8.3f} s"
            f" {peak[task]:8.0f} MiB at most, {start:6.0f} MiB before the first call"
        )
    for name in ("highest", "high"):
        same = [task for task in tasks if task.precision == name]
        ours = [task for task in same if task.form == OURS]
        plain = [task for task in same if task.form != OURS]
        time_ratio = min(seconds[t] for t in plain) / min(seconds[t] for t in ours)
        memory_ratio = min(peak[t] for t in plain) / min(peak[t] for t in ours)
        lines.append(
            f"  {name}: best torch time / ours {time_ratio:.2f}, least peak of torch / ours"
            f" {memory_ratio:.2f}"
        )
    raw: list[dict[str, object]] = [
        {**asdict(task), "figures": [asdict(f) for f in figures[task]]} for task in tasks
    ]
    return lines, raw


RUNS = (("d3net_vocals", "eval"), ("d3net_s_fcn", "eval"), ("d3net_s", "train"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nets", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="networks with TEXT in the name")
    parser.add_argument("--eval", action="store_true", help="eval only")
    parser.add_argument("--train", action="store_true", help="training steps only")
    parser.add_argument("--repeat", type=int, default=2, metavar="N", help="processes of each kind")
    parser.add_argument(
        "--save", metavar="NAME", help="keep as benchmarks/saved/NAME.json, for git"
    )
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.task is not None:
        print(json.dumps(asdict(run_here(Task(**json.loads(options.task))))))
        return
    wanted = [mode for mode in ("eval", "train") if getattr(options, mode)] or ["eval", "train"]
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = options.save or f"{stamp}-nets"
    path = FOLDER / ("saved" if options.save else "results") / f"{name}.json"
    print(describe_machine(), flush=True)
    summary, raw = [], []
    for network, mode in RUNS:
        if options.only in network and mode in wanted:
            lines, figures = compare(network, mode, options.repeat)
            print("\n".join(lines), flush=True)
            summary += lines
            raw += figures
    if not raw:
        parser.error(f"nothing to run; there are {', '.join(f'{n} ({m})' for n, m in RUNS)}")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    notes = {"machine": describe_machine(), **versions, "when": stamp, "summary": summary}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**notes, "figures": raw}, indent=2) + "\n")
    print(f"all figures: {path.relative_to(FOLDER.parent)}")


if __name__ == "__main__":
    main()
