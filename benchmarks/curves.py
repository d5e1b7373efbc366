"""Training with fused blocks and with plain torch, side by side: ``python -m benchmarks.curves``.

The demo's small separator learns to separate sums of drifting tones and decaying clicks, drawn anew
for every step from the seed. All networks start from the same numbers and see the same batches.
Their losses are drawn into one picture. A second panel shows how far they part, beside how far
plain torch parts from itself in the other memory layout: rounding differs there too, and training
amplifies it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks.block_forms import precision
from benchmarks.records import add_output_options, beside, parsed, shown, stem_of, write_notes
from benchmarks.timing import threads
from d3net.demo.plain import PlainD2Block
from d3net.demo.separator import SmallSeparator
from d3net.demo.training import Run
from d3net.machine import describe_machine
from d3net_kernels import D2Block

FRAMES, BINS, STEMS = 64, 96, 2
REFERENCE = "plain torch, channels_last"


def draw_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Magnitudes of a mixture (1, 2, frames, bins) and of its stems (1, 2 stems, 2, ...)."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    frames = torch.arange(FRAMES)[:, None, None]
    bins = torch.arange(BINS)[None, :, None]
    # Tones: narrow in frequency, long, drifting. Clicks: short in time, wide, decaying.
    path = BINS * uniform(4) + 0.2 * (uniform(4) - 0.5) * frames
    tones = torch.exp(-0.5 * (bins - path).square()).sum(-1)
    start = FRAMES * uniform(4)
    decay = torch.where(frames >= start, torch.exp(-0.5 * (frames - start)), torch.zeros(()))
    clicks = (decay * torch.exp(-bins / (BINS * (0.2 + uniform(4))))).sum(-1)
    stems = torch.stack([tones, clicks])[None, :, None] * (0.5 + uniform(1, STEMS, 2, 1, 1))
    return stems.sum(dim=1), stems


def train(steps: int, seed: int) -> dict[str, list[float]]:
    """The losses of every step, by the name of the run."""
    torch.manual_seed(seed)
    plain = SmallSeparator(PlainD2Block, stems=STEMS, width=16, growth_rate=8)
    fused = SmallSeparator(D2Block, stems=STEMS, width=16, growth_rate=8)
    fused.load_state_dict(plain.state_dict())
    runs = {
        REFERENCE: ("highest", Run.of("plain", plain, "channels_last")),
        "plain torch, NCHW": ("highest", Run.of("plain", plain, "NCHW")),
        'fused, "highest"': ("highest", Run.of("fused", fused, "channels_last")),
        'fused, "high"': ("high", Run.of("fused", fused, "channels_last")),
    }
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), unit="step"):
        batch = draw_batch(generator)
        for name, run in runs.values():
            with precision(name):
                run.step(*batch)
    return {name: run.losses for name, (_, run) in runs.items()}


def draw(path: Path, losses: dict[str, list[float]], title: str) -> None:
    """Losses above, their distance from the reference's below."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.plot(losses[REFERENCE], label=REFERENCE, linewidth=5, color="0.8")
    others = {name: values for name, values in losses.items() if name != REFERENCE}
    for style, (name, values) in zip(("-", "--", ":"), others.items(), strict=True):
        (line,) = above.plot(values, style, label=name, linewidth=1.2)
        apart = [abs(a - b) / b for a, b in zip(values, losses[REFERENCE], strict=True)]
        below.plot(apart, style, label=name, linewidth=1, color=line.get_color())
    above.set(ylabel="loss", yscale="log", title=title)
    below.set(xlabel="step", ylabel=f"relative distance from\n{REFERENCE}", yscale="log")
    for panel in (above, below):
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=110)


def summarise(losses: dict[str, list[float]]) -> list[str]:
    """The mean loss of the last tenth of the steps of each run."""
    lines = []
    for name, values in losses.items():
        last = values[-max(1, len(values) // 10) :]
        lines.append(
            f"{name:28} first {values[0]:.7f}, mean of the last {len(last)} steps"
            f" {sum(last) / len(last):.5f}"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__)
    parser.add_argument("--steps", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="default 1: the network is small"
    )
    add_output_options(parser)
    options = parsed(parser, arguments)
    stem = stem_of("curves", options)
    with threads(options.threads):
        losses = train(options.steps, options.seed)
        summary = summarise(losses)
        draw(beside(stem, ".png"), losses, f"seed {options.seed}, {describe_machine()}")
        write_notes(stem, summary, seed=options.seed, losses=losses)
    print("\n".join([*summary, f"picture and losses: {shown(stem, '.*')}"]))


if __name__ == "__main__":
    main()
