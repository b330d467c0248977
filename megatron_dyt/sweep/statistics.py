"""Mean and spread over seeds, and differences paired by seed with their confidence interval."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Of the intervals.
CONFIDENCE = 0.95
# Intervals of Simpson's rule for the t distribution; its quantile is then right to 6 digits.
_PANELS = 200


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
    low, high = 0.0, math.pi / 2
    # In theta = atan(t / sqrt(freedom)) the density is cos(theta)^(freedom - 1), on a finite range.
    whole = _integral(freedom, high)
    while high - low > 1e-12:
        middle = (low + high) / 2
        if _integral(freedom, middle) < CONFIDENCE * whole:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _integral(freedom: int, end: float) -> float:
    """Of cos^(freedom - 1) from 0 to `end`, by Simpson's rule."""
    step = end / _PANELS
    values = [max(0.0, math.cos(i * step)) ** (freedom - 1) for i in range(_PANELS + 1)]
    inner = 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2])
    return (values[0] + inner + values[-1]) * step / 3
