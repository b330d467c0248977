"""How a run ended, and its numbers: read from its directory, kept in `result.json`; with it a run is done."""

import math
import re
import shutil
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_dyt.atomic import read_json, write_json
from megatron_dyt.errors import UserError
from megatron_dyt.report import dyt_stats, metrics

RESULT_NAME = "result.json"
# The flags of a run that may go on from its checkpoints.
FLAGS_NAME = "flags.json"
LOG_NAME = "log.txt"
# The checkpoints of a run; they go when it has finished.
CHECKPOINT_NAME = "checkpoint"
Status = Literal["finished", "diverged", "failed"]

# Exit codes of Megatron's rerun state machine: a loss that is not finite again in a rerun, or no more so.
_NOT_FINITE_CODES = (16, 17)
# What a run's log says when it is stopped for values that are not finite: Megatron's check and our guard.
_NOT_FINITE = re.compile(r"found (NaN|Inf) in|not finite|made alpha <= 0 or not finite", re.IGNORECASE)
# The plugin's own last line of a run that it ends.
_LAST_WORDS = re.compile(r"megatron_dyt.*: (error|stopped|interrupted)")
_TAIL_LINES = 5
# The mean training loss of a run's end is over this share of its steps.
_END = 0.1


@dataclass(frozen=True)
class Site:
    """How the DyTs of one role work at the end: means over its sites of what `dyt_stats.jsonl` says."""

    alpha_std: float
    saturated: float


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        status: "finished"; "diverged", stopped for a value that is not finite or with such a loss at its end;
            "failed", ended by anything else.
        step: the last step that was logged.
        valid_loss, train_loss: nats per token; of the last evaluation, and the mean over the last tenth of
            the steps. None where there is none, or none that is finite.
        seconds_per_step: median over the logged steps without the first.
        tokens: consumed in training.
        seconds: wall time of the process.
        log_tail: of a run that did not finish, the end of its log.
        sites: {role: how its DyTs work}, of a DyT run with --dyt-stats-interval.
    """

    status: Status
    step: int
    valid_loss: float | None
    train_loss: float | None
    seconds_per_step: float | None
    tokens: int
    seconds: float
    log_tail: tuple[str, ...] = ()
    sites: dict[str, Site] = field(default_factory=dict)


NUMBERS = ("step", "valid_loss", "train_loss", "seconds_per_step", "tokens", "seconds")


def of(directory: Path, exit_code: int, seconds: float) -> Outcome:
    """The outcome of the run that has just ended in `directory`."""
    tail = _tail(directory / LOG_NAME)
    try:
        run = metrics.read(directory / metrics.FILE_NAME)
    except UserError:  # It ended before its first logged step.
        steps: Sequence[metrics.Step] = ()
        valid, arguments = None, {}
    else:
        steps = run.steps
        valid = run.validation[-1][1] if run.validation else None
        arguments = run.arguments
    status = _status(exit_code, steps, valid, tail, arguments)
    ended = f"ended by signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    times = [step.seconds for step in (steps[1:] or steps) if math.isfinite(step.seconds)]
    return Outcome(
        status=status,
        step=steps[-1].iteration if steps else 0,
        valid_loss=_finite(valid),
        train_loss=_finite(_end_loss(steps)),
        seconds_per_step=statistics.median(times) if times else None,
        tokens=steps[-1].consumed_tokens if steps else 0,
        seconds=round(seconds, 1),
        log_tail=() if status == "finished" else (*tail, ended),
        sites=_sites(directory),
    )


def _sites(directory: Path) -> dict[str, Site]:
    # The monitor writes beside checkpoints where there are any.
    places = (directory / CHECKPOINT_NAME, directory)
    files = next((found for place in places if (found := dyt_stats.find(place, 1))), [])
    try:
        record = dyt_stats.read(files)[-1]
    except UserError:  # It is no DyT run, or was asked for none.
        return {}
    by_role: dict[str, list[dyt_stats.SiteStats]] = {}
    for site in record.sites:
        by_role.setdefault(site.role, []).append(site)
    mean = statistics.fmean
    return {
        role: Site(mean(site.alpha_std for site in sites), mean(site.saturated for site in sites))
        for role, sites in by_role.items()
    }


def _status(
    exit_code: int,
    steps: Sequence[metrics.Step],
    valid: float | None,
    tail: Sequence[str],
    arguments: dict[str, Any],
) -> Status:
    if exit_code == 0 and not _reached_the_end(steps, arguments):
        return "failed"
    if exit_code == 0:
        # With the check switched off, Megatron trains on with values that are not finite.
        losses = [step.loss for step in _judged(steps)[-1:]] + ([] if valid is None else [valid])
        return (
            "finished" if losses and all(map(math.isfinite, losses)) else "diverged" if losses else "failed"
        )
    # A signal has another reason than the run's numbers.
    stopped = exit_code in _NOT_FINITE_CODES or (exit_code > 0 and any(map(_says_not_finite, tail)))
    return "diverged" if stopped else "failed"


def _reached_the_end(steps: Sequence[metrics.Step], arguments: dict[str, Any]) -> bool:
    """Whether a run that ended in good order was not told to end early (--exit-interval and the like)."""
    last = steps[-1].iteration if steps else 0
    return not steps or last > (arguments.get("train_iters") or 0) - (arguments.get("log_interval") or 1)


def _says_not_finite(line: str) -> bool:
    # After a warning the run goes on: of a step that is skipped, or an alpha that was to be reported alone.
    return _NOT_FINITE.search(line) is not None and "WARNING:" not in line


def _judged(steps: Sequence[metrics.Step]) -> Sequence[metrics.Step]:
    """The lines that say how the run does: not those whose steps were all skipped for a gradient alone, as
    fp16's loss scale does now and then; they have no loss."""
    return [step for step in steps if step.skipped < step.steps or step.nan]


