"""The layers to measure: all distinct ones of the D3Net networks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """One multidilated layer with a 3x3 kernel at batch 1. count: uses of it by network."""

    group_channels: tuple[int, ...]
    dilations: tuple[int, ...]
    c_out: int
    height: int
    width: int
    count: dict[str, int]

    @property
    def flops(self) -> int:
        """Two a multiply-add, taps that only see padding included."""
        pixels = self.height * self.width
        return 2 * 9 * sum(self.group_channels) * self.c_out * pixels

    def __str__(self) -> str:
        groups = "+".join(str(channels) for channels in self.group_channels)
        return f"{groups}->{self.c_out} {self.height}x{self.width}"


def load_shapes() -> list[Shape]:
    """The shapes of shapes.json, in its order: network by network, from the input on."""
    rows = json.loads(Path(__file__).with_name("shapes.json").read_text())["shapes"]
    return [
        Shape(
            group_channels=tuple(row["group_channels"]),
            dilations=tuple(row["dilations"]),
            c_out=row["c_out"],
            height=row["height"],
            width=row["width"],
            count=row["count"],
        )
        for row in rows
    ]


def spread(shapes: list[Shape], number: int, most_flops: float) -> list[Shape]:
    """``number`` of the shapes below ``most_flops``, evenly spread over their sizes."""
    ordered = sorted((s for s in shapes if s.flops <= most_flops), key=lambda s: s.flops)
    if len(ordered) <= number:
        return ordered
    return [ordered[i * (len(ordered) - 1) // (number - 1)] for i in range(number)]
