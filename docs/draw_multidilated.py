"""Draws multidilated.png: ``python docs/draw_multidilated.py`` (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

SIDE = 17  # pixels of the drawn piece of a map
SOURCES = 3
SEEN, TAP, GRID, GAP = "#a6cee3", "#1f4e79", "#d9d9d9", "#d95f02"


def field_of_source(source: int) -> int:
    """How many pixels wide x_i sees the input of the block, when x_j is read with dilation 2^j."""
    return 2 ** (source + 1) - 1


def draw_source(axis: Axes, dilation: int, field: int) -> None:
    """The nine taps on one source, and around each the pixels of the input that it sees."""
    centre = SIDE // 2
    taps = [centre + step * dilation for step in (-1, 0, 1)]
    seen = {tap + offset for tap in taps for offset in range(-(field // 2), field // 2 + 1)}
    between = set(range(min(seen), max(seen) + 1))
    for row in range(SIDE):
        for column in range(SIDE):
            colour = "white"
            if row in between and column in between:
                colour = SEEN if row in seen and column in seen else GAP
            if row in taps and column in taps:
                colour = TAP
            axis.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor=GRID, lw=0.5))
    axis.set(xlim=(0, SIDE), ylim=(SIDE, 0), aspect="equal", xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_color(GRID)


def main() -> None:
    figure = Figure(figsize=(10.5, 8.4))
    axes = figure.subplots(2, SOURCES)
    figure.subplots_adjust(left=0.04, right=0.96, top=0.90, bottom=0.09, wspace=0.22, hspace=0.42)
    rows = (
        (0.97, "One dilation for all sources: early sources are read with gaps", (4, 4, 4)),
        (0.51, "Multidilated: source i has dilation 2^i, and nothing is skipped", (1, 2, 4)),
    )
    for row, (height, headline, dilations) in zip(axes, rows, strict=True):
        figure.text(0.5, height, headline, ha="center", va="center", size=14, weight="bold")
        for source, (axis, dilation) in enumerate(zip(row, dilations, strict=True)):
            draw_source(axis, dilation, field_of_source(source))
            axis.set_title(f"source x_{source}, dilation {dilation}", size=11)
            if source + 1 < SOURCES:
                axis.text(
                    1.11, 0.5, "+", size=22, ha="center", va="center", transform=axis.transAxes
                )
    key = ((TAP, "tap of the 3x3 kernel"), (SEEN, "seen through the taps"), (GAP, "skipped"))
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour, edgecolor=GRID) for colour, _ in key]
    figure.legend(handles, [text for _, text in key], loc="lower center", ncols=3, frameon=False)
    figure.savefig(Path(__file__).with_name("multidilated.png"), dpi=90)


if __name__ == "__main__":
    main()
