"""Trains networks in turns on the same batches, and measures them."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
CROP_FRAMES = 96
LEARNING_RATE = 4e-3
RACE_WARMUPS, RACE_STEPS = 2, 5


@dataclass
class Run:
    """One network in training, and what was measured on the way."""

    name: str
    layout: str
    net: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, net: nn.Module, layout: str) -> Run:
        """A run on a copy of ``net``, so that another run can start from the same numbers."""
        own = copy.deepcopy(net)
        own.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload, unused-ignore]
        return cls(name, layout, own, torch.optim.Adam(own.parameters(), LEARNING_RATE))

    def loss(self, mixture: Tensor, stems: Tensor) -> Tensor:
        """What is trained: the relative error of one batch."""
        mixture = mixture.contiguous(memory_format=LAYOUTS[self.layout])
        return relative_error(self.net(mixture), stems)

    def step(self, mixture: Tensor, stems: Tensor) -> None:
        """One optimizer step, timed from the batch to the updated weights."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(mixture, stems)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    def kept_bytes(self, mixture: Tensor, stems: Tensor) -> int:
        """Bytes that autograd keeps between forward and backward, parameters not counted."""
        with count_kept_bytes(self.net) as kept:
            self.loss(mixture, stems)
        return sum(kept.values())

    def separate(self, mixture: Tensor) -> Tensor:
        """Magnitudes (2, frames, bins) of the whole clip -> (stems, 2, frames, bins)."""
        frames = mixture.shape[1]
        padded = nn.functional.pad(mixture, (0, 0, 0, -frames % 4)).unsqueeze(0)
        self.net.eval()
        with torch.no_grad():
            estimate: Tensor = self.net(padded.contiguous(memory_format=LAYOUTS[self.layout]))
        self.net.train()
        return estimate[0, :, :, :frames]


def relative_error(estimate: Tensor, target: Tensor) -> Tensor:
    """Squared error of magnitudes over their energy, so that silence scores 1."""
    return (estimate - target).square().sum() / target.square().sum()


@contextmanager
def count_kept_bytes(net: nn.Module) -> Iterator[dict[int, int]]:
    """Yields {storage address: bytes} of what autograd saves inside, each storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # with its graph, an output would keep itself alive for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


class Crops:
    """Batches of one random crop, drawn from a seed: every run sees the same ones."""

    def __init__(self, mixture: Tensor, stems: Tensor, seed: int) -> None:
        self.mixture, self.stems = mixture, stems
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        """The mixture (1, 2, frames, bins) and its stems (1, 4, 2, frames, bins)."""
        last = self.mixture.shape[1] - CROP_FRAMES
        start = int(torch.randint(last + 1, (), generator=self.generator))
        frames = slice(start, start + CROP_FRAMES)
        return self.mixture[None, :, frames], self.stems[None, :, :, frames]


def race(nets: dict[str, nn.Module], crops: Crops) -> list[Run]:
    """A short run of every network in every layout, in turns, to see which layout suits it."""
    runs = [Run.of(name, net, layout) for name, net in nets.items() for layout in LAYOUTS]
    batch = crops.draw()
    for _ in tqdm(range(RACE_WARMUPS + RACE_STEPS), desc="trying layouts", leave=False):
        for run in runs:
            run.step(*batch)
    for run in runs:
        del run.seconds[:RACE_WARMUPS]
    return runs


def train(runs: list[Run], crops: Crops, steps: int) -> None:
    """Train all runs in lockstep: both see the same batches, and the same moods of the machine."""
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(run.optimizer, LEARNING_RATE, total_steps=steps)
        for run in runs
    ]
    with tqdm(range(steps), desc="training", unit="step") as bar:
        for _ in bar:
            batch = crops.draw()
            for run, schedule in zip(runs, schedules, strict=True):
                run.step(*batch)
                schedule.step()
            bar.set_postfix({run.name: f"{run.losses[-1]:.4f}" for run in runs})
