"""Spectrograms and the separation score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stft:
    """Short-time Fourier transform with a periodic Hann window, centred frames, no scaling."""

    n_fft: int
    hop: int

    @property
    def bins(self) -> int:
        return self.n_fft // 2 + 1

    def forward(self, waves: Tensor) -> Tensor:
        """(..., samples) real -> (..., frames, bins) complex."""
        flat = waves.reshape(-1, waves.shape[-1])
        spectra: Tensor = torch.stft(
            flat, self.n_fft, self.hop, window=self._window(waves), return_complex=True
        )
        return spectra.transpose(-1, -2).reshape(*waves.shape[:-1], -1, self.bins)

    def inverse(self, spectra: Tensor, samples: int) -> Tensor:
        """(..., frames, bins) complex -> (..., samples) real."""
        flat = spectra.flatten(0, -3).transpose(-1, -2)
        waves: Tensor = torch.istft(
            flat, self.n_fft, self.hop, window=self._window(spectra.real), length=samples
        )
        return waves.reshape(*spectra.shape[:-2], samples)

    def _window(self, like: Tensor) -> Tensor:
        return torch.hann_window(self.n_fft, dtype=like.dtype, device=like.device)


def sdr(target: Tensor, estimate: Tensor) -> Tensor:
    """Signal-to-distortion ratio in dB: 10 log10(sum s^2 / sum (s - s_hat)^2).

    target, estimate: (..., channels, samples); the sums run over both. Returns (...). It is +inf
    where both are equal and -inf where the target is silent and the estimate is not.
    """
    signal = target.double().square().sum(dim=(-2, -1))
    distortion = (target.double() - estimate.double()).square().sum(dim=(-2, -1))
    return 10 * torch.log10(signal / distortion)
