"""Means, spreads and intervals against published quantiles of Student's t and numbers done by hand."""

import pytest

from megatron_dyt.sweep.statistics import Interval, Summary, interval, summary, t_quantile


# The 97.5 % quantiles of any table of Student's distribution.
@pytest.mark.parametrize(
    ("freedom", "expected"),
    [
        (1, 12.706205),
        (2, 4.302653),
        (3, 3.182446),
        (4, 2.776445),
        (9, 2.262157),
        (30, 2.042272),
        (1000, 1.962339),
    ],
)
def test_quantile(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, rel=1e-6)


def test_interval_of_three_numbers() -> None:
    assert interval([1.0, 2.0, 3.0]) == Interval(3, 2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-6))


def test_one_number_has_no_spread() -> None:
    assert summary([2.5]) == Summary(1, 2.5, None, 2.5, 2.5)
    assert interval([2.5]) == Interval(1, 2.5, None)


def test_nothing_has_no_mean() -> None:
    assert summary([]) is None
    assert interval([]) is None
