"""The figures of a report: losses, alpha by layer and over time, embedding scale, step time.

Each function returns a `Chart`: an SVG text, and a description of what it shows for those who cannot see it.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from megatron_dyt.report import theme
from megatron_dyt.report.dyt_stats import SiteStats, StatsRecord
from megatron_dyt.report.runs import Run

Point = tuple[float, float]

# In inches of 72 SVG units; three columns fit a page of 1,060 CSS pixels at their natural size.
_WIDTH = 11.0
_ROW = 2.9
# More do not show on a line this wide, and make the file large.
_MAX_POINTS = 300
_MAX_RECORDS = 120
_MAX_LAYER_LINES = 12
# What fits beside each other above a figure of that width, and the letters of each.
_LEGEND_COLUMNS = 6
_LEGEND_LETTERS = 22
# A logarithmic axis where the largest value is this many times the smallest.
_LOGARITHMIC_FROM = 3


@dataclass(frozen=True)
class Chart:
    """One figure of the page."""

    svg: str
    description: str


@dataclass(frozen=True)
class Curves:
    """The losses of one run over iterations: means of training, and validation."""

    name: str
    train: Sequence[Point]
    validation: Sequence[Point]


@dataclass(frozen=True)
class Quantity:
    """Something that is measured at a site; `label` names it and its unit on the axis."""

    label: str
    value: Callable[[SiteStats], float]


ALPHA_STD = Quantity("alpha · std of the input", lambda site: site.alpha_std)
SATURATED = Quantity("percent saturated (tanh: |alpha·x| > 2)", lambda site: 100 * site.saturated)
ALPHA = Quantity("alpha", lambda site: site.alpha)
INVERSE_STD = Quantity("1/std", lambda site: 1 / site.input_std if site.input_std else math.nan)


def curves(run: Run) -> Curves:
    """The losses of `run`, smoothed over a twentieth of its lines."""
    train = _finite((step.iteration, step.loss) for step in run.metrics.steps)
    return Curves(run.name, smooth(train, max(1, len(train) // 20)), _finite(run.metrics.validation))


def loss_chart(runs: Sequence[Curves], title: str) -> Chart:
    """Loss over the whole run and, where there are points enough, over its second half."""
    last = max((at for run in runs for at, _ in (*run.train, *run.validation)), default=1)
    lines = [points for run in runs for points in (run.train, run.validation)]
    halves = all(sum(at >= last / 2 for at, _ in points) > 1 for points in lines)
    starts = [0.0, last / 2] if halves else [0.0]
    ends = "; ".join(f"{run.name} {run.validation[-1][1]:.4f}" for run in runs if run.validation)
    with theme.applied():
        figure = Figure(figsize=(_WIDTH, 3.8))
        panels = figure.subplots(1, len(starts), squeeze=False)[0]
        for axes, start in zip(panels, starts, strict=True):
            shown = [y for points in lines for at, y in points if at >= start]
            _label(axes, "Loss" if start == 0 else "Loss, second half", "nats per token")
            _scale(axes, shown, log=start == 0)
            for run, color, marker in _styles(runs):
                axes.plot(*_xy(run.train, start), color=color, linewidth=1, alpha=0.8)
                axes.plot(*_xy(run.validation, start), color=color, marker=marker)
        handles = [
            Line2D([], [], color=color, marker=marker, label=_name(run.name))
            for run, color, marker in _styles(runs)
        ]
        handles += [
            Line2D([], [], color=theme.GRAY, marker="o", label="validation"),
            Line2D([], [], color=theme.GRAY, linewidth=1, alpha=0.8, label="training, smoothed"),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), _LEGEND_COLUMNS))
    return _chart(figure, title, f"Loss against iteration. Last validation loss: {ends}.")


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


def alpha_chart(stats: Sequence[StatsRecord]) -> Chart:
    """A panel per group: alpha and 1/std of the input by layer, at the first and the last record."""
    groups = site_groups(stats)
    kinds = [(ALPHA, theme.ORANGE, "o"), (INVERSE_STD, theme.BLUE, "D")]
    moments = [(stats[0], "start", "--", theme.PAPER), (stats[-1], "end", "-", None)]
    everything, ends = [], []
    with theme.applied():
        figure, panels = _panels(groups, "layer")
        handles = []
        for (quantity, color, marker), (record, when, line, fill) in itertools.product(kinds, moments):
            style: dict[str, Any] = {
                "color": color,
                "marker": marker,
                "linestyle": line,
                "markerfacecolor": fill or color,
            }
            handles.append(Line2D([], [], label=f"{quantity.label}, {when}", **style))
            for group, names in groups.items():
                points = by_layer(record, names, quantity)
                everything += [y for _, y in points]
                ends.append(f"{group} {quantity.label}, {when}: " + ", ".join(f"{y:.3g}" for _, y in points))
                panels[group].plot(*_xy(points), **style)
        for axes in panels.values():
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.margins(x=0.08)
            _scale(axes, everything)
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return _chart(figure, "alpha by layer", "alpha and 1/std of the input by layer. " + "; ".join(ends))


def history_chart(stats: Sequence[StatsRecord], quantity: Quantity) -> Chart:
    """A panel per group, on common axes: `quantity` of each layer over iterations."""
    groups = site_groups(stats)
    ends = []
    with theme.applied():
        figure, panels = _panels(groups, "iteration", quantity.label)
        for group, names in groups.items():
            shown = [names[i] for i in evenly(len(names), _MAX_LAYER_LINES)]
            for rank, name in enumerate(shown):
                layer, points = history(stats, name, quantity)
                last = f"{points[-1][1]:.3g}" if points else "nothing finite"
                ends.append(f"{group}, layer {layer}: {last}")
                panels[group].plot(
                    *_xy(points),
                    color=theme.RAMP[_shade(rank, len(shown))],
                    linewidth=1.4,
                    marker="o" if len(points) == 1 else None,
                    label=f"layer {layer}" if rank in (0, len(shown) - 1) else None,
                )
            panels[group].legend(loc="best", fontsize=9)
        for axes in panels.values():
            axes.set_ylim(bottom=0)
    return _chart(figure, quantity.label, f"{quantity.label} over iterations, at the end: " + "; ".join(ends))


def scale_chart(runs: Sequence[Run]) -> Chart | None:
    """The learned factor on the embedding over time; None where no run has one."""
    lines = {
        run.name: _finite(
            (at.iteration, math.nan if at.embedding_scale is None else at.embedding_scale) for at in run.stats
        )
        for run in runs
    }
    if not any(lines.values()):
        return None
    return _run_chart(lines, "Embedding scale", "factor on the embedding")


def step_time_chart(runs: Sequence[Run]) -> Chart:
    """Seconds per step over iterations, past the warm-up."""
    lines = {run.name: run.steady_steps() for run in runs}
    return _run_chart(lines, "Step time", "seconds per step", zero=True)


def _run_chart(lines: Mapping[str, Sequence[Point]], title: str, unit: str, zero: bool = False) -> Chart:
    """A line per run over iterations."""
    ends = "; ".join(f"{name}: {p[0][1]:.4g} to {p[-1][1]:.4g}" for name, p in lines.items() if p)
    with theme.applied():
        figure = Figure(figsize=(_WIDTH / 2, _ROW))
        axes = figure.subplots()
        _label(axes, title, unit)
        for (name, points), color in zip(lines.items(), itertools.cycle(theme.SERIES), strict=False):
            if points:
                marker = "o" if len(points) == 1 else None
                axes.plot(*_xy(thin(points, _MAX_POINTS)), color=color, marker=marker, label=_name(name))
        if zero:
            axes.set_ylim(bottom=0)
        axes.legend(loc="best")
    return _chart(figure, title, f"{title} over iterations, {unit}. {ends}.")


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` of `points`, evenly chosen, with the first and the last."""
    return [points[i] for i in evenly(len(points), limit)]


