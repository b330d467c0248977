"""Writes a report: results.json, report.html (one file, no scripts, nothing from outside) and curves.svg.

What stands where is in `report.html.jinja`; here is what it shows.
"""

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from megatron_dyt.atomic import write_atomically
from megatron_dyt.report import charts, dyt_stats, theme
from megatron_dyt.report.charts import Chart
from megatron_dyt.report.runs import NUMBERS, Run, evaluation_rows, summarize

# Label, unit and reading, format of each number in the table.
_ROWS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "valid_loss": ("Validation loss", "nats per token, lower is better", "{:.4f}".format),
    "bits_per_byte": ("Bits per byte", "held-out text, lower is better", "{:.4f}".format),
    "next_line_acc": ("Next-line accuracy", "choice of four, chance 25%", "{:.1%}".format),
    "seconds_per_step": ("Seconds per step", "median after warm-up", "{:.4g}".format),
    "tokens": ("Training tokens", "", "{:,.0f}".format),
    "learning_rate": ("Learning rate", "peak", "{:g}".format),
}


class Row(NamedTuple):
    """A table's row: what it is about, and a (value, small print) for each run."""

    label: str
    hint: str
    cells: list[tuple[str, str]]


def write_report(
    runs: Sequence[Run],
    output: Path,
    *,
    title: str,
    elapsed_seconds: float | None = None,
    allow_missing_eval: bool = False,
) -> list[Path]:
    """Write the three files into the directory `output`, each whole or not at all, and return their paths.

    The first run is the one that the others are compared with.

    Raises:
        UserError: a run lacks a number; nothing is written then.
    """
    results = summarize(runs, elapsed_seconds=elapsed_seconds, allow_missing_eval=allow_missing_eval)
    losses = charts.loss_chart([charts.curves(run) for run in runs], title)
    files = {
        "results.json": json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False) + "\n",
        "report.html": report_html(runs, results, title, losses),
        "curves.svg": losses.svg,
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomically(output / name, text.encode())
    return [output / name for name in files]


def report_html(runs: Sequence[Run], results: dict[str, Any], title: str, losses: Chart) -> str:
    """The whole page; `results` is what `runs.summarize` returned for `runs`, `losses` the first chart."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_dyt.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    return environment.get_template("report.html.jinja").render(
        title=title,
        variables=theme.variables(),
        headline=headline(runs, results),
        names=[run.name for run in runs],
        numbers=_number_rows(runs, results),
        losses=losses,
        troubles=[(run.name, *run.metrics.skipped) for run in runs if any(run.metrics.skipped)],
        statistics=[_statistics(run) for run in runs if run.stats],
        others=[chart for chart in (charts.scale_chart(runs), charts.step_time_chart(runs)) if chart],
        has_scale=any(record.embedding_scale is not None for run in runs for record in run.stats),
        step_time_ratio=results["step_time_ratio"],
        evaluation=_evaluation_rows(runs),
        stale=[
            (run.name, run.evaluated_iteration, run.last_iteration)
            for run in runs
            if run.evaluated_iteration is not None and run.evaluated_iteration < run.last_iteration
        ],
        results=results,
    )


def data_uri(chart: Chart) -> str:
    """A figure for `<img src=...>`: in the page, and yet with ids and styles of its own."""
    return "data:image/svg+xml;base64," + base64.b64encode(chart.svg.encode()).decode()


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


def _number_rows(runs: Sequence[Run], results: dict[str, Any]) -> list[Row]:
    rows = []
    for key in NUMBERS:
        label, hint, text = _ROWS[key]
        values = [results[run.name][key] for run in runs]
        cells = [
            ("–" if value is None else text(value), _difference(key, value, values[0]) if i else "")
            for i, value in enumerate(values)
        ]
        rows.append(Row(label, hint, cells))
    return rows


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


def _statistics(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "first": run.stats[0].iteration,
        "last": run.stats[-1].iteration,
        "alpha": charts.alpha_chart(run.stats),
        "alpha_std": charts.history_chart(run.stats, charts.ALPHA_STD),
        "work": dyt_stats.work(run.stats[-1], run.metrics.arguments.get("dyt_function") or "tanh"),
        "saturated": charts.history_chart(run.stats, charts.SATURATED),
    }


def _evaluation_rows(runs: Sequence[Run]) -> list[Row]:
    return [
        Row(task, metric, [(_number(values.get(run.name), ".4f"), "") for run in runs])
        for (task, metric), values in sorted(evaluation_rows(runs).items())
    ]


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _signed(value: float, spec: str) -> str:
    return format(value, "+" + spec).replace("-", "−")
