"""The picture of a run of ``benchmarks.blocks``: how many times faster, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.block_race import Race

TICKS = (0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)
COLOURS = {"highest": "tab:blue", "high": "tab:orange", "bf16": "tab:green"}


def plot(path: Path, races: Sequence[Race], machine: str) -> None:
    """One panel for eval and one for training; a dot per block and precision, with quartiles."""
    modes = list(dict.fromkeys(race.mode for race in races))
    blocks = list(dict.fromkeys(str(race.shape) for race in races))
    figure = Figure(
        figsize=(max(6, 1.5 + 0.22 * len(blocks)), 3.6 * len(modes)), layout="constrained"
    )
    panels = figure.subplots(len(modes), sharex=True, squeeze=False)[:, 0]
    for panel, mode in zip(panels, modes, strict=True):
        for offset, (name, colour) in enumerate(COLOURS.items()):
            chosen = [race for race in races if (race.mode, race.precision) == (mode, name)]
            if not chosen:
                continue
            middle = [race.ratio() for race in chosen]
            ends = [
                (race.ours().low or m, race.ours().high or m)
                for race, m in zip(chosen, middle, strict=True)
            ]
            panel.errorbar(
                [blocks.index(str(race.shape)) + 0.2 * (offset - 1) for race in chosen],
                middle,
                # The median of the ratios may lie outside the quartiles of few rounds.
                yerr=[
                    [max(0, m - low) for m, (low, _) in zip(middle, ends, strict=True)],
                    [max(0, high - m) for m, (_, high) in zip(middle, ends, strict=True)],
                ],
                fmt="o",
                markersize=4,
                color=colour,
                label=name,
            )
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_locator(FixedLocator(TICKS))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
        panel.grid(axis="y", alpha=0.3)
        panel.margins(x=0.01)
        panel.set(title=mode, ylabel="best torch time / ours")
        panel.legend(title="precision", loc="upper left", bbox_to_anchor=(1, 1))
    panels[-1].set_xticks(range(len(blocks)), blocks, rotation=90, fontsize=7)
    figure.suptitle(f"D2 blocks of D3Net, batch 1\n{machine}", fontsize=9)
    figure.savefig(path, dpi=110)
