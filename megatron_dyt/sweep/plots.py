"""The figures of a sweep: loss against an axis, a line for each norm; a heat map of two axes."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from megatron_dyt.atomic import write_atomically
from megatron_dyt.report import theme
from megatron_dyt.sweep import table
from megatron_dyt.sweep.spec import Plot, Run, Sweep
from megatron_dyt.sweep.table import Results

_LOSS = "validation loss, nats per token"
# In inches of 72 SVG units, as the figures of a report.
_WIDTH, _HEIGHT, _PANEL = 5.5, 3.8, 4.2
_COLUMNS = 3
# A logarithmic axis where the largest value is this many times the smallest.
_LOGARITHMIC_FROM = 2
# From the lowest loss, dark, to the highest. No colour of the theme, which changes with the reader's mode.
_HEAT = LinearSegmentedColormap.from_list("loss", ["#0a2a52", "#1d5f96", "#4494c8", "#d9e9f4"])
# Text on a cell is white below this share of the range.
_DARK_BELOW = 0.6


@dataclass
class Point:
    """One place of a figure: the losses over the seeds, and how many runs diverged there.

    `best` is the point of the axis that is minimised over, where there is one.
    """

    losses: list[float] = field(default_factory=list)
    diverged: int = 0
    best: str | None = None

    @property
    def mean(self) -> float:
        """nan where no run finished."""
        return statistics.fmean(self.losses) if self.losses else math.nan


# {panel: {line or row: {x: point}}}, by the labels of the axes.
type Panels = dict[str, dict[str, dict[str, Point]]]


def write(output: Path, sweep: Sweep, results: Results) -> list[Path]:
    """Draw the figures that the sweep file asks for, as SVG; returns the files."""
    paths = []
    for plot in sweep.plots:
        path = output / f"{plot.name}.svg"
        drawn = _heat_map(sweep, results, plot) if plot.y else _lines(sweep, results, plot)
        if drawn is not None:
            write_atomically(path, drawn.encode())
            paths.append(path)
    return paths


def panels(sweep: Sweep, results: Results, plot: Plot) -> Panels:
    """What a figure shows; the axes that it does not name get a panel for each of their places."""
    over = sweep.compare.best_over if sweep.compare else None
    shown = (plot.x, plot.y, plot.series)
    over = None if over in shown else over
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in sweep.runs:
        if plot.x in run.point and (plot.y is None or plot.y in run.point):
            rest = {axis: label for axis, label in run.point.items() if axis not in (*shown, over)}
            panel = ", ".join(f"{axis} {label}" for axis, label in rest.items())
            line = run.point.get(plot.y or plot.series or "", "")
            groups.setdefault((panel, line, run.point[plot.x]), []).append(run)
    found: Panels = {}
    for (panel, line, x), runs in groups.items():
        best, losses = table.best(runs, results, over)
        diverged = sum(
            results[run].status == "diverged"
            for run in runs
            if run in results and (over is None or run.point.get(over) == best or best is None)
        )
        found.setdefault(panel, {}).setdefault(line, {})[x] = Point(list(losses.values()), diverged, best)
    return found


def _lines(sweep: Sweep, results: Results, plot: Plot) -> str | None:
    found = panels(sweep, results, plot)
    if not _has_numbers(found):
        return None
    places = _places([x for lines in found.values() for line in lines.values() for x in line])
    names = list(dict.fromkeys(name for lines in found.values() for name in lines))
    said = []
    with theme.applied():
        figure, grid = _figure(found)
        for (panel, lines), axes in zip(found.items(), grid, strict=False):
            _label(axes, panel, plot.x, _LOSS)
            _x_axis(axes, places)
            for name, points in lines.items():
                style = names.index(name)
                _line(
                    axes,
                    places,
                    points,
                    theme.SERIES[style % len(theme.SERIES)],
                    theme.MARKERS[style % 4],
                    name,
                )
                said += [f"{panel} {name} {x}: {point.mean:.4f}".strip() for x, point in points.items()]
        handles, labels = grid[0].get_legend_handles_labels()
        if any(labels):
            figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 6))
    return theme.svg(figure, f"{sweep.title}: loss against {plot.x}", "; ".join(said))


def _line(
    axes: Axes, places: dict[str, float], points: dict[str, Point], color: str, marker: str, name: str
) -> None:
    """The means, joined; each seed's loss; a cross at the top where runs diverged."""
    there = sorted(points, key=lambda x: places[x])
    xs = [places[x] for x in there]
    axes.plot(xs, [points[x].mean for x in there], color=color, marker=marker, label=name)
    seeds = [(places[x], loss) for x in there for loss in points[x].losses]
    axes.plot([x for x, _ in seeds], [y for _, y in seeds], color=color, marker=".", linestyle="", alpha=0.5)
    crosses = [places[x] for x in there if points[x].diverged]
    (cross,) = axes.plot(
        crosses,
        [1.0] * len(crosses),
        color=color,
        marker="x",
        linestyle="",
        clip_on=False,
        transform=axes.get_xaxis_transform(),
    )
    # Without a point it is everywhere, for the layout.
    cross.set_in_layout(False)