def evenly(count: int, limit: int) -> list[int]:
    """At most `limit` of the indexes below `count`, with the first and the last."""
    if count <= limit:
        return list(range(count))
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Moving mean over about `window` points, centred, so that nothing is shifted in x.

    The reach shrinks at the start, where a loss is steep, and is cut off at the end, where the last
    single value would mislead.
    """
    half = window // 2
    result = []
    for i, (x, _) in enumerate(points):
        part = [y for _, y in points[i - min(half, i) : i + min(half, i) + 1]]
        result.append((x, sum(part) / len(part)))
    return result


def by_layer(record: StatsRecord, names: Sequence[str], quantity: Quantity) -> list[Point]:
    """(layer, value) of the sites called `names`, without values that are not finite."""
    sites = sorted((s for s in record.sites if s.name in names), key=lambda site: site.layer)
    return _finite((site.layer, quantity.value(site)) for site in sites)


def history(stats: Sequence[StatsRecord], name: str, quantity: Quantity) -> tuple[int, list[Point]]:
    """The layer of the site called `name`, and (iteration, value) of its records."""
    records = [stats[i] for i in evenly(len(stats), _MAX_RECORDS)]
    sites = [(r.iteration, site) for r in records for site in r.sites if site.name == name]
    return sites[-1][1].layer, _finite((at, quantity.value(site)) for at, site in sites)


def _panels(
    groups: dict[str, list[str]], x_label: str, y_label: str = "alpha, 1/std"
) -> tuple[Figure, dict[str, Axes]]:
    columns = min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(_WIDTH * max(2, columns) / 3, _ROW * rows))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for unused in grid[len(groups) :]:
        unused.set_visible(False)
    panels = dict(zip(groups, grid, strict=False))
    for group, axes in panels.items():
        _label(axes, group, y_label if axes.get_subplotspec().is_first_col() else "", x_label)
    return figure, panels


def _label(axes: Axes, title: str, y: str, x: str = "iteration") -> None:
    axes.set_title(title)
    axes.set_ylabel(y)
    axes.set_xlabel(x)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _scale(axes: Axes, values: Iterable[float], log: bool = True) -> None:
    """A logarithmic axis where `values` are positive and far apart, and `log` allows it."""
    shown = list(values)
    if not (log and shown and min(shown) > 0 and max(shown) >= _LOGARITHMIC_FROM * min(shown)):
        return
    axes.set_yscale("log")
    decades = math.log10(max(shown) / min(shown))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6, 8) if decades < 1.5 else (1, 3)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(f"{axes.get_ylabel()}, logarithmic scale" if axes.get_ylabel() else "")


def _styles(runs: Sequence[Curves]) -> Iterable[tuple[Curves, str, str]]:
    return zip(runs, itertools.cycle(theme.SERIES), itertools.cycle(theme.MARKERS), strict=False)


def _shade(rank: int, count: int) -> int:
    """The colour of the ramp for the layer `rank` of `count`."""
    last = len(theme.RAMP) - 1
    return round(rank / (count - 1) * last) if count > 1 else last // 2


def _xy(points: Sequence[Point], start: float = 0.0) -> tuple[list[float], list[float]]:
    shown = [point for point in thin(points, _MAX_POINTS) if point[0] >= start]
    return [x for x, _ in shown], [y for _, y in shown]


def _finite(points: Iterable[tuple[float, float]]) -> list[Point]:
    return [(float(x), float(y)) for x, y in points if math.isfinite(y)]


def _name(name: str) -> str:
    """A run's name in a legend; matplotlib leaves those with a leading underscore out."""
    short = name if len(name) <= _LEGEND_LETTERS else name[: _LEGEND_LETTERS - 1] + "…"
    return "\u200b" + short if short.startswith("_") else short


def _chart(figure: Figure, title: str, description: str) -> Chart:
    return Chart(theme.svg(figure, title, description), description)
