"""Line charts as SVG text: no dependency, no script, colours that follow light and dark mode.

Colours are CSS classes: `c0`..`c5` for runs and quantities (safe for colour-blind readers, at least
4.5:1 against both backgrounds), `r0`..`r4` for an ordered set such as layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Point = tuple[float, float]
Marker = Literal["none", "circle", "diamond", "square", "triangle"]

N_COLORS = 6
N_RAMP = 5
_LIGHT = ["#0072b2", "#b84a00", "#007a58", "#a8457f", "#8a6100", "#555e6a"]
_DARK = ["#56b4e9", "#ff9e5e", "#3ccb9f", "#e79ac6", "#e6b84a", "#b8c0cc"]
_LIGHT_RAMP = ["#3f93c9", "#2f7fb8", "#1b6199", "#0f4578", "#082b54"]
_DARK_RAMP = ["#3a86bd", "#56a3d6", "#82bfe6", "#b0d8f2", "#dff0fb"]


def _variables(neutral: dict[str, str], colors: list[str], ramp: list[str]) -> str:
    named = neutral | {f"c{i}": c for i, c in enumerate(colors)}
    named |= {f"r{i}": c for i, c in enumerate(ramp)}
    return "".join(f"--{name}:{value};" for name, value in named.items())


STYLE = (
    ":root{color-scheme:light dark;"
    + _variables(
        {"bg": "#ffffff", "text": "#1c2430", "muted": "#55606e", "grid": "#e2e6eb"},
        _LIGHT,
        _LIGHT_RAMP,
    )
    + "}@media (prefers-color-scheme:dark){:root{"
    + _variables(
        {"bg": "#14181f", "text": "#e8ecf1", "muted": "#a3adba", "grid": "#2c333d"},
        _DARK,
        _DARK_RAMP,
    )
    + "}}"
    + "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(N_COLORS))
    + "".join(f".r{i}{{--c:var(--r{i})}}" for i in range(N_RAMP))
    + ".chart text{font:13px system-ui,-apple-system,'Segoe UI',sans-serif;fill:var(--text)}"
    ".chart .title{font-size:15px;font-weight:600}.chart .muted{fill:var(--muted)}"
    ".chart .grid{stroke:var(--grid)}.chart .paper{fill:var(--bg)}"
    ".chart .end{fill:var(--c);font-weight:600}.chart .ordered{fill:var(--text)}"
    ".chart .line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}"
    ".chart .dashed{stroke-dasharray:5 4;stroke-width:1.5}"
    ".chart .thin{stroke-width:1.25;opacity:.75}"
    ".chart .mark{fill:var(--c);stroke:var(--bg);stroke-width:1}"
    ".chart .hollow{fill:var(--bg);stroke:var(--c);stroke-width:1.5}"
    ".chart .hit{fill:transparent}"
)


@dataclass(frozen=True)
class Axis:
    """A numeric axis from `low` to `high`; with `log`, distances are ratios."""

    label: str
    low: float
    high: float
    log: bool = False
    integer: bool = False

    def fraction(self, value: float) -> float:
        """Where `value` lies: 0 at `low`, 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """About five round values within the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
                values = [step * 10.0**decade for decade in decades for step in steps]
                inside = [v for v in values if self.low <= v <= self.high]
                if len(inside) >= 4:
                    return inside[:: math.ceil(len(inside) / 8)]
        step = _round_step((self.high - self.low) / 5)
        if self.integer:
            step = max(1.0, math.ceil(step))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]

    def tick_labels(self) -> list[str]:
        """`ticks` as text, all with the same number of decimals on a linear axis."""
        ticks = self.ticks()
        if self.log:
            return [f"{tick:.6g}" for tick in ticks]
        top = max((abs(tick) for tick in ticks), default=0)
        unit, suffix = next((u for u in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if top >= 10 * u[0]), (1.0, ""))
        scaled = [tick / unit for tick in ticks]
        decimals = next(
            (d for d in range(6) if all(abs(v - round(v, d)) < 1e-9 * max(1, abs(v)) for v in scaled)),
            6,
        )
        return [f"{v:.{decimals}f}{suffix if v else ''}" for v in scaled]


def fit_axis(
    label: str,
    values: Iterable[float],
    *,
    zero: bool = False,
    log: bool | None = None,
    integer: bool = False,
    pad: float = 0.05,
) -> Axis:
    """An axis that holds the finite ones of `values` with a margin of `pad` on each side.

    Args:
        zero: start at 0.
        log: None takes a logarithmic axis where all values are positive and span a factor of 3.
    """
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if log is None:
        log = not zero and low > 0 and high >= 3 * low
    if log:
        margin = (high / low) ** pad if high > low else 1.1
        return Axis(label, low / margin, high * margin, log=True, integer=integer)
    low = 0.0 if zero else low
    margin = (high - low) * pad or (0.5 if integer else abs(high) * 0.05 or 0.5)
    return Axis(label, low if zero else low - margin, high + margin, integer=integer)


@dataclass(frozen=True)
class Series:
    """One line or set of marks. `name` shows in hover titles and, with `label`, at its end."""

    name: str
    points: Sequence[Point]
    color: str
    line: Literal["solid", "dashed", "thin", "none"] = "solid"
    marker: Marker = "none"
    hollow: bool = False
    label: bool = False


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` of `points`, evenly chosen, with the first and the last."""
    if len(points) <= limit:
        return list(points)
    return [points[round(i * (len(points) - 1) / (limit - 1))] for i in range(limit)]


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