def _heat_map(sweep: Sweep, results: Results, plot: Plot) -> str | None:
    found = panels(sweep, results, plot)
    if not _has_numbers(found):
        return None
    assert plot.y is not None
    columns = _ordered([x for rows in found.values() for row in rows.values() for x in row])
    rows = _ordered([row for each in found.values() for row in each])
    means = [p.mean for each in found.values() for row in each.values() for p in row.values() if p.losses]
    scale = Normalize(min(means), max(means) if max(means) > min(means) else min(means) + 1)
    said = []
    with theme.applied():
        figure, grid = _figure(found)
        for (panel, cells), axes in zip(found.items(), grid, strict=False):
            _label(axes, panel or _LOSS, plot.x, plot.y)
            axes.grid(visible=False)
            axes.set_xticks(range(len(columns)), columns)
            axes.set_yticks(range(len(rows)), rows)
            axes.set_xlim(-0.5, len(columns) - 0.5)
            axes.set_ylim(-0.5, len(rows) - 0.5)
            for (j, row), (i, column) in itertools.product(enumerate(rows), enumerate(columns)):
                point = cells.get(row, {}).get(column)
                if point is not None:
                    said.append(_cell(axes, i, j, point, scale))
    return theme.svg(figure, f"{sweep.title}: loss by {plot.x} and {plot.y}", "; ".join(said))


def _cell(axes: Axes, i: int, j: int, point: Point, scale: Normalize) -> str:
    """Draw one cell; returns what it says."""
    text = f"{point.mean:.3f}" if point.losses else "diverged" if point.diverged else ""
    share = float(scale(point.mean)) if point.losses else 1.0
    face = _HEAT(share) if point.losses else theme.GRID
    axes.fill_between([i - 0.48, i + 0.48], j - 0.48, j + 0.48, color=face, linewidth=0)
    # Not the theme's text colour, which is light in the dark mode: the cells stay as they are.
    ink = theme.TEXT if not point.losses else "#ffffff" if share < _DARK_BELOW else "#000000"
    note = f"\n{point.diverged} diverged" if point.losses and point.diverged else ""
    axes.text(i, j, text + note, ha="center", va="center", color=ink, fontsize=9)
    return text


def _figure(found: Panels) -> tuple[Figure, Sequence[Axes]]:
    columns = min(_COLUMNS, len(found))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(max(_WIDTH, _PANEL * columns), _HEIGHT * rows))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in grid[len(found) :]:
        unused.set_visible(False)
    return figure, list(grid)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _x_axis(axes: Axes, places: dict[str, float]) -> None:
    """Ticks at the points of the axis, as the sweep file writes them."""
    low, high = min(places.values()), max(places.values())
    if low > 0 and high >= _LOGARITHMIC_FROM * low:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(places.values()), list(places))


def _places(labels: Sequence[str]) -> dict[str, float]:
    """{label: where it is on the axis}: the number that it is, or its rank among words."""
    ordered = _ordered(labels)
    numbers = [_number(label) for label in ordered]
    if any(number is None for number in numbers):
        return {label: float(rank) for rank, label in enumerate(ordered)}
    return {label: number for label, number in zip(ordered, numbers, strict=True) if number is not None}


def _ordered(labels: Sequence[str]) -> list[str]:
    """Each label once, numbers by size and words as they come."""
    once = list(dict.fromkeys(labels))
    numbers = {label: _number(label) for label in once}
    if any(number is None for number in numbers.values()):
        return once
    return sorted(once, key=lambda label: float(label))


def _number(label: str) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None


def _has_numbers(found: Panels) -> bool:
    return any(point.losses for lines in found.values() for line in lines.values() for point in line.values())
