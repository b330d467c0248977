"""`megatron-dyt probe`: from a checkpoint to figures, tables and a summary."""

import csv
import io
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_dyt.atomic import write_atomically
from megatron_dyt.checkpoints.iterations import complete_iterations
from megatron_dyt.errors import UserError
from megatron_dyt.nn.statistics import RARE, STRAIGHT, is_straight
from megatron_dyt.probe import figures, history
from megatron_dyt.probe.history import Moment, Relation
from megatron_dyt.probe.measure import Gradient, Measurement, SiteMeasurement, measure
from megatron_dyt.probe.sources import Source, open_source, tokens
from megatron_dyt.report import dyt_stats, theme
from megatron_dyt.report.charts import evenly

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """What `probe` measured and where from.

    Attributes:
        now: alpha and 1/std of the sites in this measurement.
        history: the same over training, empty where nothing is known of it.
        history_from: what `history` was read from.
    """

    measurement: Measurement
    now: list[Moment]
    history: list[Moment]
    history_from: str


def probe(
    load: Path,
    output: Path,
    *,
    ckpt_step: int | None = None,
    tokenizer_model: str | None = None,
    data_path: str | None = None,
    text: Path | None = None,
    sequences: int = 8,
    length: int | None = None,
    iterations: int = 8,
    device: str | None = None,
) -> str:
    """Measure the model in `load`, write figures and tables into the directory `output`, return a summary.

    Args:
        ckpt_step, tokenizer_model, device: see `sources.open_source`.
        data_path, text, sequences, length: see `sources.tokens`.
        iterations: at most so many checkpoints of the run are measured where it wrote no statistics.

    Raises:
        UserError: for what cannot work; nothing is written then.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a directory")
    if data_path is not None and text is not None:
        raise UserError("--data-path and --text were both given; give one of them")
    source = open_source(load, ckpt_step=ckpt_step, tokenizer_model=tokenizer_model, device=device)
    ids = tokens(source, data_path, text, sequences, length)
    _log.info(f"probing {load} with {sequences} sequences of {ids.shape[1] - 1} tokens")
    measurement = measure(source.model, source.call(ids[:, :-1]), ids[:, 1:])
    now = history.of_sites(measurement.sites, source.iteration or 0)
    over_time, where = _history(source, load, ids, now, measurement.sites, iterations)
    result = Probe(measurement, now, over_time, where)
    output.mkdir(parents=True, exist_ok=True)
    for name, content in _files(result).items():
        write_atomically(output / name, content)
    return summary(result, output)


def _history(
    source: Source,
    load: Path,
    ids: Any,
    now: list[Moment],
    sites: Sequence[SiteMeasurement],
    most: int,
) -> tuple[list[Moment], str]:
    """Alpha and 1/std over training, and where that is from: the run's statistics, else its checkpoints."""
    if source.iteration is None or source.saved is None or source.load_iteration is None:
        return [], ""
    # What is lost here leaves the figure of training without a part, and nothing else.
    try:
        files = dyt_stats.find(load, getattr(source.saved, "pipeline_model_parallel_size", 1))
        if files:
            records = dyt_stats.read(files)
            return history.of_records(records, sites, source.iteration), files[-1].name
    except UserError as error:
        _log.warning(f"alpha over training is taken from checkpoints: {error}")
    found: list[Moment] = []
    for step in _earlier(complete_iterations(load), source.iteration, most):
        try:
            source.load_iteration(step)
            _log.info(f"probing iteration {step}")
            of_step = measure(source.model, source.call(ids[:, :-1]), points=0)
        except UserError as error:
            _log.warning(f"iteration {step} is left out: {error}")
            continue
        found += history.of_sites(of_step.sites, step)
    return ([*found, *now], "its checkpoints") if found else ([], "")


def _earlier(complete: Sequence[int], iteration: int, most: int) -> list[int]:
    """Of the `complete` iterations those before `iteration`, evenly chosen, `most` together with it."""
    steps = [step for step in complete if step < iteration] + [iteration]
    return [steps[i] for i in evenly(len(steps), most)][:-1] if most > 1 else []


# --- files ----------------------------------------------------------------------------------------------


def _files(result: Probe) -> dict[str, bytes]:
    """All files of a probe by name. Figures as PNG and SVG."""
    sites = result.measurement.sites
    drawn = {
        "maps_by_token": (
            figures.map_figure(sites, figures.BY_TOKEN),
            "Output against input of each norm, coloured by the token's rms",
        ),
        "maps_by_channel": (
            figures.map_figure(sites, figures.BY_CHANNEL),
            "Output against input of each norm, coloured by the channel's rms",
        ),
        "alpha": (
            figures.alpha_figure(sites, result.now, result.history),
            "Alpha against 1/std of the input, over sites and over training",
        ),
        "by_layer": (figures.profile_figure(result.measurement), "Measurements of each norm by layer"),
    }
    files: dict[str, bytes] = {}
    for name, (figure, title) in drawn.items():
        files |= {f"{name}.png": theme.png(figure), f"{name}.svg": _svg(figure, title, sites)}
    columns = [field.name for field in fields(SiteMeasurement) if field.name != "points"]
    files["sites.csv"] = _csv(columns, [vars(site) for site in sites])
    files["layers.csv"] = _csv(
        [field.name for field in fields(Gradient)], [asdict(each) for each in result.measurement.gradients]
    )
    files["alpha.csv"] = _csv(
        [field.name for field in fields(Moment)], [asdict(each) for each in result.history or result.now]
    )
    files["model.csv"] = _csv(
        ["quantity", "value"], [{"quantity": k, "value": v} for k, v in _numbers(result).items()]
    )
    return files