@dataclass(frozen=True)
class Chart:
    """A chart's content; `x`, `y` are axes and points outside of them are left out."""

    title: str
    description: str
    x: Axis
    y: Axis
    series: Sequence[Series]

    def body(self, width: int, height: int, legend: Sequence[Series] = ()) -> str:
        """The SVG elements of the chart in a box of `width` x `height` units."""
        names = [_short(s.name) for s in self.series if s.label]
        right = width - (14 + max((_text_width(name) for name in names), default=0))
        frame = _Frame(self.x, self.y, 54, right, 76 if legend else 54, height - 46)
        parts = [
            f'<text class="title" x="8" y="20">{escape(self.title)}</text>',
            f'<text class="muted" x="8" y="40">{escape(self.y.label)}</text>',
            f'<g transform="translate(8 60)">{legend_row(legend)}</g>' if legend else "",
            frame.grid(),
        ]
        visible = [(s, [p for p in s.points if frame.holds(p)]) for s in self.series]
        parts += [frame.line(s, points) for s, points in visible]
        parts += [frame.marks(s, points) for s, points in visible]
        parts.append(frame.end_labels([(s, p[-1]) for s, p in visible if s.label and p]))
        return "".join(parts)

    def svg(self, ident: str, width: int = 440, height: int = 330, legend: Sequence[Series] = ()) -> str:
        """The chart as an `<svg>` for a page; `ident` is a prefix of ids, unique in that page."""
        return _svg(ident, self.title, self.description, width, height, self.body(width, height, legend))


def side_by_side(
    charts: Sequence[Chart], title: str, legend: Sequence[Series], width: int, height: int
) -> str:
    """A stand-alone SVG file: `charts` in a row on an opaque background."""
    each = width // len(charts)
    body = f'<rect class="paper" width="{width}" height="{height}" rx="8"/>' + "".join(
        f'<g transform="translate({i * each} 4)">{chart.body(each, height - 4, legend)}</g>'
        for i, chart in enumerate(charts)
    )
    description = " ".join(chart.description for chart in charts)
    svg = _svg("curves", title, description, width, height, f"<style>{STYLE}</style>{body}")
    # Shown by <img>, a picture without a size of its own may shrink to 300 pixels.
    sized = svg.replace("<svg ", f'<svg width="{width}" height="{height}" ', 1)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{sized}\n'


def legend_row(entries: Sequence[Series]) -> str:
    """Swatch and name of each entry in one row; its points are not drawn."""
    parts, x = [], 0.0
    for entry in entries:
        parts.append(f'<g transform="translate({x:.0f} -4)">{_swatch(entry)}</g>')
        parts.append(f'<text x="{x + 27:.0f}" y="0">{escape(entry.name)}</text>')
        x += 27 + _text_width(entry.name) + 12
    return "".join(parts)


def legend_html(entries: Sequence[Series]) -> str:
    """The same for a page, where the entries may wrap."""
    return (
        '<p class="legend">'
        + "".join(
            '<span><svg class="chart" viewBox="0 -8 22 16" aria-hidden="true">'
            f"{_swatch(entry)}</svg>{escape(entry.name)}</span> "
            for entry in entries
        )
        + "</p>"
    )


