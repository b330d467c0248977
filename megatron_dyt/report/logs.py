"""Read what a run leaves behind: Megatron's stdout, and the DyT statistics of `monitor.py`.

The formats are those of `megatron/training/training.py` (`training_log`,
`evaluate_and_print_results`) and `arguments.py` (`_print_args`) of megatron-core 0.19.2.
Both readers accept the files of a run that was stopped and resumed: where the iteration number goes
back, the points from there on belong to the abandoned part and are dropped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dyt.errors import UserError

# `number of nan iterations` closes a line; without it the line was cut off and its numbers are
# not to be trusted.
_TRAIN = re.compile(r"\biteration +(\d+)/ *(\d+) \|(.*number of nan iterations: +\d+ \|)")
_FIELD = re.compile(r" *([^|:]+): +([^| ]+) +\|")
_VALID = re.compile(
    r"\bvalidation(?:-(?P<set>\S+))? loss at iteration (?P<iteration>\d+)"
    r"(?: on (?P<split>validation|test) set)? \| (?P<fields>.*)"
)
_VALID_LOSS = re.compile(r"lm loss value: +(\S+) \|")
_ARGUMENT = re.compile(r"^(?:\[\w+\]:)? {2}(\w+) \.* (.*)$")
_ARGUMENTS_BEGIN = re.compile(r"-{5,} arguments -{5,}")
_ARGUMENTS_END = re.compile(r"-{5,} end of arguments -{5,}")


@dataclass(frozen=True)
class TrainPoint:
    """One training line: means since the line before; what the line lacks is nan.

    `seconds` is the time of one step; `learning_rate` is that of the iteration itself.
    """

    iteration: int
    consumed_samples: int
    seconds: float
    learning_rate: float
    global_batch_size: int
    loss: float
    grad_norm: float
    skipped: int
    nan: int


@dataclass(frozen=True)
class ValidationPoint:
    """Validation loss in nats per token; the mean over the sets where there are several."""

    iteration: int
    loss: float


@dataclass(frozen=True)
class RunLog:
    """A run's log in the order of iterations. The tuples over training lines have one length."""

    points: tuple[TrainPoint, ...]
    validation: tuple[ValidationPoint, ...]
    test_loss: float | None
    train_iterations: int
    arguments: dict[str, str]

    @property
    def iterations(self) -> tuple[int, ...]:
        return tuple(point.iteration for point in self.points)

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(point.loss for point in self.points)

    @property
    def learning_rates(self) -> tuple[float, ...]:
        return tuple(point.learning_rate for point in self.points)

    @property
    def step_seconds(self) -> tuple[float, ...]:
        return tuple(point.seconds for point in self.points)

    @property
    def grad_norms(self) -> tuple[float, ...]:
        return tuple(point.grad_norm for point in self.points)

    @property
    def skipped(self) -> tuple[int, int]:
        """Iterations skipped by the optimizer, and iterations whose loss was nan."""
        # The first line's counts are contained in the second's: Megatron does not reset them.
        counted = self.points[1:] or self.points
        return sum(p.skipped for p in counted), sum(p.nan for p in counted)

    @property
    def global_batch_size(self) -> int:
        return self.points[-1].global_batch_size

    @property
    def sequence_length(self) -> int | None:
        """Tokens a sample, from the arguments that Megatron prints at start; None without them."""
        text = self.arguments.get("seq_length", "")
        return int(text) if text.isdigit() else None


def parse_log(lines: Iterable[str]) -> RunLog | None:
    """The `RunLog` of `lines`, None if they hold no complete training line.

    Lines of other kinds, also ones mixed into a line's start or end, are passed over.
    """
    points: dict[int, TrainPoint] = {}
    validation: dict[int, dict[str, float]] = {}
    test_loss: float | None = None
    arguments: dict[str, str] = {}
    total, in_arguments = 0, False
    for line in lines:
        if match := _TRAIN.search(line):
            iteration, total = int(match[1]), int(match[2])
            if points and iteration <= next(reversed(points)):
                _drop_from(points, iteration)
                _drop_from(validation, iteration)
            points[iteration] = _train_point(iteration, match[3])
        elif (match := _VALID.search(line)) and (value := _VALID_LOSS.search(match["fields"])):
            loss = _number(value[1])
            if match["split"] == "test":
                test_loss = loss
            else:
                sets = validation.setdefault(int(match["iteration"]), {})
                sets[match["set"] or ""] = loss
        elif _ARGUMENTS_END.search(line):
            in_arguments = False
        elif _ARGUMENTS_BEGIN.search(line):
            in_arguments = True
        elif in_arguments and (match := _ARGUMENT.match(line)):
            arguments[match[1]] = match[2].strip()
    if not points:
        return None
    means = sorted((at, sum(sets.values()) / len(sets)) for at, sets in validation.items())
    return RunLog(
        points=tuple(points.values()),
        validation=tuple(ValidationPoint(*item) for item in means),
        test_loss=test_loss,
        train_iterations=total,
        arguments=arguments,
    )


