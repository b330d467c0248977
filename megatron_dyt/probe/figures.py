"""The figures of a probe: norms' input-output maps, alpha against 1/std, and what else is measured, by layer.

Each function returns a `Figure` for `report.theme` to write. Points are rasterised in an SVG.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from megatron_dyt.probe.history import Moment, Relation, by_site, relation
from megatron_dyt.probe.measure import Floats, Measurement, Points, SiteMeasurement
from megatron_dyt.report import theme
from megatron_dyt.report.charts import evenly

_DPI = 160  # Of a PNG, and of the points in an SVG: 1,760 pixels over the width of a page.
_WIDTH = 11.0
_PANEL = 2.3  # Inches, of a square panel.
_MAX_COLUMNS = 5
_MAX_ROWS = 4
_MAX_LINES = 4
# Axes and colours end at these quantiles: a single element may be far out.
_AXIS_QUANTILE = 0.9999
# What an axis from 0 shows at least, percent or alpha * std: below it is rounding.
_SMALLEST_AXIS = 0.01
_COLOR_QUANTILES = (0.01, 0.99)
# From small to large, with contrast on light and on dark paper, which a raster cannot follow.
# Below which ratio of the ends of a logarithmic axis the ticks are at which numbers of each decade.
_TICKS: tuple[tuple[float, Sequence[float]], ...] = (
    (2.5, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)),
    (10, (1, 1.5, 2, 3, 5, 7)),
    (50, (1, 2, 5)),
    (np.inf, (1, 3)),
)
_COLORS: Colormap = LinearSegmentedColormap.from_list("rms", ["#0b84c9", "#8f62c4", "#d1477f", "#e0711b"])


class Coloring(NamedTuple):
    """What a point's colour says; `value` is in units of the std of the site's input."""

    label: str
    value: Callable[[Points, SiteMeasurement], Floats]


BY_TOKEN = Coloring(
    "rms of the token's input / std of the site's input",
    lambda points, site: points.token_rms / site.input_std,
)
BY_CHANNEL = Coloring(
    "rms of the channel's input / std of the site's input",
    lambda points, site: points.channel_rms / site.input_std,
)


def map_figure(sites: Sequence[SiteMeasurement], coloring: Coloring) -> Figure:
    """Output against input of the norms, a row per place, with the tanh that is nearest to each."""
    grid = _grid(sites)
    shown = [site for row in grid for site in row if site is not None]
    reach = max(_quantile(np.abs(site.points.x) / site.input_std) for site in shown if site.points)
    height = max(_quantile(np.abs(site.points.y)) for site in shown if site.points)
    colors = np.concatenate([coloring.value(site.points, site) for site in shown if site.points])
    low, high = np.quantile(colors[colors > 0], _COLOR_QUANTILES)
    norm = LogNorm(low, max(high, low * 1.01))
    with theme.applied():
        columns = len(grid[0])
        figure = Figure(figsize=(_PANEL * columns + 0.9, _PANEL * len(grid) + 0.7), dpi=_DPI)
        panels = figure.subplots(len(grid), columns, sharex=True, sharey=True, squeeze=False)
        for site, axes in zip(itertools.chain(*grid), panels.ravel(), strict=True):
            if site is None:
                axes.set_visible(False)
                continue
            _draw_map(axes, site, coloring, norm, reach)
            axes.set_xlim(-1.04 * reach, 1.04 * reach)
            axes.set_ylim(-1.12 * height, 1.12 * height)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        # Where a column ends early, its last panel has the numbers.
        for column in range(columns):
            last = max(row for row in range(len(grid)) if grid[row][column] is not None)
            panels[last, column].tick_params(labelbottom=True)
        figure.supxlabel("input / its std", fontsize=10, color=theme.MUTED)
        figure.supylabel("output without weight and bias", fontsize=10, color=theme.MUTED)
        bar = figure.colorbar(
            ScalarMappable(norm, _COLORS),
            ax=panels,
            label=coloring.label,
            fraction=0.03,
            pad=0.01,
            extend="both",
        )
        _plain(bar.ax.yaxis, low, high)
        bar.outline.set_visible(False)
        figure.legend(
            handles=[
                Line2D([], [], color=theme.TEXT, linewidth=1.2, label="nearest γ·tanh(α·x)"),
                Line2D([], [], color=theme.GRAY, linewidth=1.0, linestyle=":", label="nearest straight line"),
            ],
            loc="outside upper right",
            ncols=2,
        )
    return figure


def _draw_map(axes: Axes, site: SiteMeasurement, coloring: Coloring, norm: LogNorm, reach: float) -> None:
    points = site.points
    assert points is not None
    values = coloring.value(points, site)
    # A norm's rare colours last, where others would cover them. DyT's points all lie on one curve: there
    # those that reach far are below those that do not.
    rarity = np.abs(np.log(np.maximum(values, 1e-9) / np.median(values)))
    order = np.argsort(rarity if site.alpha is None else -values)
    axes.scatter(
        (points.x / site.input_std)[order],
        points.y[order],
        c=values[order],
        cmap=_COLORS,
        norm=norm,
        # A norm's points lie beside its curve, and DyT's on it.
        s=1.6 if site.alpha is None else 6,
        zorder=1.5 if site.alpha is None else 3,
        linewidths=0,
        alpha=0.7,
        rasterized=True,
    )
    x = np.linspace(-reach, reach, 201)
    axes.plot(
        x,
        site.line_slope * site.input_std * x,
        color=theme.GRAY,
        linewidth=1.0,
        linestyle=":",
        scalex=False,
        scaley=False,
    )
    curve = site.tanh_gamma * np.tanh(site.tanh_alpha * site.input_std * x)
    axes.plot(x, curve, color=theme.TEXT, linewidth=1.2)
    axes.set_title(f"{_short(site)}\nstd {site.input_std:.3g}", fontsize=9)
    axes.text(
        0.97,
        0.03,
        f"α·std {site.alpha_std:.2g}\n1−R² tanh {_percent(1 - site.tanh_r2)}\n"
        f"1−R² line {_percent(1 - site.line_r2)}",
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        fontsize=7.5,
        color=theme.MUTED,
    )
    axes.grid(True, axis="both")


def _grid(sites: Sequence[SiteMeasurement]) -> list[list[SiteMeasurement | None]]:
    """A row per place with several layers; the norms outside the layers stand in a column at the end."""
    places = _by_place(sites)
    rows = [found for found in places.values() if len(found) > 1][:_MAX_ROWS]
    alone = [found[0] for found in places.values() if len(found) == 1][:_MAX_ROWS]
    columns = _MAX_COLUMNS - bool(alone)
    rows = [[found[i] for i in evenly(len(found), columns)] for found in rows] or [[]]
    width = max(len(row) for row in rows)
    grid: list[list[SiteMeasurement | None]] = [[*row, *[None] * (width - len(row))] for row in rows]
    if alone:
        grid += [[None] * width for _ in range(len(alone) - len(grid))]
        for row, site in itertools.zip_longest(grid, alone):
            row.append(site)
    return grid


# --- alpha against 1/std ------------------------------------------------------------------------------


def alpha_figure(
    sites: Sequence[SiteMeasurement], now: Sequence[Moment], history: Sequence[Moment]
) -> Figure:
    """Alpha against 1/std over the sites, and where there are several iterations, of each place over them."""
    places = _by_place(sites)
    several = len({moment.iteration for moment in history}) > 1
    over_time = list(places)[:_MAX_ROWS] if several else []
    alpha = "α of the nearest tanh" if any(site.alpha is None for site in sites) else "α"
    with theme.applied():
        figure = Figure(figsize=(_WIDTH if over_time else 4.6, 3.9), dpi=_DPI)
        first, *rest = figure.subplots(1, 1 + len(over_time), squeeze=False)[0]
        _draw_relation(first, places, now, alpha)
        figure.legend(loc="outside lower left", ncols=4 if over_time else 1, fontsize=8.5)
        lines = by_site(history)
        values = [value for each in history for value in (abs(each.alpha), each.inverse_std)]
        for place, axes in zip(over_time, rest, strict=True):
            _draw_history(axes, [lines[site.name] for site in places[place] if site.name in lines])
            axes.set_title(f"{place}\n{_relations(lines, places[place])}", fontsize=9)
            _log_axis(axes, "y", values)
            axes.tick_params(labelleft=axes is rest[0])
        if over_time:
            handles = [
                Line2D([], [], color=theme.RAMP[2], label=alpha),
                Line2D([], [], color=theme.RAMP[2], linestyle="--", label="1/std of the input"),
                Line2D([], [], color=theme.RAMP[0], label="first layer"),
                Line2D([], [], color=theme.RAMP[-1], label="last layer"),
            ]
            figure.legend(handles=handles, loc="outside upper right", ncols=4)
    return figure


def _draw_history(axes: Axes, sites: Sequence[Sequence[Moment]]) -> None:
    """Alpha and 1/std of some layers over iterations."""
    shown = [sites[i] for i in evenly(len(sites), _MAX_LINES)]
    for rank, moments in enumerate(shown):
        color = theme.RAMP[round(rank / max(1, len(shown) - 1) * (len(theme.RAMP) - 1))]
        at = [moment.iteration for moment in moments]
        axes.plot(at, [abs(moment.alpha) for moment in moments], color=color)
        axes.plot(at, [moment.inverse_std for moment in moments], color=color, linestyle="--")
    axes.set_xlabel("iteration")


def _draw_relation(
    axes: Axes, places: Mapping[str, Sequence[SiteMeasurement]], now: Sequence[Moment], alpha: str
) -> None:
    moments = {moment.name: moment for moment in now}
    for (place, found), color, marker in zip(
        places.items(), itertools.cycle(theme.SERIES), itertools.cycle(theme.MARKERS), strict=False
    ):
        points = [moments[site.name] for site in found]
        axes.plot(
            [each.inverse_std for each in points],
            [abs(each.alpha) for each in points],
            marker,
            color=color,
            label=f"{place} {_text(relation(points))}",
            linestyle="",
        )
    axes.set_title(f"all sites\n{_text(relation(now))}", fontsize=9)
    axes.set_xlabel("1/std of the input")
    axes.set_ylabel(alpha)
    _log_axis(axes, "x", [each.inverse_std for each in now])
    _log_axis(axes, "y", [abs(each.alpha) for each in now])
    low, high = axes.get_xlim()
    middle = float(
        np.exp(np.median([np.log(abs(each.alpha) / each.inverse_std) for each in now if each.alpha]))
    )
    axes.plot(
        [low, high],
        [middle * low, middle * high],
        color=theme.GRAY,
        linewidth=1,
        linestyle=":",
        label=f"α·std = {middle:.2g}",
        scalex=False,
        scaley=False,
    )
    axes.grid(True, axis="both")


def _relations(lines: Mapping[str, Sequence[Moment]], sites: Sequence[SiteMeasurement]) -> str:
    found = [each for site in sites if (each := relation(lines.get(site.name, []))) is not None]
    return f"r over training {_range([each.r for each in found], '.2f')}" if found else ""


def _text(found: Relation | None) -> str:
    return "" if found is None else f"r {found.r:.2f}, slope {found.slope:.2f}".replace("-", "−")


# --- by layer -----------------------------------------------------------------------------------------


class Profile(NamedTuple):
    """A number of each site; `bound` is drawn as a line."""

    title: str
    value: Callable[[SiteMeasurement], float]
    log: bool = False
    bound: float | None = None


_PROFILES = (
    Profile("std of the input", lambda site: site.input_std, log=True),
    Profile("kurtosis of the input", lambda site: site.kurtosis, log=True, bound=3.0),
    Profile("tokens' rms: std / mean", lambda site: site.token_spread),
    Profile("α · std", lambda site: site.alpha_std),
    Profile("saturated, percent", lambda site: 100 * site.saturated),
    Profile("not a line: 1−R², percent", lambda site: 100 * (1 - site.line_r2)),
    Profile("not a tanh: 1−R², percent", lambda site: 100 * (1 - site.tanh_r2)),
)


def profile_figure(measurement: Measurement) -> Figure:
    """What is measured at each norm, by layer, and the gradient's norm."""
    places = _by_place(measurement.sites)
    last = max((site.layer or 0 for site in measurement.sites), default=0)
    with theme.applied():
        figure = Figure(figsize=(_WIDTH, 5.2), dpi=_DPI)
        panels = figure.subplots(2, 4, sharex=True).ravel()
        styles = list(
            zip(places, itertools.cycle(theme.SERIES), itertools.cycle(theme.MARKERS), strict=False)
        )
        for profile, axes in zip(_PROFILES, panels, strict=False):
            for place, color, marker in styles:
                # A norm outside the layers stands behind them.
                at = [site.layer or last + 1 for site in places[place]]
                axes.plot(at, [profile.value(site) for site in places[place]], color=color, marker=marker)
            if profile.bound is not None:
                axes.axhline(profile.bound, color=theme.GRAY, linewidth=1, linestyle=":")
            _finish(axes, profile.title, [profile.value(site) for site in measurement.sites], profile.log)
        layers = [each for each in measurement.gradients if each.layer is not None]
        if layers:
            axes = panels[len(_PROFILES)]
            axes.plot(
                [each.layer for each in layers],
                [each.grad_norm for each in layers],
                color=theme.GRAY,
                marker="s",
            )
            _finish(axes, "gradient norm of the layer", [each.grad_norm for each in layers], True)
        else:
            panels[len(_PROFILES)].set_visible(False)
        for axes in panels[4:]:
            axes.set_xlabel("layer")
            axes.xaxis.set_major_formatter(
                FuncFormatter(lambda value, _: "end" if value == last + 1 else f"{value:g}")
            )
        figure.legend(
            handles=[
                Line2D([], [], color=color, marker=marker, label=place) for place, color, marker in styles
            ],
            loc="outside upper left",
            ncols=_MAX_COLUMNS,
        )
    return figure