def _svg(figure: Figure, title: str, sites: Sequence[SiteMeasurement]) -> bytes:
    numbers = "; ".join(
        f"{site.name}: std {site.input_std:.3g}, alpha*std {site.alpha_std:.3g}" for site in sites
    )
    return theme.svg(figure, title, f"{title}. {numbers}.").encode()


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Floats with seven digits, as many as fp32 has; nothing for None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{v:.7g}" if isinstance(v, float) else v for key, v in row.items()})
    return text.getvalue().encode()


def _numbers(result: Probe) -> dict[str, float | int | None]:
    """The numbers of the whole model."""
    sites = result.measurement.sites
    over_time = _over_time(result)
    numbers: dict[str, float | int | None] = {
        "loss": result.measurement.loss,
        "logit_std": result.measurement.logit_std,
        "tokens": sites[0].tokens,
        "sites": len(sites),
        "straight_lines": _straight(sites),
    }
    for where, found in _over_sites(result).items():
        numbers |= {f"r_over_sites {where}": found.r, f"slope_over_sites {where}": found.slope}
    if over_time:
        numbers |= {
            "r_over_training median": statistics.median(each.r for each in over_time),
            "slope_over_training median": statistics.median(each.slope for each in over_time),
        }
    return numbers


def _straight(sites: Sequence[SiteMeasurement]) -> int:
    return sum(is_straight(1 - site.line_r2, site.saturated) for site in sites)


def _over_sites(result: Probe) -> dict[str, Relation]:
    """Of all sites, and of those of each place that has several."""
    groups = {"all": result.now}
    for moment in result.now:
        groups.setdefault(moment.place, []).append(moment)
    return {where: found for where, each in groups.items() if (found := history.relation(each)) is not None}


def _over_time(result: Probe) -> list[Relation]:
    """Of each site whose history is long enough."""
    lines = history.by_site(result.history).values()
    return [found for line in lines if (found := history.relation(line)) is not None]


# --- summary ---------------------------------------------------------------------------------------------


def summary(result: Probe, output: Path) -> str:
    """What the terminal shows."""
    measurement = result.measurement
    kinds = sorted(
        {
            site.kind if site.function in (None, "tanh") else f"{site.kind} ({site.function})"
            for site in measurement.sites
        }
    )
    lines = [
        f"{len(measurement.sites)} sites, {', '.join(kinds)}; {measurement.sites[0].tokens} tokens, loss "
        f"{measurement.loss:.4f} nats, logits' std {measurement.logit_std:.3g}",
        f"{'norm':<32} {'std':>8} {'kurtosis':>8} {'α·std':>7} {'saturated':>9} "
        f"{'1−R² tanh':>9} {'1−R² line':>9}",
    ]
    lines += [
        f"{_where(site):<32} {site.input_std:8.3g} {site.kurtosis:8.3g} {site.alpha_std:7.3g} "
        f"{site.saturated:9.2%} {1 - site.tanh_r2:9.2%} {1 - site.line_r2:9.2%}"
        for site in measurement.sites
    ]
    if any(site.alpha is None for site in measurement.sites):
        lines.append("α: of the γ·tanh(α·x) that is nearest to the norm without its weight")
    lines.append(
        f"a straight line (1−R² below {STRAIGHT:.0%}, saturated below {RARE:.1%}) at "
        f"{_straight(measurement.sites)} of {len(measurement.sites)} sites"
    )
    lines += [
        f"log α against log 1/std over sites, {where}: r {found.r:.2f}, slope {found.slope:.2f}"
        for where, found in _over_sites(result).items()
    ]
    over_time = _over_time(result)
    if over_time:
        r, slope = ([getattr(each, name) for each in over_time] for name in ("r", "slope"))
        lines.append(
            f"over training, by {result.history_from}: r {min(r):.2f} to {max(r):.2f}, slope "
            f"{min(slope):.2f} to {max(slope):.2f}"
        )
    return "\n".join(
        [*lines, f"wrote {output}: figures as PNG and SVG, sites.csv, layers.csv, alpha.csv, model.csv"]
    )


def _where(site: SiteMeasurement) -> str:
    return site.place if site.layer is None else f"{site.place} {site.layer}"
