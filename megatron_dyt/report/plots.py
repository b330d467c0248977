"""Which charts a report shows: losses, alpha by layer and over time, embedding scale, step time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_dyt.report.figures import (
    N_COLORS,
    N_RAMP,
    Axis,
    Chart,
    Marker,
    Point,
    Series,
    fit_axis,
    side_by_side,
    smooth,
    thin,
)
from megatron_dyt.report.logs import SiteStats, StatsRecord
from megatron_dyt.report.runs import Run

_MARKERS: tuple[Marker, ...] = ("circle", "diamond", "square", "triangle")
_MAX_POINTS = 300
_MAX_RECORDS = 120
_MAX_LAYER_LINES = 12

LOSS_LEGEND = (
    Series("validation", [], "c5", marker="circle"),
    Series("train, smoothed", [], "c5", line="thin"),
)
ALPHA_LEGEND = (
    Series("alpha, start", [], "c1", line="dashed", marker="circle", hollow=True),
    Series("alpha, end", [], "c1", marker="circle"),
    Series("1/std, start", [], "c0", line="dashed", marker="diamond", hollow=True),
    Series("1/std, end", [], "c0", marker="diamond"),
)


@dataclass(frozen=True)
class Quantity:
    """Something that is measured at a site; `label` names it and its unit on the axis."""

    label: str
    value: Callable[[SiteStats], float]


ALPHA_STD = Quantity("alpha · std of the input", lambda site: site.alpha_std)
SATURATED = Quantity("inputs with |alpha·x| > 2, percent", lambda site: 100 * site.saturated)


def loss_charts(runs: Sequence[Run]) -> list[Chart]:
    """Loss over the whole run and, where there are points enough, over its second half."""
    series = [s for i, run in enumerate(runs) for s in _loss_series(run, i)]
    last = max(run.log.points[-1].iteration for run in runs)
    charts = [_loss_chart("Loss", series, 0, last)]
    if all(sum(p[0] >= last / 2 for p in s.points) > 1 for s in series):
        charts.append(_loss_chart("Loss, second half", series, last / 2, last))
    return charts


def curves_svg(runs: Sequence[Run], title: str) -> str:
    """The loss charts as a stand-alone SVG file."""
    charts = loss_charts(runs)
    return side_by_side(charts, title, LOSS_LEGEND, 440 * len(charts), 340)


def site_groups(stats: Sequence[StatsRecord]) -> dict[str, list[str]]:
    """Site names by role; a role with several sites a layer is split by the module's own name."""
    sites = stats[-1].sites
    repeated = {s.role for s in sites if sum((o.role, o.layer) == (s.role, s.layer) for o in sites) > 1}
    groups: dict[str, list[str]] = {}
    for site in sites:
        leaf = site.name.rsplit(".", 1)[-1]
        key = f"{site.role} ({leaf})" if site.role in repeated else site.role
        groups.setdefault(key, []).append(site.name)
    return groups


def alpha_charts(stats: Sequence[StatsRecord]) -> list[Chart]:
    """A chart a group: alpha and 1/std of the input by layer, at the first and last record."""
    panels = {group: _alpha_series(stats, names) for group, names in site_groups(stats).items()}
    y = fit_axis("alpha, 1/std", (v for panel in panels.values() for s in panel for _, v in s.points))
    return [
        Chart(
            group,
            f"{group}: alpha and 1/std of the input by layer. "
            + "; ".join(f"{s.name}: " + ", ".join(f"{v:.3g}" for _, v in s.points) for s in panel),
            fit_axis("layer", (at for s in panel for at, _ in s.points), integer=True, log=False),
            y,
            panel,
        )
        for group, panel in panels.items()
    ]


def history_charts(stats: Sequence[StatsRecord], quantity: Quantity) -> list[Chart]:
    """A chart a group, on common axes: `quantity` of each layer over iterations."""
    panels = {
        group: [
            _history(stats, names[rank], quantity, rank, len(names))
            for rank in _evenly(len(names), _MAX_LAYER_LINES)
        ]
        for group, names in site_groups(stats).items()
    }
    values = (v for panel in panels.values() for s in panel for _, v in s.points)
    x, y = _iterations(stats[-1].iteration), fit_axis(quantity.label, values, zero=True)
    return [
        Chart(
            group,
            f"{group}: {quantity.label} over iterations. At the end: "
            + ", ".join(f"{s.name} {s.points[-1][1]:.3g}" for s in panel if s.points),
            x,
            y,
            panel,
        )
        for group, panel in panels.items()
    ]


