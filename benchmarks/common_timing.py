"""Timing that all benchmarks share: contestants in turn, round by round, in one process."""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

# Cycles that the device waits before a timed call: some 0.5 ms, longer than the host takes to launch it.
HEAD_START = 1_000_000


def in_turn[Contestant](
    contestants: Mapping[str, Contestant], rounds: int, warm_up: int
) -> Iterator[tuple[str, Contestant, bool]]:
    """Every contestant once a round, in random order: (name, contestant, whether it counts).

    A change of the machine's load or clock then meets all alike, and none always runs on the caches
    that the same other one leaves.
    """
    generator = random.Random(0)
    order = list(contestants.items())
    for i in range(warm_up + rounds):
        generator.shuffle(order)
        for name, contestant in order:
            yield name, contestant, i >= warm_up


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, quartiles and minimum in microseconds, of at least two samples."""
    low, median, high = (1e6 * q for q in statistics.quantiles(seconds, n=4))
    return {"median_us": median, "quartile1_us": low, "quartile3_us": high, "min_us": 1e6 * min(seconds)}


class Clock(Protocol):
    """Times calls; the figures are there after `collect`."""

    def call(self, into: list[float], function: Callable[[], Any]) -> Any:
        """function(), whose seconds are appended to `into`."""

    def collect(self) -> None:
        """Wait until all times are where they belong."""


class WallClock:
    """The host's clock, with the device idle before and after each call."""

    def call(self, into: list[float], function: Callable[[], Any]) -> Any:
        synchronize()
        start = time.perf_counter()
        result = function()
        synchronize()
        into.append(time.perf_counter() - start)
        return result

    def collect(self) -> None:
        pass


class DeviceClock:
    """CUDA events around each call: the time of its kernels, with a cold L2, launches not counted."""

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(4 * max(l2, 1 << 25), dtype=torch.int8, device="cuda")
        self.pending: list[tuple[list[float], torch.cuda.Event, torch.cuda.Event]] = []

    def call(self, into: list[float], function: Callable[[], Any]) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(HEAD_START)
        start.record()
        result = function()
        end.record()
        self.pending.append((into, start, end))
        return result

    def collect(self) -> None:
        torch.cuda.synchronize()
        for into, start, end in self.pending:
            into.append(start.elapsed_time(end) / 1e3)
        self.pending.clear()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
