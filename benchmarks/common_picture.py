"""Bar charts as SVG text, in the style of the project's other charts."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from megatron_dyt.report.figures import STYLE

_ROW, _BAR, _LABELS, _PLOT, _RIGHT = 22, 13, 190, 420, 110


class Bar(NamedTuple):
    """One value with its quartiles; `color` is c0 to c5."""

    label: str
    value: float
    low: float
    high: float
    color: str = "c0"


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
    width = _LABELS + _PLOT + _RIGHT
    y, parts = 66.0, []
    for name, group in groups:
        parts.append(f'<text class="title" x="8" y="{y:.0f}">{escape(name)}</text>')
        for bar in group:
            y += _ROW
            parts.append(_bar(bar, y, top, digits))
        y += _ROW + 12
    height = round(y - 4)
    if reference is not None:
        x = _LABELS + _PLOT * reference / top
        parts.append(f'<path class="line dashed c5" d="M{x:.1f} 54V{height - 10}"/>')
        parts.append(f'<text class="muted" x="{x:.1f}" y="50" text-anchor="middle">{reference:g}</text>')
    description = "; ".join(
        f"{name}, {b.label}: {b.value:.{digits}f}" for name, group in groups for b in group
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<svg width="{width}" height="{height}" xmlns="http://www.w3.org/2000/svg" class="chart" role="img" '
        f'viewBox="0 0 {width} {height}" aria-labelledby="bars-title bars-desc">'
        f'<title id="bars-title">{escape(title)}</title><desc id="bars-desc">{escape(description)}</desc>'
        f'<style>{STYLE}</style><rect class="paper" width="{width}" height="{height}" rx="8"/>'
        f'<text class="title" x="8" y="20">{escape(title)}</text>'
        f'<text class="muted" x="8" y="40">{escape(axis)}</text>{"".join(parts)}</svg>\n'
    )


def _bar(bar: Bar, y: float, top: float, digits: int) -> str:
    low, middle, high = (_PLOT * min(v, top) / top for v in (bar.low, bar.value, bar.high))
    center = y - _BAR / 2 + 2
    return (
        f'<text x="{_LABELS - 8}" y="{y:.0f}" text-anchor="end">{escape(bar.label)}</text>'
        f'<rect class="mark {bar.color}" x="{_LABELS}" y="{y - _BAR + 2:.0f}" width="{middle:.1f}" '
        f'height="{_BAR}"/>'
        f'<path class="line thin c5" d="M{_LABELS + low:.1f} {center:.1f}H{_LABELS + high:.1f}"/>'
        f'<text x="{_LABELS + max(middle, high) + 6:.1f}" y="{y:.0f}">{bar.value:.{digits}f}</text>'
    )
