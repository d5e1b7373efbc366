"""The golden files in tests/golden: what the official release computed, and from which parameters.

Parameters are not stored but drawn again from their names: counters 1, 2, ... after a start that
comes from seed and name, each scrambled by splitmix64 (Steele, Lea & Flood, OOPSLA 2014). Running
statistics are stored.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d3net.official_names import Official

FOLDER = Path(__file__).parent / "golden"
GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = (1 << 64) - 1


def scramble(z: np.ndarray) -> np.ndarray:
    """splitmix64's output function; uint64 wraps around as it should."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
    return z ^ (z >> np.uint64(31))


def uniform(name: str, count: int, seed: int) -> np.ndarray:
    """`count` numbers of [0, 1) in steps of 2**-24, float64."""
    start = (seed << 32 | zlib.crc32(name.encode())) + GAMMA & WORD
    state = int(scramble(np.array([start], np.uint64))[0])
    counters = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GAMMA) + np.uint64(state)
    return (scramble(counters) >> np.uint64(40)).astype(np.float64) / (1 << 24)


def parameter(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The parameter of an official name; weights keep the variance of what they are applied to."""
    u = uniform(name, int(np.prod(shape)), seed)
    kind = name.rpartition("/")[2]
    if name.endswith("deconv/W"):
        values = (2 * u - 1) * np.sqrt(3 / shape[0])
    elif kind == "W":
        values = (2 * u - 1) * np.sqrt(6 / np.prod(shape[1:]))
    else:
        values = {
            "b": 0.1 * (2 * u - 1),
            "gamma": 0.5 + u,
            "beta": 0.3 * (2 * u - 1),
            "in_offset": u,
            "in_scale": 0.5 + 1.5 * u,
            "decode_scale": 0.5 + u,
            "decode_bias": 0.5 * (2 * u - 1) + 0.5,
        }[kind]
    return values.reshape(shape).astype(np.float32)


class Golden:
    """One golden file, read without pickle."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._arrays = np.load(FOLDER / f"{name}.npz", allow_pickle=False)
        meta: dict[str, Any] = json.loads(str(self._arrays["meta"]))
        self.seed: int = meta["seed"]
        self._every: dict[str, int] = meta["every"]  # arrays that are stored thinned out

    def __contains__(self, key: str) -> bool:
        return key in self._arrays.files

    def keys(self, prefix: str) -> list[str]:
        """What is stored under a prefix, without it; names that start with "_" are summaries."""
        keys = [key.removeprefix(prefix) for key in self._arrays.files if key.startswith(prefix)]
        return [key for key in keys if not key.startswith("_")]

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self._arrays[key])

    def thinned(self, key: str, t: Tensor) -> Tensor:
        """The columns of `t` that are stored under `key`."""
        return t[..., :: self._every.get(key, 1)]

    def loss_weights(self, like: Tensor, suffix: str = "") -> Tensor:
        """R of the loss sum(out * R)."""
        u = uniform(f"R/{self.name}{suffix}", like.numel(), self.seed)
        return torch.from_numpy(2 * u - 1).reshape(like.shape).to(like.dtype)

    @torch.no_grad()
    def fill(self, named: dict[str, Official], *, renamed: tuple[str, str] = ("", "")) -> None:
        """Give parameters and running statistics their values, under a renamed scope if asked."""
        for name, official in named.items():
            stored = name.replace(*renamed, 1) if renamed[0] else name
            value = (
                self[f"param/{stored}"]
                if f"param/{stored}" in self
                else torch.from_numpy(parameter(stored, official.shape, self.seed))
            )
            official.tensor.copy_(value.view_as(official.tensor))
