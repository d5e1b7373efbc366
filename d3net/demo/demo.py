"""The main job of the library on real input, from the song to the separated stems."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3net.audio import Stft, sdr
from d3net.data.stempeg_clip import STEMS, Clip, load_clip
from d3net.demo.plain import PlainD2Block
from d3net.demo.report import Measured, Report, Trial, write_picture, write_waves
from d3net.demo.separator import SmallSeparator
from d3net.demo.training import Crops, Run, race, relative_error, train
from d3net.machine import describe_machine
from d3net_kernels import D2Block

STFT = Stft(n_fft=2048, hop=512)
MODELLED_BINS = 1024  # all but the bin at half the sample rate, which stays silent


def run_demo(folder: Path, steps: int, seed: int) -> Report:
    """Train the separator through plain torch and through the fused kernels; write what it gives.

    Writes five WAV files, spectrograms.png, table.txt and table.json into the existing ``folder``
    and returns what the table says. The caller sees to it that the kernels are there.
    """
    clip = load_clip()
    magnitudes = STFT.forward(clip.stems).abs()[..., :MODELLED_BINS]
    mixture_spectrum = STFT.forward(clip.mixture)
    mixture = mixture_spectrum.abs()[..., :MODELLED_BINS]

    nets = same_nets(seed)
    raced = race(nets, Crops(mixture, magnitudes, seed))
    runs = [Run.of(name, net, fastest_layout(raced, name)) for name, net in nets.items()]
    crops = Crops(mixture, magnitudes, seed)
    batch = crops.draw()
    kept = [run.kept_bytes(*batch) for run in runs]
    train(runs, crops, steps)

    estimates = [run.separate(mixture) for run in runs]
    waves = [to_waves(estimate, mixture_spectrum, clip) for estimate in estimates]
    plain, fused = (
        Measured(
            layout=run.layout,
            step_seconds=run.median_seconds(),
            kept_bytes=run_kept,
            losses=run.losses,
            clip_loss=float(relative_error(estimate, magnitudes)),
            sdr=by_stem(sdr(clip.stems, wave)),
        )
        for run, run_kept, estimate, wave in zip(runs, kept, estimates, waves, strict=True)
    )
    report = Report(
        machine=describe_machine(),
        steps=steps,
        seed=seed,
        plain=plain,
        fused=fused,
        mixture_sdr=by_stem(sdr(clip.stems, clip.mixture.expand_as(clip.stems))),
        trials=[Trial(run.name, run.layout, run.median_seconds(), run.losses[-1]) for run in raced],
    )

    targets = dict(zip(STEMS, clip.stems, strict=True))
    separated = dict(zip(STEMS, waves[-1], strict=True))
    report.write(folder)
    write_waves(folder, {"mixture": clip.mixture, **separated}, clip.sample_rate)
    write_picture(
        folder / "spectrograms.png", STFT, clip.sample_rate, clip.mixture, targets, separated
    )
    return report


def same_nets(seed: int) -> dict[str, nn.Module]:
    """The separator through plain torch and through the fused kernels, with the same parameters."""
    torch.manual_seed(seed)
    plain = SmallSeparator(PlainD2Block, stems=len(STEMS))
    fused = SmallSeparator(D2Block, stems=len(STEMS))
    fused.load_state_dict(plain.state_dict())
    return {"plain torch": plain, "fused": fused}


def fastest_layout(raced: list[Run], name: str) -> str:
    return min((run for run in raced if run.name == name), key=Run.median_seconds).layout


def to_waves(estimate: Tensor, mixture_spectrum: Tensor, clip: Clip) -> Tensor:
    """Magnitudes (stems, 2, frames, bins) -> (stems, 2, samples), with the phase of the mixture."""
    phase = mixture_spectrum[..., :MODELLED_BINS].sgn()
    spectra = F.pad(estimate * phase, (0, STFT.bins - MODELLED_BINS))
    return STFT.inverse(spectra, clip.stems.shape[-1])


def by_stem(values: Tensor) -> dict[str, float]:
    return dict(zip(STEMS, values.tolist(), strict=True))