@dataclass(frozen=True)
class _Frame:
    """The plotting area, in SVG units, and what is drawn on it."""

    x: Axis
    y: Axis
    left: float
    right: float
    top: float
    bottom: float

    def place(self, point: Point) -> Point:
        across = self.left + self.x.fraction(point[0]) * (self.right - self.left)
        return across, self.bottom - self.y.fraction(point[1]) * (self.bottom - self.top)

    def holds(self, point: Point) -> bool:
        return self.x.low <= point[0] <= self.x.high and self.y.low <= point[1] <= self.y.high

    def grid(self) -> str:
        parts = []
        for tick, label in zip(self.y.ticks(), self.y.tick_labels(), strict=True):
            y = self.place((self.x.low, tick))[1]
            parts.append(
                f'<path class="grid" d="M{self.left:.1f} {y:.1f}H{self.right:.1f}"/>'
                f'<text class="muted ytick" x="{self.left - 7:.1f}" y="{y + 4:.1f}" '
                f'text-anchor="end">{label}</text>'
            )
        for tick, label in zip(self.x.ticks(), self.x.tick_labels(), strict=True):
            x = self.place((tick, self.y.low))[0]
            parts.append(
                f'<path class="grid" d="M{x:.1f} {self.bottom:.1f}v5"/>'
                f'<text class="muted xtick" x="{x:.1f}" y="{self.bottom + 19:.1f}" '
                f'text-anchor="middle">{label}</text>'
            )
        parts.append(
            f'<path class="grid" d="M{self.left:.1f} {self.bottom:.1f}H{self.right:.1f}"/>'
            f'<text class="muted" x="{(self.left + self.right) / 2:.1f}" '
            f'y="{self.bottom + 38:.1f}" text-anchor="middle">{escape(self.x.label)}</text>'
        )
        return "".join(parts)

    def line(self, series: Series, points: Sequence[Point]) -> str:
        if series.line == "none" or len(points) < 2:
            return ""
        placed = " ".join("{:.2f},{:.2f}".format(*self.place(point)) for point in points)
        return (
            f'<polyline class="line {series.line} {series.color}" points="{placed}">'
            f"<title>{escape(series.name)}</title></polyline>"
        )

    def marks(self, series: Series, points: Sequence[Point]) -> str:
        shown = points if series.marker != "none" else thin(points, 20)
        return "".join(
            _marker(series, *self.place(point), self._hover(series.name, point)) for point in shown
        )

    def _hover(self, name: str, point: Point) -> str:
        return escape(f"{name}: {self.y.label} {point[1]:.4g} at {self.x.label} {point[0]:,.6g}", quote=False)

    def end_labels(self, ends: Sequence[tuple[Series, Point]]) -> str:
        placed = sorted(((self.place(point)[1], series) for series, point in ends), key=_first)
        heights = spread([y for y, _ in placed], 15, self.top, self.bottom)
        return "".join(
            f'<text class="end {_label_color(series)}" x="{self.right + 7:.1f}" y="{y + 4:.1f}">'
            f"{escape(_short(series.name))}</text>"
            for y, (_, series) in zip(heights, placed, strict=True)
        )


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending `positions` as little as needed to lie `gap` apart and within low..high."""
    result: list[float] = []
    for position in positions:
        result.append(max(position, low, result[-1] + gap if result else low))
    ceiling = high
    for i in reversed(range(len(result))):
        result[i] = min(result[i], ceiling)
        ceiling = result[i] - gap
    return result


def _first(item: tuple[float, Series]) -> float:
    return item[0]


def _svg(ident: str, title: str, description: str, width: int, height: int, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" '
        f'viewBox="0 0 {width} {height}" aria-labelledby="{ident}-title {ident}-desc">'
        f'<title id="{ident}-title">{escape(title)}</title>'
        f'<desc id="{ident}-desc">{escape(description)}</desc>{body}</svg>'
    )


def _swatch(entry: Series) -> str:
    style = f"line {entry.line} {entry.color}"
    line = "" if entry.line == "none" else f'<path class="{style}" d="M0 0h22"/>'
    return line + _marker(entry, 11, 0, "")


def _marker(series: Series, x: float, y: float, hover: str) -> str:
    title = f"<title>{hover}</title>" if hover else ""
    if series.marker == "none":
        return f'<circle class="hit" cx="{x:.2f}" cy="{y:.2f}" r="7">{title}</circle>' if hover else ""
    style = f"{'hollow' if series.hollow else 'mark'} {series.color}"
    if series.marker == "circle":
        return f'<circle class="{style}" cx="{x:.2f}" cy="{y:.2f}" r="4">{title}</circle>'
    outline = {
        "diamond": "m0 -5l5 5l-5 5l-5 -5z",
        "square": "m-4 -4h8v8h-8z",
        "triangle": "m0 -5l5 9h-10z",
    }[series.marker]
    return f'<path class="{style}" d="M{x:.2f} {y:.2f}{outline}">{title}</path>'


def _label_color(series: Series) -> str:
    """The line's own colour; a ramp is too pale for text at one of its ends."""
    return "ordered" if series.color.startswith("r") else series.color


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * 0.999) * power


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"


def _text_width(text: str) -> float:
    """An upper estimate for bold 13 px text: the reader's font is not known."""
    return sum(13.0 if letter in "mwMW@%" else 9.0 for letter in text)
