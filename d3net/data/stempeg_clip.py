"""The six seconds of a real song, with its four stems, that the PyPI package ``stempeg`` ships.

The clip (The Easton Ellises, "Falcon 69") is CC BY-NC-SA 3.0: it is read from the installed package
and never copied. ``stempeg`` itself is not imported, because its import fails without the ffmpeg
programs; PyAV brings its own decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

STEMS = ("drums", "bass", "other", "vocals")
"""Order of the stems in a ``.stem.mp4`` file, behind the mastered mix in its first stream."""


@dataclass(frozen=True)
class Clip:
    """Stereo stems of one song.

    stems: (4, 2, samples) float32, in the order of ``STEMS``; sample_rate: samples a second.
    """

    stems: Tensor
    sample_rate: int

    @property
    def mixture(self) -> Tensor:
        """(2, samples): the sum of the stems, which the file's own, mastered mix is not."""
        return self.stems.sum(dim=0)


def clip_path() -> Path:
    """Where the installed ``stempeg`` keeps its clip. Raises ModuleNotFoundError without it."""
    try:
        files = metadata.files("stempeg") or []
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError("No module named 'stempeg'", name="stempeg") from error
    for file in files:
        if file.name.endswith(".stem.mp4"):
            return Path(str(file.locate()))
    raise FileNotFoundError("the installed stempeg holds no .stem.mp4 file: reinstall it")


def load_clip(path: Path | None = None) -> Clip:
    """Decode the stems of ``path``, by default of the clip of ``stempeg``.

    Raises ModuleNotFoundError without ``stempeg``, FileNotFoundError without the file, ValueError
    when the file does not hold a mix and four stems of one length and sample rate.
    """
    path = clip_path() if path is None else path
    with av.open(str(path)) as container:
        streams = container.streams.audio
        if len(streams) != 1 + len(STEMS) or len({stream.rate for stream in streams}) != 1:
            raise ValueError(
                f"{path} holds audio streams at {[stream.rate for stream in streams]} Hz; "
                f"expected a mix and {len(STEMS)} stems at one rate"
            )
        sample_rate = int(streams[0].rate)
        pieces: dict[int, list[np.ndarray]] = {stream.index: [] for stream in streams}
        for packet in container.demux(streams):
            for frame in packet.decode():
                pieces[packet.stream.index].append(frame.to_ndarray())
        stems = [np.concatenate(pieces[stream.index], axis=1) for stream in streams[1:]]
    if len({stem.shape for stem in stems}) != 1:
        raise ValueError(
            f"{path} holds stems of {[stem.shape for stem in stems]} (channels, samples); "
            "expected one shape"
        )
    return Clip(torch.from_numpy(np.stack(stems)).float(), sample_rate)
