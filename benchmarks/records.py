"""Where the figures of a run go, on what they were taken, and how they stand to the targets."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import d3net_kernels
from d3net.machine import describe_machine
from d3net_kernels import _binary

RESULTS = Path(__file__).parent / "results"  # runs that are kept, in git
SCRATCH = Path(__file__).parent / "scratch"  # all others, ignored by git
TOO_SLOW = 0.95  # below this ratio something counts as slower than torch


def add_output_options(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME-*, for git")
    where.add_argument(
        "--out", type=Path, default=SCRATCH, metavar="FOLDER", help="default benchmarks/scratch"
    )


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a run; an error where there are no kernels, for ours would be plain torch."""
    options = parser.parse_args(arguments)
    if _binary.missing is not None:
        parser.error(_binary.missing)
    return options


def stem_of(kind: str, options: argparse.Namespace) -> Path:
    """The files of this run without their endings; the folder is made."""
    name = options.save or time.strftime("%Y%m%d-%H%M%S")
    stem: Path = (RESULTS if options.save else options.out) / f"{name}-{kind}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    return stem


def beside(stem: Path, ending: str) -> Path:
    """The file of a run with this ending; a name may hold dots."""
    return stem.with_name(stem.name + ending)


def shown(stem: Path, endings: str) -> str:
    """A run's files as the user would name them."""
    here = Path.cwd()
    return f"{stem.relative_to(here) if stem.is_relative_to(here) else stem}{endings}"


def conditions() -> dict[str, str]:
    """What a figure depends on besides the code under test."""
    return {
        "machine": describe_machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "d3net_kernels": d3net_kernels.__version__,
        "build": _digest(_binary.PATH),
    }


def _digest(path: Path) -> str:
    """Tells one build of the kernels from another."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else "none"


def _commit() -> str:
    """Of the sources, with "-dirty" where they differ from it; "none" outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return done.stdout.strip()


def write_notes(
    stem: Path, summary: Sequence[str], *, under: Mapping[str, str] | None = None, **more: object
) -> None:
    """The JSON file of a run: its conditions (those of now, or `under` earlier ones), the commit,
    when it was written, the summary, and ``more``."""
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    notes: dict[str, object] = {**(under or conditions()), "commit": _commit(), "when": when}
    notes |= {"summary": list(summary), **more}
    beside(stem, ".json").write_text(json.dumps(notes, indent=2) + "\n")


def read_conditions(stem: Path) -> dict[str, str]:
    """What was noted down of `conditions` when the run began."""
    notes = json.loads(beside(stem, ".json").read_text())
    return {name: str(notes.get(name)) for name in conditions()}


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))


def ratio_line(name: str, ratios: Sequence[float]) -> str:
    slower = sum(ratio < TOO_SLOW for ratio in ratios)
    return (
        f"{name:62} geometric mean {geometric_mean(ratios):6.2f}x, worst {min(ratios):6.2f}x,"
        f" {slower} of {len(ratios)} below {TOO_SLOW}x"
    )


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured. `of`: on which cases. Smaller is better where `at_most`."""

    what: str
    target: float
    measured: float
    unit: str = "x"
    at_most: bool = False
    of: str = ""

    @property
    def met(self) -> bool:
        return self.measured <= self.target if self.at_most else self.measured >= self.target

    def cells(self) -> tuple[str, str, str, str]:
        """What, asked, measured, and whether it was met."""
        sign = "<=" if self.at_most else ">="
        return (
            self.what + (f" ({self.of})" if self.of else ""),
            f"{sign} {self.target:g} {self.unit}".replace(" x", "x"),
            f"{self.measured:.4g} {self.unit}".replace(" x", "x"),
            "met" if self.met else "MISSED",
        )


def verdict_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """The verdicts as a table in Markdown that also reads well in a terminal."""
    head = ("target", "asked", "measured", "")
    rows = [head, *(verdict.cells() for verdict in verdicts)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        return (
            f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
        )

    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return [line(rows[0]), rule, *(line(row) for row in rows[1:])]
