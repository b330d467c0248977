"""Charts of benchmark results as SVG text, in the theme of the project's other figures."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from megatron_dyt.report import theme


class Bar(NamedTuple):
    """One value with its quartiles; `color` is an index of `theme.SERIES`."""

    label: str
    value: float
    low: float
    high: float
    color: int = 0


class Line(NamedTuple):
    """One line of a chart: its name and (x, y) points."""

    name: str
    points: Sequence[tuple[float, float]]


def bars_svg(
    title: str,
    axis: str,
    groups: Sequence[tuple[str, Sequence[Bar]]],
    *,
    reference: float | None = None,
    digits: int = 2,
) -> str:
    """Horizontal bars by group, a thin line from quartile to quartile, and a dashed line at `reference`."""
    bars = [bar for _, group in groups for bar in group]
    # A quartile far out, on a busy machine, must not squeeze the bars.
    top = max([1.25 * bar.value for bar in bars] + [reference or 0.0])
    rows = [len(group) for _, group in groups]
    with theme.applied():
        figure = Figure(figsize=(10, 0.9 + 0.3 * sum(rows) + 0.35 * len(rows)))
        figure.suptitle(f"{title}: {axis}", x=0.01, ha="left", fontsize=11)
        panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
        for axes, (name, group) in zip(panels, groups, strict=True):
            axes.set_title(name)
            axes.grid(visible=False)
            axes.set_xlim(0, top)
            axes.invert_yaxis()
            labels = [bar.label for bar in group]
            places = range(len(group))
            colors = [theme.SERIES[bar.color % len(theme.SERIES)] for bar in group]
            axes.barh(places, [bar.value for bar in group], height=0.6, color=colors)
            axes.set_yticks(places, labels)
            for place, bar in enumerate(group):
                axes.plot([bar.low, min(bar.high, top)], [place, place], color=theme.GRAY, linewidth=1)
                behind = min(max(bar.value, bar.high), top) + 0.01 * top
                axes.text(behind, place, f"{bar.value:.{digits}f}", va="center")
            if reference is not None:
                axes.axvline(reference, color=theme.GRAY, linestyle="--", linewidth=1)
    values = "; ".join(f"{name}, {b.label}: {b.value:.{digits}f}" for name, group in groups for b in group)
    return theme.svg(figure, title, values)


def lines_svg(
    title: str,
    axes_labels: tuple[str, str],
    charts: Sequence[tuple[str, Sequence[Line]]],
    *,
    reference: tuple[str, float],
) -> str:
    """Charts in a row with one legend: lines with a mark at each point, and a dashed line at `reference`."""
    with theme.applied():
        figure = Figure(figsize=(11, 3.8))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        panels = figure.subplots(1, len(charts), sharey=True, squeeze=False)[0]
        for axes, (name, lines) in zip(panels, charts, strict=True):
            axes.set_title(name)
            axes.set_xlabel(axes_labels[0])
            for line, color, marker in zip(lines, theme.SERIES, theme.MARKERS * 2, strict=False):
                axes.plot(*zip(*line.points, strict=True), color=color, marker=marker, label=line.name)
            axes.axhline(reference[1], color=theme.GRAY, linestyle="--", linewidth=1, label=reference[0])
            axes.set_ylim(bottom=0)
        panels[0].set_ylabel(axes_labels[1])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    values = "; ".join(
        f"{name}, {line.name}: " + ", ".join(f"{y:.4g} at {x:g}" for x, y in line.points)
        for name, lines in charts
        for line in lines
    )
    return theme.svg(figure, title, values)
