"""The report as one HTML file without scripts or outside resources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from megatron_dyt.report.figures import STYLE, Chart, legend_html
from megatron_dyt.report.plots import (
    ALPHA_LEGEND,
    ALPHA_STD,
    LOSS_LEGEND,
    SATURATED,
    alpha_charts,
    history_charts,
    loss_charts,
    scale_chart,
    step_time_chart,
)
from megatron_dyt.report.runs import METRICS, Run, evaluation_rows

_PAGE_STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;padding:20px 16px 48px;max-width:1100px;background:var(--bg);color:var(--text);
font:16px/1.5 system-ui,-apple-system,'Segoe UI',sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 8px}
h2{font-size:1.2rem;margin:36px 0 4px}
p{max-width:72ch;margin:6px 0 12px}
.lead{font-size:1.1rem}
.note{color:var(--muted);font-size:.92rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:12px 0}
th,td{text-align:right;padding:7px 14px;border-bottom:1px solid var(--grid);vertical-align:top}
th:first-child,td:first-child{text-align:left;padding-left:0}
th[scope=row]{font-weight:500}
th small,td small{display:block;color:var(--muted);font-weight:400;font-size:.82rem}
.two,.three{display:grid;gap:18px;margin-bottom:22px}
.two{grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr))}
.three{grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr))}
svg.chart{width:100%;height:auto;display:block}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;font-size:.92rem}
.legend svg.chart{display:inline-block;width:22px;height:16px;margin-right:6px;vertical-align:-2px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid var(--grid);padding:10px 12px;
border-radius:6px;font-size:.85rem;margin:6px 0 14px}
"""
# Label, unit and reading, format of each number in the table.
_ROWS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "valid_loss": ("Validation loss", "nats per token, lower is better", "{:.4f}".format),
    "bits_per_byte": ("Bits per byte", "held-out text, lower is better", "{:.4f}".format),
    "next_line_acc": ("Next-line accuracy", "choice of four, chance 25%", "{:.1%}".format),
    "seconds_per_step": ("Seconds per step", "median after warm-up", "{:.4g}".format),
    "tokens": ("Training tokens", "", "{:,.0f}".format),
    "learning_rate": ("Learning rate", "peak", "{:g}".format),
}


def report_html(runs: Sequence[Run], results: dict[str, Any], title: str) -> str:
    """The whole page; `results` is what `runs.summarize` returned for `runs`."""
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(headline(runs, results))}</p>',
        _metric_section(runs, results),
        _loss_section(runs),
        *(_stats_section(run, i) for i, run in enumerate(runs) if run.stats),
        _scale_and_time_section(runs, results),
        _evaluation_section(runs),
        _origin_section(runs, results),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_PAGE_STYLE}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )


def headline(runs: Sequence[Run], results: dict[str, Any]) -> str:
    """In a sentence or two: each run's validation loss and the second one's step time."""
    base = results[runs[0].name]["valid_loss"]
    parts = [f"{runs[0].name} ends at validation loss {_number(base, '.4f')}"]
    for run in runs[1:]:
        loss = results[run.name]["valid_loss"]
        gap = "" if None in (loss, base) else f" ({_signed(loss - base, '.4f')})"
        parts.append(f"{run.name} at {_number(loss, '.4f')}{gap}")
    ratio = results["step_time_ratio"]
    time = f" A step of {runs[1].name} takes {ratio:.2f} times as long." if ratio else ""
    return ", ".join(parts) + "." + time


def _metric_section(runs: Sequence[Run], results: dict[str, Any]) -> str:
    rows = {}
    for key in METRICS:
        label, hint, text = _ROWS[key]
        values = [results[run.name][key] for run in runs]
        rows[(label, hint)] = [
            ("–" if value is None else text(value), _difference(key, value, values[0]) if i else "")
            for i, value in enumerate(values)
        ]
    note = _note(f"Small figures: against {runs[0].name}.") if len(runs) > 1 else ""
    return _table(runs, rows) + note


