"""Tables and pictures of the runs."""

from __future__ import annotations

import csv
import io
import itertools
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from numpy.typing import NDArray

from examples.beyond_llm import run as frame
from examples.beyond_llm.domain import Domain
from megatron_dyt.atomic import write_atomically
from megatron_dyt.report import theme
from megatron_dyt.sweep.statistics import Interval, interval

type Results = Mapping[frame.Run, dict[str, Any]]
PAPER = Path(__file__).with_name("paper.yaml")
COLUMNS = ["domain", "metric", "unit", "norm", "learning rate", "seeds", "diverged", "mean", "half interval"]
COLUMNS += ["minus own norm", "half interval of the difference"]
HEAD = ["domain", "metric, on test data", "norm", "rate", "mean", "minus own norm", "diverged", "the paper"]


def write(output: Path, domains: Mapping[str, Domain], results: Results) -> None:
    """table.csv and table.md, a row for each metric and norm; pictures."""
    rows: list[list[Any]] = [COLUMNS]
    lines: list[list[Any]] = [HEAD, ["---"] * len(HEAD)]
    for name, domain in domains.items():
        norms = dict.fromkeys(run.norm for run in results if run.domain == name)
        best = {norm: best_rate(name, norm, domain, results) for norm in norms}
        for metric, (unit, _) in domain.metrics.items():
            base = at(name, domain.norm, best[domain.norm], metric, results)
            for norm, rate in best.items():
                values = at(name, norm, rate, metric, results)
                lost = diverged(name, norm, rate, results)
                other = norm != domain.norm
                found = interval([values[seed] - base[seed] for seed in values if seed in base and other])
                shown = numbers(interval(list(values.values())))
                rows.append([name, metric, unit, norm, rate, len(values), lost, *shown, *numbers(found)])
                difference = text(found, "", sign=True) if other else ""
                paper = published(name, metric, norm, other)
                lines.append(
                    [domain.title, metric, norm, rate, cell(values, unit), difference, lost or "", paper]
                )
        write_atomically(output / f"{name}.svg", picture(name, domain, best, results).encode())
        if domain.samples is not None:
            write_atomically(output / f"{name}-samples.png", gallery(name, domain.samples, best, results))
    write_atomically(output / "table.csv", as_csv(rows))
    write_atomically(output / "table.md", "".join(f"| {' | '.join(map(str, x))} |\n" for x in lines).encode())


def at(
    name: str, norm: str, rate: float, metric: str, results: Results, part: str = "test"
) -> dict[int, float]:
    """{seed: the metric} of the runs that ended well."""
    return {
        run.seed: result[part][metric]
        for run, result in results.items()
        if (run.domain, run.norm, run.rate) == (name, norm, rate) and result["status"] == "done"
    }


def diverged(name: str, norm: str, rate: float, results: Results) -> int:
    same = [r for run, r in results.items() if (run.domain, run.norm, run.rate) == (name, norm, rate)]
    return sum(result["status"] == "diverged" for result in same)


def best_rate(name: str, norm: str, domain: Domain, results: Results) -> float:
    """Of those at which the fewest runs diverged, the best by the first metric on the validation data."""
    metric, (_, higher) = next(iter(domain.metrics.items()))

    def badness(rate: float) -> tuple[int, float]:
        values = at(name, norm, rate, metric, results, "valid").values()
        mean = statistics.fmean(values) if values else 0.0
        return diverged(name, norm, rate, results), -mean if higher else mean

    return min(domain.rates, key=badness)


def published(name: str, metric: str, norm: str, other: bool) -> str:
    """The paper's figures for a norm in the domain; none where ours is another metric, or it has none."""
    facts = yaml.safe_load(PAPER.read_text())["domains"][name]
    tables = [facts, *facts.get("compared", [])] if metric == facts["ours"] else []
    key = norm if other else facts.get("own", "LN")
    found = []
    for table in tables:
        values = [f"{row['model']} {row[key]}" for row in table["rows"] if key in row]
        if values:
            found.append(f"{', '.join(values)} ({table['table']})")
    return f"{facts['metric']}, {facts['unit']}: {'; '.join(found)}" if found else ""


def numbers(found: Interval | None) -> list[Any]:
    return ["", ""] if found is None else [found.mean, "" if found.half_width is None else found.half_width]


def cell(values: Mapping[int, float], unit: str) -> str:
    return text(interval(list(values.values())), unit) if values else "diverged"


def text(found: Interval | None, unit: str, *, sign: bool = False) -> str:
    """Mean ± half of the 95 % interval, in two digits behind the point for per cents and three else."""
    if found is None:
        return "none"
    digits = 2 if abs(found.mean) >= 10 or (found.half_width or 0) >= 1 else 3
    half = "" if found.half_width is None else f" ± {found.half_width:.{digits}f}"
    return f"{found.mean:{'+' if sign else ''}.{digits}f}{half} {unit}".strip()


def as_csv(rows: list[list[Any]]) -> bytes:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue().encode()


def picture(name: str, domain: Domain, best: Mapping[str, float], results: Results) -> str:
    """The training loss of each norm at its rate: a thin line for a seed, a thick one for their mean."""
    said = []
    with theme.applied():
        figure = Figure(figsize=(5.5, 3.4))
        axes = figure.subplots()
        axes.set_title(domain.title)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        axes.set_yscale("log")
        for color, norm in zip(itertools.cycle(theme.SERIES), best, strict=False):
            curves = [
                result["losses"]
                for run, result in results.items()
                if (run.domain, run.norm, run.rate) == (name, norm, best[norm]) and result["losses"]
            ]
            for curve in curves:
                axes.plot(steps(curve), curve, color=color, linewidth=0.6, alpha=0.6)
            mean = [statistics.fmean(column) for column in zip(*curves, strict=False)]
            axes.plot(steps(mean), mean, color=color, label=f"{norm}, rate {best[norm]:g}")
            said.append(f"{norm} ends at {mean[-1]:.4g}" if mean else f"{norm} has no losses")
        axes.legend()
    return theme.svg(figure, f"{domain.title}: training loss", "; ".join(said))


def gallery(name: str, samples: Callable[[Any], Any], best: Mapping[str, float], results: Results) -> bytes:
    """A PNG of test data and of what each norm's first seed made at its rate, in the same shades."""
    shown = {"test data": np.asarray(samples(None)), **dict.fromkeys(best, np.empty(0))}
    for run, result in sorted(results.items(), key=lambda item: item[0].seed, reverse=True):
        if run.domain == name and run.rate == best[run.norm] and result["status"] == "done":
            shown[run.norm] = np.asarray(result["samples"])
    low, high = shown["test data"].min(), shown["test data"].max()
    with theme.applied():
        figure = Figure(figsize=(3 * len(shown), 4))
        for axes, (title, pictures) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
            axes.set_title(title)
            axes.set_axis_off()
            if pictures.size:
                axes.imshow(
                    mosaic(pictures, low), cmap="gray_r", vmin=low, vmax=high, interpolation="nearest"
                )
    return theme.png(figure)


def mosaic(pictures: NDArray[np.float64], edge: float) -> NDArray[np.float64]:
    """(rows, columns, height, width) -> one picture; below and right of each is an edge of that value."""
    rows, columns, height, width = pictures.shape
    framed = np.pad(pictures, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=edge)
    return framed.transpose(0, 2, 1, 3).reshape(rows * (height + 1), columns * (width + 1))


def steps(curve: list[float]) -> list[int]:
    return [frame.LOSS_EVERY * (i + 1) for i in range(len(curve))]