def scale_chart(runs: Sequence[Run]) -> Chart | None:
    """The learned factor on the embedding over time; None where no run has one."""
    series = []
    for i, run in enumerate(runs):
        known = [(r.iteration, r.embedding_scale) for r in run.stats if r.embedding_scale is not None]
        if points := thin(_finite(known), _MAX_POINTS):
            series.append(_run_line(run, i, points))
    if not series:
        return None
    ends = "; ".join(f"{s.name}: {s.points[0][1]:.4g} to {s.points[-1][1]:.4g}" for s in series)
    y = fit_axis("factor on the embedding", (v for s in series for _, v in s.points), log=False)
    x = _iterations(max(s.points[-1][0] for s in series))
    return Chart("Embedding scale", f"Embedding scale over iterations. {ends}.", x, y, series)


def step_time_chart(runs: Sequence[Run]) -> Chart:
    """Seconds a step over iterations, past the warm-up."""
    series = [_run_line(run, i, thin(_finite(run.steady_steps()), _MAX_POINTS)) for i, run in enumerate(runs)]
    x = _iterations(max(run.log.points[-1].iteration for run in runs))
    y = fit_axis("seconds per step", (v for s in series for _, v in s.points), zero=True)
    return Chart("Step time", "Seconds per step over iterations, after warm-up.", x, y, series)


def _loss_series(run: Run, index: int) -> list[Series]:
    color = f"c{index % N_COLORS}"
    raw = _finite((p.iteration, p.loss) for p in run.log.points)
    valid = _finite((v.iteration, v.loss) for v in run.log.validation)
    train = thin(smooth(raw, max(1, len(raw) // 20)), _MAX_POINTS)
    marker = _MARKERS[index % len(_MARKERS)]
    return [
        Series(f"{run.name}, train", train, color, line="thin"),
        Series(run.name, thin(valid, _MAX_POINTS), color, marker=marker, label=True),
    ]


def _loss_chart(title: str, series: Sequence[Series], start: float, end: float) -> Chart:
    shown = [v for s in series for x, v in s.points if start <= x <= end]
    x = fit_axis("iteration", [start, end], integer=True, log=False, pad=0.01)
    y = fit_axis("nats per token", shown, log=None if start == 0 else False)
    scale = ", logarithmic scale" if y.log else ""
    y = replace(y, label=y.label + scale)
    ends = "; ".join(f"{s.name} {s.points[-1][1]:.4f}" for s in series if s.label and s.points)
    text = f"{title} against iteration{scale}. Last validation loss: {ends}."
    return Chart(title, text, x, y, series)


def _alpha_series(stats: Sequence[StatsRecord], names: Sequence[str]) -> list[Series]:
    kinds: list[tuple[str, str, Marker, Callable[[SiteStats], float]]] = [
        ("alpha", "c1", "circle", lambda site: site.alpha),
        ("1/std", "c0", "diamond", lambda site: 1 / site.input_std if site.input_std else math.nan),
    ]
    return [
        Series(
            f"{what}, iteration {record.iteration}",
            _by_layer(record, names, Quantity(what, value)),
            color,
            line="dashed" if hollow else "solid",
            marker=marker,
            hollow=hollow,
        )
        for what, color, marker, value in kinds
        for record, hollow in ((stats[0], True), (stats[-1], False))
    ]


def _by_layer(record: StatsRecord, names: Sequence[str], quantity: Quantity) -> list[Point]:
    sites = sorted((s for s in record.sites if s.name in names), key=lambda site: site.layer)
    return _finite((site.layer, quantity.value(site)) for site in sites)


def _history(stats: Sequence[StatsRecord], name: str, quantity: Quantity, rank: int, count: int) -> Series:
    records = [stats[i] for i in _evenly(len(stats), _MAX_RECORDS)]
    sites = [(r.iteration, site) for r in records for site in r.sites if site.name == name]
    shade = round(rank / (count - 1) * (N_RAMP - 1)) if count > 1 else N_RAMP // 2
    return Series(
        f"layer {sites[-1][1].layer}",
        _finite((at, quantity.value(site)) for at, site in sites),
        f"r{shade}",
        marker="circle" if len(sites) == 1 else "none",
        label=rank in (0, count - 1),
    )


def _run_line(run: Run, index: int, points: Sequence[Point]) -> Series:
    marker: Marker = "circle" if len(points) == 1 else "none"
    return Series(run.name, points, f"c{index % N_COLORS}", marker=marker, label=True)


def _iterations(last: float) -> Axis:
    return fit_axis("iteration", [0, last], integer=True, log=False, pad=0.01)


def _evenly(count: int, limit: int) -> list[int]:
    """At most `limit` of the indexes below `count`, with the first and the last."""
    return [int(x) for x, _ in thin([(float(i), 0.0) for i in range(count)], limit)]


def _finite(points: Iterable[tuple[float, float]]) -> list[Point]:
    return [(float(x), float(y)) for x, y in points if math.isfinite(y)]
