"""A sweep's tables: a row per run, per point of the grid, per comparison; `table.json` has all of them."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_dyt.atomic import write_atomically, write_json
from megatron_dyt.sweep import outcome
from megatron_dyt.sweep.outcome import Outcome
from megatron_dyt.sweep.spec import Run, Sweep
from megatron_dyt.sweep.statistics import Interval, Summary, interval, summary

type Results = Mapping[Run, Outcome]
type Point = dict[str, str]


@dataclass(frozen=True)
class Cell:
    """A point of the grid: its validation losses over the seeds, and how many runs are no number.

    `difference` is that to the baseline at the same place of all other axes.
    """

    point: Point
    loss: Summary | None
    diverged: int
    failed: int
    missing: int
    difference: Interval | None = None


@dataclass(frozen=True)
class Comparison:
    """A point against the baseline's: losses of the same seed subtracted, in nats per token.

    `best` and `baseline_best` are the points of `best_over` at which each has its lowest mean loss.
    """

    point: Point
    best: str | None
    baseline_best: str | None
    difference: Interval | None


def write(output: Path, sweep: Sweep, results: Results) -> list[Path]:
    """Write the tables of what is done so far; returns the files."""
    found = cells(sweep, results)
    compared = comparisons(sweep, results)
    tables: dict[str, list[list[object]]] = {
        "table.csv": _run_rows(sweep, results),
        "summary.csv": [[*sweep.axes, *_CELL_COLUMNS], *(_cell_row(cell, sweep.axes) for cell in found)],
        "comparisons.csv": [
            [*sweep.axes, *_COMPARISON_COLUMNS],
            *(_comparison_row(each, sweep.axes) for each in compared),
        ],
    }
    for name, rows in tables.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_atomically(output / name, text.getvalue().encode())
    together = {
        "title": sweep.title,
        "axes": list(sweep.axes),
        "runs": [
            {"point": run.point, "seed": asdict(run.seed), "flags": list(run.flags), **asdict(results[run])}
            for run in sweep.runs
            if run in results
        ],
        "cells": [asdict(cell) for cell in found],
        "compare": asdict(sweep.compare) if sweep.compare else None,
        "comparisons": [asdict(each) for each in compared],
    }
    write_json(output / "table.json", together)
    return [output / name for name in (*tables, "table.json")]


_RUN_COLUMNS = ("seed_weights", "seed_data", "status", *outcome.NUMBERS, "directory")
_SITE_COLUMNS = ("alpha_std", "saturated")
_CELL_COLUMNS = (
    *("seeds", "mean", "std", "low", "high", "diverged", "failed", "missing"),
    *("pairs", "difference", "half_width"),
)
_COMPARISON_COLUMNS = ("best", "baseline_best", "pairs", "difference", "half_width")


def _run_rows(sweep: Sweep, results: Results) -> list[list[object]]:
    done = [run for run in sweep.runs if run in results]
    roles = list(dict.fromkeys(role for run in done for role in results[run].sites))
    rows: list[list[object]] = [
        [
            *_place(run.point, sweep.axes),
            *(run.seed.weights, run.seed.data, results[run].status),
            *(getattr(results[run], name) for name in outcome.NUMBERS),
            f"runs/{run.name}",
            *(getattr(results[run].sites.get(role), name, None) for role in roles for name in _SITE_COLUMNS),
        ]
        for run in done
    ]
    return [
        [*sweep.axes, *_RUN_COLUMNS, *(f"{name}_{role}" for role in roles for name in _SITE_COLUMNS)],
        *rows,
    ]


def _cell_row(cell: Cell, axes: Sequence[str]) -> list[object]:
    loss = cell.loss
    numbers = (loss.count, loss.mean, loss.std, loss.low, loss.high) if loss else (0, None, None, None, None)
    counts = (cell.diverged, cell.failed, cell.missing)
    return [*_place(cell.point, axes), *numbers, *counts, *_interval(cell.difference)]


def _comparison_row(each: Comparison, axes: Sequence[str]) -> list[object]:
    return [*_place(each.point, axes), each.best, each.baseline_best, *_interval(each.difference)]


def _place(point: Point, axes: Sequence[str]) -> list[object]:
    return [point.get(axis, "") for axis in axes]


def _interval(found: Interval | None) -> tuple[object, ...]:
    return (found.count, found.mean, found.half_width) if found else (0, None, None)


def lines(sweep: Sweep, results: Results) -> list[str]:
    """What a sweep has come to, as text: a line per point of the grid, and one per comparison."""
    found = []
    for cell in cells(sweep, results):
        where = " ".join(f"{axis} {label}" for axis, label in cell.point.items())
        bad = [(cell.diverged, "diverged"), (cell.failed, "failed"), (cell.missing, "not done")]
        notes = [f"{count} {what}" for count, what in bad if count]
        if cell.loss is not None:
            spread = "" if cell.loss.std is None else f", std {cell.loss.std:.4f}"
            notes.insert(0, f"{cell.loss.mean:.4f}{spread} ({cell.loss.count} seeds)")
        found.append(f"{where}: {', '.join(notes)}")
    for each in comparisons(sweep, results):
        assert sweep.compare is not None
        where = " ".join(f"{axis} {label}" for axis, label in each.point.items())
        bests = f" at {sweep.compare.best_over} {each.best} and {each.baseline_best}" if each.best else ""
        found.append(f"{where} minus {sweep.compare.baseline}{bests}: {_difference(each.difference)}")
    return found


def _difference(found: Interval | None) -> str:
    if found is None:
        return "no seed that both have finished"
    half = "" if found.half_width is None else f" ± {found.half_width:.4f} (95 %)"
    return f"{found.mean:+.4f}{half}, {found.count} seeds"


def cells(sweep: Sweep, results: Results) -> list[Cell]:
    """The points of the grid in their order."""
    in_place = replace(sweep.compare, best_over=None) if sweep.compare else None
    differences = {
        tuple(each.point.items()): each.difference
        for each in comparisons(replace(sweep, compare=in_place), results)
    }
    return [
        Cell(
            point=dict(point),
            loss=summary(list(losses(group, results).values())),
            diverged=sum(results[run].status == "diverged" for run in group if run in results),
            failed=sum(results[run].status == "failed" for run in group if run in results),
            missing=sum(run not in results for run in group),
            difference=differences.get(point),
        )
        for point, group in _grouped(sweep.runs).items()
    ]


def losses(group: Sequence[Run], results: Results) -> dict[str, float]:
    """{seed: validation loss} of the runs that finished; the training loss where nothing was evaluated."""
    found: dict[str, float] = {}
    for run in group:
        result = results.get(run)
        if result is not None and result.status == "finished":
            loss = result.train_loss if result.valid_loss is None else result.valid_loss
            if loss is not None:
                found[run.seed.label] = loss
    return found


def comparisons(sweep: Sweep, results: Results) -> list[Comparison]:
    """Every point of the compared axis against the baseline, for each place on the other axes."""
    compare = sweep.compare
    if compare is None:
        return []
    found = []
    for runs, baseline in compare.pairs(sweep.runs):
        ours, there = best(runs, results, compare.best_over)
        theirs, here = best(baseline, results, compare.best_over)
        difference = interval([there[seed] - here[seed] for seed in there if seed in here])
        point = {axis: label for axis, label in runs[0].point.items() if axis != compare.best_over}
        found.append(Comparison(point, ours, theirs, difference))
    return found


def best(runs: Sequence[Run], results: Results, over: str | None) -> tuple[str | None, dict[str, float]]:
    """The point of the axis `over` with the lowest mean loss, and its losses by seed.

    It is chosen among those with the most finished seeds: not one that diverges with some, where another
    does not.
    Without an axis the losses are those of all `runs`.
    """
    points: dict[str | None, list[Run]] = {}
    for run in runs:
        points.setdefault(run.point.get(over) if over else None, []).append(run)
    found = {label: losses(group, results) for label, group in points.items()}
    if not any(found.values()):
        return None, {}
    most = max(map(len, found.values()))
    label, _ = min(
        ((label, sum(each.values()) / most) for label, each in found.items() if len(each) == most),
        key=lambda item: item[1],
    )
    return label, found[label]


def _grouped(runs: Sequence[Run]) -> dict[tuple[tuple[str, str], ...], list[Run]]:
    """Runs that differ in the seed alone."""
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.point.items()), []).append(run)
    return groups
