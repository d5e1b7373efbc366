"""What a run of ``benchmarks.blocks`` comes to: the targets, met or missed, and all blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.block_race import Race
from benchmarks.forms import OURS
from benchmarks.records import Verdict, geometric_mean, ratio_line, verdict_lines

# Geometric means over all blocks, by precision: eval, training step.
MEANS = {"high": (3.0, 2.5), "highest": (2.0, 1.7)}
# Under "high", by block: eval, training step.
SELECTED = {
    "144+4x36 128x256": ("S stage 1", 3.2, 2.7),
    "32+4x26 256x1600": ("vocals full b1", 4.0, 3.5),
    "32+5x32 256x256": ("vocals low b1", 3.0, 2.5),
    "16+8x34 16x100": ("vocals full b5, first block", 2.5, 1.5),
    "17+8x17 16x100": ("vocals full b5, second block", 2.5, 1.5),
}
BF16_OVER_FLOAT32 = 3.5
KEPT = {"per_source": 4.0, "per_layer": 8.0}


def targets(races: Sequence[Race]) -> list[Verdict]:
    """Every target that these races say something about."""
    return [*_speed(races), *_bf16(races), *_kept(races)]


def _speed(races: Sequence[Race]) -> Iterator[Verdict]:
    for column, mode in enumerate(("eval", "train")):
        for name, means in MEANS.items():
            ratios = _ratios(races, mode, name)
            if not ratios:
                continue
            blocks = f"{len(ratios)} blocks"
            mean = geometric_mean(ratios)
            yield Verdict(f'{mode}, "{name}", geometric mean', means[column], mean, of=blocks)
            yield Verdict(f'{mode}, "{name}", worst block', 1.0, min(ratios), of=blocks)
        for block, (words, *asked) in SELECTED.items():
            for race in races:
                if race.name == (block, mode, "high"):
                    what = f'{mode}, "high", {words}'
                    yield Verdict(what, asked[column], race.ratio(), of=block)


def _bf16(races: Sequence[Race]) -> Iterator[Verdict]:
    float32 = {race.shape: race.torch() for race in races if race.name[1:] == ("eval", "highest")}
    low = [race for race in races if race.precision == "bf16"]
    over = [
        float32[race.shape].median_ms / race.ours().median_ms
        for race in low
        if race.shape in float32
    ]
    if over:
        what = "eval, bf16 autocast, best torch in float32 / ours, geometric mean"
        yield Verdict(what, BF16_OVER_FLOAT32, geometric_mean(over), of=f"{len(over)} blocks")
    if low:
        worst = min(race.ratio() for race in low)
        what = "eval, bf16 autocast, torch's bf16 / ours, worst block"
        yield Verdict(what, 1.0, worst, of=f"{len(low)} blocks")


def _kept(races: Sequence[Race]) -> Iterator[Verdict]:
    for norm, asked in KEPT.items():
        by_shape = {r.shape: ratio for r in races if (ratio := r.kept_ratio(norm)) is not None}
        if by_shape:
            ratios = list(by_shape.values())
            words = f"kept for backward, {norm}, least of torch / ours"
            blocks = f"{len(ratios)} blocks"
            yield Verdict(f"{words}, geometric mean", asked, geometric_mean(ratios), of=blocks)
            yield Verdict(f"{words}, worst block", asked, min(ratios), of=blocks)


def _ratios(races: Sequence[Race], mode: str, name: str) -> list[float]:
    return [race.ratio() for race in races if (race.mode, race.precision) == (mode, name)]


def summarise(races: Sequence[Race]) -> list[str]:
    """The spread of each mode and precision, then the targets."""
    lines = [
        ratio_line(f"{mode}, {name}: best torch / ours", _ratios(races, mode, name))
        for mode, name in dict.fromkeys((race.mode, race.precision) for race in races)
    ]
    return [*lines, "", *verdict_lines(targets(races))]


def write_markdown(path: Path, races: Sequence[Race], machine: str) -> None:
    """The targets, then a table for each mode and precision with every block and form."""
    parts = ["# D2 blocks, ours against plain torch", machine + ", batch 1.", *_legend(), ""]
    parts += verdict_lines(targets(races))
    for mode, name in dict.fromkeys((race.mode, race.precision) for race in races):
        chosen = [race for race in races if (race.mode, race.precision) == (mode, name)]
        parts += ["", f"## {mode}, {name}", "", *_table(chosen)]
    path.write_text("\n".join(parts) + "\n")


def _legend() -> list[str]:
    return [
        "",
        "A block is input channels + layers x growth rate, height x width. Times are medians in",
        "milliseconds, NCHW / channels_last; those of forms that fell behind at once are of few or",
        "single samples, in brackets. The ratio is that of the fastest torch form to ours, in the",
        "faster layout each; kept is for the backward pass, in MiB, the least of each side.",
    ]


def _table(races: Sequence[Race]) -> list[str]:
    forms = list(dict.fromkeys(e.form for race in races for e in race.entrants))
    kept = any(e.kept_bytes is not None for e in races[0].entrants)
    head = ["block", *forms, "ratio", *(["kept by torch, ours"] if kept else [])]
    rows = [head, ["---"] * len(head)]
    for race in races:
        most = max(e.samples for e in race.entrants)

        def times(form: str, race: Race = race, most: int = most) -> str:
            own = [e for e in race.entrants if e.form == form]
            return " / ".join(
                f"{e.median_ms:.2f}" if e.samples == most else f"({e.median_ms:.2f})" for e in own
            )

        row = [str(race.shape), *map(times, forms), f"{race.ratio():.2f}x"]
        if kept:
            sizes = _least(race, lambda e: e != OURS), _least(race, lambda e: e == OURS)
            row.append(", ".join(f"{size / 2**20:.2f}" for size in sizes))
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in rows]


def _least(race: Race, belongs: Callable[[str], bool]) -> int:
    return min(e.kept_bytes or 0 for e in race.entrants if belongs(e.form))
