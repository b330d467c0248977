"""Alpha and 1/std of the input over training: by the run's own statistics, or by its checkpoints."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_dyt.probe.measure import SiteMeasurement
from megatron_dyt.report.dyt_stats import StatsRecord

# Below, a correlation is one of noise.
_FEWEST = 3


@dataclass(frozen=True)
class Moment:
    """One site at one iteration; `alpha` is DyT's, or that of the tanh that is nearest to the norm."""

    iteration: int
    name: str
    place: str
    layer: int | None
    alpha: float
    inverse_std: float
    alpha_std: float
    saturated: float


class Relation(NamedTuple):
    """How log alpha follows log 1/std: Pearson's r, and the slope of the regression line.

    A slope of 1 is alpha * std that stays the same, 0 an alpha that does not follow.
    """

    r: float
    slope: float


def of_sites(sites: Iterable[SiteMeasurement], iteration: int) -> list[Moment]:
    """What `measure` found at one iteration."""
    return [
        Moment(
            iteration,
            site.name,
            site.place,
            site.layer,
            site.tanh_alpha if site.alpha is None else site.alpha,
            1 / site.input_std,
            site.alpha_std,
            site.saturated,
        )
        for site in sites
    ]


def of_records(records: Sequence[StatsRecord], sites: Sequence[SiteMeasurement], last: int) -> list[Moment]:
    """What the run's statistics hold of `sites` up to the iteration `last`."""
    known = {site.name: site for site in sites}
    return [
        Moment(
            record.iteration,
            each.name,
            known[each.name].place,
            known[each.name].layer,
            each.alpha,
            1 / each.input_std,
            each.alpha_std,
            each.saturated,
        )
        for record in records
        if record.iteration <= last
        for each in record.sites
        if each.name in known and each.input_std > 0
    ]


def relation(moments: Sequence[Moment]) -> Relation | None:
    """Over sites, or over the iterations of one; None for fewer than three, or where one does not change."""
    x = [math.log(each.inverse_std) for each in moments if each.alpha]
    y = [math.log(abs(each.alpha)) for each in moments if each.alpha]
    if len(x) < _FEWEST or min(x) == max(x) or min(y) == max(y):
        return None
    return Relation(statistics.correlation(x, y), statistics.linear_regression(x, y).slope)


def by_site(moments: Iterable[Moment]) -> dict[str, list[Moment]]:
    """The moments of each site, in the order of iterations."""
    found: dict[str, list[Moment]] = {}
    for each in sorted(moments, key=lambda moment: moment.iteration):
        found.setdefault(each.name, []).append(each)
    return found