def _end_loss(steps: Sequence[metrics.Step]) -> float | None:
    judged = _judged(steps)
    if not judged:
        return None
    first = steps[-1].iteration * (1 - _END)
    end = [step for step in judged if step.iteration > first] or judged[-1:]
    # A line's loss is the mean of the steps that were applied.
    applied = [step.steps - step.skipped for step in end]
    if not all(applied):
        return math.nan
    return sum(step.loss * count for step, count in zip(end, applied, strict=True)) / sum(applied)


def _tail(log: Path) -> list[str]:
    """The lines with which the plugin says why a run ended, else the last ones."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    written = [line.strip() for line in lines if line.strip()]
    said = [line for line in written if _LAST_WORDS.search(line) or _says_not_finite(line)]
    return (said or written)[-_TAIL_LINES:]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def save(directory: Path, outcome: Outcome, flags: Sequence[str], command: Sequence[str]) -> None:
    """Write `result.json`: from now on the run is done."""
    record = {"flags": list(flags), "command": list(command), **asdict(outcome)}
    write_json(directory / RESULT_NAME, record)


def keep_flags(directory: Path, flags: Sequence[str]) -> None:
    """Write `flags.json`: what is left of the run if it is cut off is not for a run with other flags."""
    write_json(directory / FLAGS_NAME, {"flags": list(flags)})


def clear(directory: Path) -> None:
    """Remove a run's checkpoints, but keep what its DyTs' statistics are."""
    for path in (directory / CHECKPOINT_NAME).glob("dyt_stats*.jsonl"):
        path.replace(directory / path.name)
    shutil.rmtree(directory / CHECKPOINT_NAME, ignore_errors=True)


def _difference(then: Sequence[str], now: Sequence[str]) -> str:
    """The flags, with their values, that are in one alone; or that the order is another."""
    old, new = (Counter(re.split(r" (?=--)", " ".join(words))) for words in (then, now))
    sides = {"then": old - new, "now": new - old}
    said = [f"{side} {' '.join(flags.elements())}" for side, flags in sides.items() if flags]
    return ", ".join(said) or "their order"


def load(directory: Path, flags: Sequence[str]) -> Outcome | None:
    """The outcome that is kept in `directory`, or None where the run is not done.

    Raises:
        UserError: it, or the part of a run that is there, is of other flags than `flags`.
    """
    record: Any = read_json(directory / RESULT_NAME)
    begun: Any = record or read_json(directory / FLAGS_NAME)
    if begun and begun["flags"] != list(flags):
        raise UserError(
            f"{directory} holds a run with other flags than the sweep file gives it now (they differ in: "
            f"{_difference(begun['flags'], flags)}); take another --output, or move that directory away"
        )
    if record is None:
        return None
    return Outcome(
        **{name: record[name] for name in ("status", *NUMBERS)},
        log_tail=tuple(record["log_tail"]),
        sites={role: Site(**site) for role, site in record.get("sites", {}).items()},
    )