def _finish(axes: Axes, title: str, values: Sequence[float], log: bool) -> None:
    axes.set_title(title, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(x=0.08)
    if log:
        _log_axis(axes, "y", values)
    else:
        axes.set_ylim(0, max([*values, _SMALLEST_AXIS]) * 1.08)


# --- parts ----------------------------------------------------------------------------------------------


def _by_place(sites: Iterable[SiteMeasurement]) -> dict[str, list[SiteMeasurement]]:
    places: dict[str, list[SiteMeasurement]] = {}
    for site in sites:
        places.setdefault(site.place, []).append(site)
    return places


def _log_axis(axes: Axes, which: str, values: Iterable[float]) -> None:
    """A logarithmic axis with plain numbers, where the values allow it."""
    shown = [value for value in values if value > 0]
    if not shown:
        return
    axis = axes.yaxis if which == "y" else axes.xaxis
    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    low, high = min(shown), max(shown)
    (axes.set_ylim if which == "y" else axes.set_xlim)(low / 1.25, high * 1.25)
    _plain(axis, low, high)


def _plain(axis: Axis, low: float, high: float) -> None:
    """Plain numbers on a logarithmic axis, about two to ten over any range."""
    few = next(subs for ratio, subs in _TICKS if high / low < ratio)
    axis.set_major_locator(LogLocator(subs=few))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axis.set_minor_formatter(NullFormatter())


def _short(site: SiteMeasurement) -> str:
    return site.place if site.layer is None else f"{site.place}, layer {site.layer}"


def _quantile(values: npt.NDArray[np.floating]) -> float:
    return float(np.quantile(values, _AXIS_QUANTILE))


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share >= 1e-4 else "< 0.01 %"


def _range(values: Sequence[float], spec: str) -> str:
    low, high = (format(value, spec).replace("-", "−") for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
