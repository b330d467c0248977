"""Mean and spread over seeds, and differences paired by seed with their confidence interval."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Of the intervals.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """`count` numbers: their mean, sample standard deviation (None for one number), and extremes."""

    count: int
    mean: float
    std: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its confidence interval by the t distribution (None for one number)."""

    count: int
    mean: float
    half_width: float | None


def summary(numbers: Sequence[float]) -> Summary | None:
    """None of no numbers."""
    if not numbers:
        return None
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Summary(len(numbers), statistics.fmean(numbers), std, min(numbers), max(numbers))


def interval(numbers: Sequence[float]) -> Interval | None:
    """The mean of `numbers`, taken for independent and normal, with its 95 % interval; None of no numbers."""
    found = summary(numbers)
    if found is None:
        return None
    half = None
    if found.std is not None:
        half = t_quantile(found.count - 1) * found.std / math.sqrt(found.count)
    return Interval(found.count, found.mean, half)


def t_quantile(freedom: int) -> float:
    """The t with P(|T| <= t) = 0.95 for Student's distribution with `freedom` degrees of freedom (>= 1)."""
    # In theta = atan(t / sqrt(freedom)) the density is cos(theta)^(freedom - 1), on a finite range.
    theta = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(theta).clip(0) ** (freedom - 1)
    area = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(np.interp(CONFIDENCE * area[-1], area, theta))
