"""What the demo leaves behind: sound files, a picture, a table for people and one for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import soundfile
from matplotlib.figure import Figure
from torch import Tensor

from d3net.audio import Stft

NOT_SHOWN = """\
Plain torch is the best form known here: each source is normalised once, in the better layout.
What this does not show: the network is trained and judged on the same six seconds of one song, so
the SDR says that it can be trained, not that it separates other music. The times are those of this
machine's CPU and of this small network; they say nothing about a GPU or about D3Net itself."""
HIGHEST_KHZ = 16  # the clip's codec leaves nothing above


@dataclass(frozen=True)
class Measured:
    """One trained run: median step, loss of every step and of the clip, SDR in dB by stem."""

    layout: str
    step_seconds: float
    kept_bytes: int
    losses: list[float]
    clip_loss: float
    sdr: dict[str, float]


@dataclass(frozen=True)
class Trial:
    """A few steps in one layout: the median step, and the loss at the end."""

    name: str
    layout: str
    step_seconds: float
    loss: float


@dataclass(frozen=True)
class Report:
    """All that the demo measured.

    plain, fused: the trained runs. mixture_sdr: where both start, by stem. trials: the short runs
    of each network in each layout, before training.
    """

    machine: str
    steps: int
    seed: int
    plain: Measured
    fused: Measured
    mixture_sdr: dict[str, float]
    trials: list[Trial]

    def table(self) -> str:
        """The table as text."""
        plain, fused = self.plain, self.fused
        rows = [
            ("", "plain torch", "fused", ""),
            ("memory layout, the faster of two", plain.layout, fused.layout, ""),
            (
                "median training step",
                f"{plain.step_seconds:.3f} s",
                f"{fused.step_seconds:.3f} s",
                f"ratio {plain.step_seconds / fused.step_seconds:.2f}",
            ),
            (
                "kept for backward",
                f"{plain.kept_bytes / 2**20:.0f} MiB",
                f"{fused.kept_bytes / 2**20:.0f} MiB",
                f"ratio {plain.kept_bytes / fused.kept_bytes:.2f}",
            ),
            loss_row("loss of the first step", plain.losses[0], fused.losses[0]),
            loss_row("final loss, on the whole clip", plain.clip_loss, fused.clip_loss),
        ]
        for stem, before in self.mixture_sdr.items():
            rows.append(
                (
                    f"SDR of {stem}, dB (mixture: {before:.1f})",
                    f"{plain.sdr[stem]:.1f}",
                    f"{fused.sdr[stem]:.1f}",
                    f"fused gains {fused.sdr[stem] - before:.1f}",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(row[1:3], widths[1:3], strict=True)]
                + [row[3]]
            ).rstrip()
            for row in rows
        ]
        return "\n".join(
            [
                *lines,
                "",
                f"{self.steps} steps each, in turns, from seed {self.seed}, on {self.machine}.",
                "The first steps of both networks in both layouts (rounding differs, and training",
                "amplifies it: plain torch parts from itself as well):",
                *(
                    f"    {trial.name:11} {trial.layout:13} {trial.step_seconds:.3f} s a step,"
                    f" then loss {trial.loss:.6f}"
                    for trial in self.trials
                ),
                NOT_SHOWN,
            ]
        )

    def write(self, folder: Path) -> None:
        """table.txt and table.json in ``folder``."""
        (folder / "table.txt").write_text(self.table() + "\n")
        (folder / "table.json").write_text(json.dumps(asdict(self), indent=2) + "\n")


def loss_row(title: str, plain: float, fused: float) -> tuple[str, str, str, str]:
    return title, f"{plain:.6f}", f"{fused:.6f}", f"differ by {abs(plain - fused):.1e}"


def write_waves(folder: Path, waves: dict[str, Tensor], sample_rate: int) -> None:
    """One 16-bit WAV a name from (2, samples); one common gain keeps the loudest whole."""
    peak = max(float(wave.abs().max()) for wave in waves.values())
    for name, wave in waves.items():
        soundfile.write(folder / f"{name}.wav", (wave.T / max(peak, 1.0)).numpy(), sample_rate)


def write_picture(
    path: Path,
    stft: Stft,
    sample_rate: int,
    mixture: Tensor,
    targets: dict[str, Tensor],
    estimates: dict[str, Tensor],
) -> None:
    """Spectrograms of the mixture, and of each stem as it is and as it was separated.

    All waves are (2, samples); their two channels are averaged. One scale of 80 dB serves all.
    """
    waves = {
        "mixture": mixture,
        **{f"{stem}, true": wave for stem, wave in targets.items()},
        **{f"{stem}, separated": wave for stem, wave in estimates.items()},
    }
    images = {title: decibels(stft, wave) for title, wave in waves.items()}
    loudest = max(float(image.max()) for image in images.values())
    extent = (0.0, mixture.shape[-1] / sample_rate, 0.0, sample_rate / 2000)

    figure = Figure(figsize=(16, 9.5), layout="constrained")
    axes = figure.subplot_mosaic(
        [
            ["mixture"] * len(targets),
            [f"{stem}, true" for stem in targets],
            [f"{stem}, separated" for stem in estimates],
        ]
    )
    for title, image in images.items():
        shown = axes[title].imshow(
            image.numpy(),
            origin="lower",
            aspect="auto",
            extent=extent,
            vmin=loudest - 80,
            vmax=loudest,
            cmap="magma",
        )
        axes[title].set(
            title=title, ylim=(0, HIGHEST_KHZ), xlabel="time (s)", ylabel="frequency (kHz)"
        )
    figure.colorbar(shown, ax=list(axes.values()), label="power (dB)", aspect=40)
    figure.savefig(path, dpi=100)


def decibels(stft: Stft, wave: Tensor) -> Tensor:
    """(2, samples) -> (bins, frames): power of the spectrogram, averaged over the channels."""
    power = stft.forward(wave).abs().square().mean(dim=0)
    return 10 * power.clamp(min=1e-10).log10().T