def read_log(path: Path) -> RunLog:
    """Parse the log file at `path`.

    Raises:
        UserError: there is no such file, or it holds no complete training line.
    """
    log = parse_log(read_text(path, "write it with `torchrun ... | tee FILE`").splitlines())
    if log is None:
        raise UserError(
            f"{path} holds no training line of Megatron (`iteration N/ M | consumed samples: "
            "...`): the run stopped before its first logged step, or the file is not the log of "
            "the last rank; look at its end, or train again with a smaller --log-interval"
        )
    return log


@dataclass(frozen=True)
class SiteStats:
    """One norm site at one iteration.

    `layer` counts from 1, `saturated` is the share of inputs with |alpha x| > 2.
    """

    name: str
    role: str
    layer: int
    alpha: float
    input_std: float
    alpha_std: float
    saturated: float


@dataclass(frozen=True)
class StatsRecord:
    """All sites at one iteration; `embedding_scale` is None for a model without one."""

    iteration: int
    sites: tuple[SiteStats, ...]
    embedding_scale: float | None


def read_stats(*paths: Path) -> tuple[StatsRecord, ...]:
    """The records of a run's statistics in the order of iterations.

    A line that is no complete record (a run killed while it wrote) is passed over.

    Args:
        paths: `dyt_stats.jsonl`, or the files of all pipeline stages, the oldest first. Iterations that
            one of them lacks are left out.

    Raises:
        UserError: a file is not there, or no iteration is complete.
    """
    merged: dict[int, dict[str, Any]] = {}
    for path in paths:
        for iteration, record in _stats_lines(path).items():
            whole = merged.setdefault(iteration, {"iteration": iteration, "sites": {}})
            whole["sites"] |= {site["name"]: site for site in record["sites"]}
            if record.get("embedding_scale") is not None:
                whole["embedding_scale"] = record["embedding_scale"]
    names = {name for record in merged.values() for name in record["sites"]}
    complete = [record for _, record in sorted(merged.items()) if record["sites"].keys() == names]
    if not complete:
        files = ", ".join(map(str, paths))
        raise UserError(f"{files}: no complete record of DyT statistics; {_STATS_HINT}")
    return tuple(_merged_record(record) for record in complete)


_STATS_HINT = "a DyT run writes it beside its checkpoint (--save, --dyt-stats-interval)"


def _stats_lines(path: Path) -> dict[int, dict[str, Any]]:
    """The complete lines of one file, without the abandoned part of a run that was resumed."""
    records: dict[int, dict[str, Any]] = {}
    for line in read_text(path, _STATS_HINT).splitlines():
        record = _stats_record(line)
        if record is None:
            continue
        if records and record.iteration <= next(reversed(records)):
            _drop_from(records, record.iteration)
        records[record.iteration] = json.loads(line)
    return records


def _merged_record(record: dict[str, Any]) -> StatsRecord:
    """Sites of all stages in the order of layers; the final norm, which has none, is the last."""
    sites = list(record["sites"].values())
    sites.sort(key=lambda site: math.inf if site["layer"] is None else site["layer"])
    whole = _stats_record(json.dumps(record | {"sites": sites}))
    assert whole is not None, record
    return whole


def read_text(path: Path, hint: str) -> str:
    """The text of `path`, whatever its encoding; UserError that ends in `hint` if it is no file."""
    if not path.is_file():
        raise UserError(f"{path} is missing or no file; {hint}")
    return path.read_text(encoding="utf-8", errors="replace")


def _train_point(iteration: int, text: str) -> TrainPoint:
    fields = {name.strip(): _number(value) for name, value in _FIELD.findall(text)}
    return TrainPoint(
        iteration=iteration,
        consumed_samples=_count(fields, "consumed samples"),
        seconds=fields.get("elapsed time per iteration (ms)", math.nan) / 1000,
        learning_rate=fields.get("learning rate", math.nan),
        global_batch_size=_count(fields, "global batch size"),
        loss=fields.get("lm loss", math.nan),
        grad_norm=fields.get("grad norm", math.nan),
        skipped=_count(fields, "number of skipped iterations"),
        nan=_count(fields, "number of nan iterations"),
    )


def _count(fields: dict[str, float], name: str) -> int:
    value = fields.get(name, 0.0)
    return int(value) if math.isfinite(value) else 0


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _drop_from(points: dict[int, Any], iteration: int) -> None:
    for late in [key for key in points if key >= iteration]:
        del points[late]


def _stats_record(line: str) -> StatsRecord | None:
    try:
        data = json.loads(line)
        scale = data.get("embedding_scale")
        # The final norm belongs to no layer (null); it stands after the last one.
        last = max((site["layer"] for site in data["sites"] if site["layer"] is not None), default=0)
        return StatsRecord(
            iteration=int(data["iteration"]),
            sites=tuple(_site_stats(site, last) for site in data["sites"]),
            embedding_scale=None if scale is None else float(scale),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _site_stats(site: dict[str, Any], last_layer: int) -> SiteStats:
    return SiteStats(
        name=str(site["name"]),
        role=str(site["role"]),
        layer=int(last_layer if site["layer"] is None else site["layer"]),
        alpha=float(site["alpha"]),
        input_std=float(site["input_std"]),
        alpha_std=float(site["alpha_std"]),
        saturated=float(site["saturated"]),
    )
