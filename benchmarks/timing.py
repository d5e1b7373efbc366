"""Fair timing of several ways to do one thing: in turns, in one process, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)

SHORTEST_SAMPLE = 2e-4  # seconds; quicker calls are timed several at once
SPENT_ON_A_SHAPE = 0.5  # seconds for the rounds of one shape, where the fewest rounds take less
MOST_ROUNDS = 60
HOPELESS = 1.5  # a form this many times slower than the best is timed once only


def seconds_of(call: Callable[[], object], times: int) -> float:
    """Seconds of one call, averaged over ``times`` calls in a row."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def time_in_turns(
    calls: Mapping[Key, Callable[[], object]], always: Callable[[Key], bool], fewest_rounds: int
) -> dict[Key, list[float]]:
    """Samples in seconds of every call, taken in rounds of one sample each.

    Every call is made once unmeasured, then once measured. Calls that ``always`` holds for go on in
    rounds, more of them the quicker all are; so do the others, but for those far behind the best of
    the others, which keep that one sample.
    """
    for call in calls.values():
        call()
    first = {key: seconds_of(call, 1) for key, call in calls.items()}
    best = min((first[key] for key in calls if not always(key)), default=0.0)
    racing = [key for key in calls if always(key) or first[key] < HOPELESS * best]
    times = {key: max(1, round(SHORTEST_SAMPLE / first[key])) for key in racing}
    round_seconds = sum(first[key] * times[key] for key in racing)
    rounds = max(fewest_rounds, min(MOST_ROUNDS, int(SPENT_ON_A_SHAPE / round_seconds)))
    samples: dict[Key, list[float]] = {key: [] for key in racing}
    for turn in range(rounds):
        order = racing if turn % 2 == 0 else racing[::-1]  # nobody always follows the same one
        for key in order:
            samples[key].append(seconds_of(calls[key], times[key]))
    return {key: samples.get(key, [first[key]]) for key in calls}


class Sgemm:
    """The yardstick: float32 matrix products of torch, measured all along a run."""

    SIZE = 1024

    def __init__(self) -> None:
        self.a, self.b = torch.randn(2, self.SIZE, self.SIZE).unbind()
        self.seconds: list[float] = []

    def sample(self) -> None:
        torch.mm(self.a, self.b)
        self.seconds.append(seconds_of(lambda: torch.mm(self.a, self.b), 3))

    def gigaflops(self) -> float:
        return float(2e-9 * self.SIZE**3 / statistics.median(self.seconds))
