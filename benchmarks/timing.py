"""Fair timing of several ways to do one thing: in turns, in one process, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)

SHORTEST_SAMPLE = 2e-4  # seconds; quicker calls are timed several at once
MOST_ROUNDS = 60
COLD = 0.3  # seconds; a first call longer than this gains too little from warm caches to repeat
HOPELESS = 1.5  # so many times behind the best of its team, a call is out after one sample,
BEHIND = 1.25  # and after any further round


def seconds_of(call: Callable[[], object], times: int) -> float:
    """Seconds of one call, averaged over ``times`` calls in a row."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Torch has so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_in_turns(
    calls: Mapping[Key, Callable[[], object]],
    team: Callable[[Key], Hashable],
    *,
    fewest_rounds: int,
    seconds: float = 0.5,
) -> dict[Key, list[float]]:
    """Samples in seconds of every call, taken in rounds of one sample each.

    Rounds go on for about ``seconds``, from ``fewest_rounds`` to MOST_ROUNDS of them. Calls of one
    ``team`` stand for one another: those clearly behind its best drop out and keep the samples they
    have, so the calls with the most samples are those that raced to the end, next to each other.
    """
    first = {key: _first_sample(call) for key, call in calls.items()}
    times = {key: max(1, round(SHORTEST_SAMPLE / first[key])) for key in calls}
    samples = {key: [seconds] for key, seconds in first.items()}
    racing = _close(list(calls), samples, team, HOPELESS)
    start, rounds = time.perf_counter(), 0
    while rounds < fewest_rounds or (
        rounds < MOST_ROUNDS and time.perf_counter() - start < seconds
    ):
        order = racing if rounds % 2 == 0 else racing[::-1]  # nobody always follows the same one
        for key in order:
            samples[key].append(seconds_of(calls[key], times[key]))
        racing = _close(racing, samples, team, BEHIND)
        rounds += 1
    # The first samples, of single calls, only chose who races.
    return {key: taken[1:] or taken for key, taken in samples.items()}


def _first_sample(call: Callable[[], object]) -> float:
    seconds = seconds_of(call, 1)
    return seconds if seconds > COLD else seconds_of(call, 1)


def _close(
    racing: list[Key],
    samples: Mapping[Key, list[float]],
    team: Callable[[Key], Hashable],
    limit: float,
) -> list[Key]:
    """The calls whose quickest sample is within ``limit`` times the quickest of their team."""
    best: dict[Hashable, float] = {}
    for key in racing:
        best[team(key)] = min(best.get(team(key), float("inf")), *samples[key])
    return [key for key in racing if min(samples[key]) <= limit * best[team(key)]]


class Sgemm:
    """The yardstick: float32 matrix products of torch, measured all along a run."""

    SIZE = 1024

    def __init__(self) -> None:
        self.a, self.b = torch.randn(2, self.SIZE, self.SIZE).unbind()
        self.seconds: list[float] = []

    def sample(self) -> float:
        """GF/s of a product now; kept for the median of the run."""
        torch.mm(self.a, self.b)
        self.seconds.append(seconds_of(lambda: torch.mm(self.a, self.b), 3))
        return self._gigaflops(self.seconds[-1])

    def gigaflops(self) -> float:
        """The median of the run."""
        return self._gigaflops(statistics.median(self.seconds))

    def _gigaflops(self, seconds: float) -> float:
        return 2e-9 * self.SIZE**3 / seconds