def _difference(key: str, value: float | None, base: float | None) -> str:
    if value is None or base is None:
        return ""
    if key == "seconds_per_step":
        return f"× {value / base:.2f}" if base else ""
    if value == base:
        return "same"
    if key == "next_line_acc":
        return f"{_signed(100 * (value - base), '.1f')} points"
    return _signed(value - base, {"tokens": ",.0f", "learning_rate": ".4g"}.get(key, ".4f"))


def _table(runs: Sequence[Run], rows: dict[tuple[str, str], list[tuple[str, str]]]) -> str:
    """Runs as columns; a row is (label, hint) and a (value, small print) for each run."""
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    body = "".join(
        f'<tr><th scope="row">{escape(label)}<small>{escape(hint)}</small></th>'
        + "".join(f"<td>{escape(v)}<small>{escape(small)}</small></td>" for v, small in cells)
        + "</tr>"
        for (label, hint), cells in rows.items()
    )
    table = f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _loss_section(runs: Sequence[Run]) -> str:
    figures = "".join(chart.svg(f"loss{i}", legend=LOSS_LEGEND) for i, chart in enumerate(loss_charts(runs)))
    trouble = "".join(
        _note(f"{run.name}: {skipped} iterations skipped, {nan} with loss nan.")
        for run in runs
        for skipped, nan in [run.log.skipped]
        if skipped or nan
    )
    return f'<h2>Loss</h2><div class="two">{figures}</div>{trouble}'


def _stats_section(run: Run, index: int) -> str:
    first, last = run.stats[0].iteration, run.stats[-1].iteration
    return (
        f"<h2>{escape(run.name)}: alpha and the scale of its input</h2>"
        "<p>Alpha of each layer, and 1/std of what that layer gets; start is iteration "
        f"{first}, end is iteration {last}. Where alpha follows 1/std, DyT does a norm's work.</p>"
        + legend_html(ALPHA_LEGEND)
        + _small(alpha_charts(run.stats), f"alpha{index}")
        + "<p>Alpha · std of the input, a line a layer: flat where alpha follows 1/std.</p>"
        + _small(history_charts(run.stats, ALPHA_STD), f"ratio{index}")
        + "<p>Saturation: the share of inputs on the flat part of the curve, a line a layer.</p>"
        + _small(history_charts(run.stats, SATURATED), f"saturated{index}")
    )


def _small(charts: Sequence[Chart], ident: str) -> str:
    figures = "".join(c.svg(f"{ident}-{i}", width=360, height=260) for i, c in enumerate(charts))
    return f'<div class="three">{figures}</div>'


def _scale_and_time_section(runs: Sequence[Run], results: dict[str, Any]) -> str:
    charts = [chart for chart in (scale_chart(runs), step_time_chart(runs)) if chart]
    figures = "".join(c.svg(f"time{i}", height=280) for i, c in enumerate(charts))
    ratio = results["step_time_ratio"]
    note = f"Median step time, {runs[1].name} over {runs[0].name}: {ratio:.3f}." if ratio else ""
    heading = " and ".join(chart.title for chart in charts).capitalize()
    return f'<h2>{heading}</h2><p>{escape(note)}</p><div class="two">{figures}</div>'


def _evaluation_section(runs: Sequence[Run]) -> str:
    rows = {
        key: [(_number(values.get(run.name), ".4f"), "") for run in runs]
        for key, values in sorted(evaluation_rows(runs).items())
    }
    stale = "".join(
        _note(f"{run.name}: evaluated at iteration {at}; its log ends at {run.log.iterations[-1]}.")
        for run in runs
        if (at := run.evaluated_iteration) is not None and at < run.log.iterations[-1]
    )
    return f"<h2>Zero-shot evaluation</h2>{_table(runs, rows)}{stale}" if rows else ""


def _origin_section(runs: Sequence[Run], results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    commands = "".join(
        f"<p>{escape(run.name)}, {escape(step)}:</p><pre>{escape(command)}</pre>"
        for run in runs
        for step, command in results["commands"][run.name].items()
    )
    minutes = results["elapsed_seconds"] / 60
    return (
        f"<h2>Versions and commands</h2><p>{escape(versions)}.</p>"
        f"<p>{minutes:.1f} minutes in all.</p>{commands}"
    )


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _signed(value: float, spec: str) -> str:
    return format(value, "+" + spec).replace("-", "−")
