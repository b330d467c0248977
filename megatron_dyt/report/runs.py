"""A run's directory as data, and the numbers that compare runs.

A directory holds `train.log` (Megatron's stdout), `eval.json` (written by
`megatron-dyt eval`), for a DyT run `checkpoint/dyt_stats.jsonl`
(with pipeline parallelism one `dyt_stats.stageN.jsonl` a stage), and optionally
`run.json` with any of `command`, `learning_rate`, `sequence_length` and `seconds`.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_dyt.errors import UserError
from megatron_dyt.report.logs import RunLog, StatsRecord, read_log, read_stats, read_text

METRICS = (
    "valid_loss",
    "bits_per_byte",
    "next_line_acc",
    "seconds_per_step",
    "tokens",
    "learning_rate",
)
RESERVED = ("elapsed_seconds", "versions", "commands", "step_time_ratio")
# Which task and lm-eval metric of eval.json each evaluated number is.
_EVAL_METRICS = {
    "bits_per_byte": ("dyt_bits_per_byte", "bits_per_byte"),
    "next_line_acc": ("dyt_next_line", "acc"),
}
_PACKAGES = ("megatron-dyt", "megatron-core", "torch", "triton", "numpy", "lm-eval")


@dataclass(frozen=True)
class Run:
    """One run. `evaluation` and `info` are eval.json and run.json, empty where there is none."""

    name: str
    directory: Path
    log: RunLog
    evaluation: dict[str, Any]
    stats: tuple[StatsRecord, ...]
    info: dict[str, Any]

    @property
    def tokens_per_sample(self) -> int:
        """Sequence length, from the log or run.json. UserError if neither has it."""
        length = self.log.sequence_length or self.info.get("sequence_length")
        if not isinstance(length, int) or length <= 0:
            raise UserError(
                f"{self.directory / 'train.log'} has no `seq_length` among the arguments that "
                'Megatron prints at start; keep the whole log, or put {"sequence_length": N} into '
                f"{self.directory / 'run.json'}"
            )
        return length

    @property
    def evaluated_iteration(self) -> int | None:
        """The iteration of the checkpoint that eval.json is about, if it says so."""
        checkpoint = self.evaluation.get("checkpoint")
        at = checkpoint.get("iteration") if isinstance(checkpoint, dict) else None
        return at if isinstance(at, int) else None

    def steady_steps(self) -> list[tuple[int, float]]:
        """(iteration, seconds a step) of each log line past the warm-up.

        Warm-up is the first tenth of the lines and at least two: Megatron logs the first iteration
        alone and counts its start-up cost again in the second line. A shorter log counts whole.
        """
        points = self.log.points
        steps = [(p.iteration, p.seconds) for p in points if math.isfinite(p.seconds)]
        return steps[max(2, len(steps) // 10) :] or steps


def load_run(
    name: str,
    directory: Path,
    *,
    allow_missing_eval: bool = False,
    allow_missing_stats: bool = False,
) -> Run:
    """Read the directory of a run.

    Raises:
        UserError: a file is missing or unreadable; the message says which command writes it.
    """
    if not directory.is_dir():
        raise UserError(
            f"--run {name}={directory}: {directory} is no directory; give the one that holds "
            "train.log and eval.json"
        )
    log_path, eval_path = directory / "train.log", directory / "eval.json"
    if not log_path.is_file():
        raise UserError(
            f"{log_path} is missing; write it with `torchrun --nproc-per-node 1 -m "
            f"megatron_dyt.pretrain ... --save {directory / 'checkpoint'} | tee {log_path}`"
        )
    log = read_log(log_path)
    if not eval_path.is_file() and not allow_missing_eval:
        raise UserError(
            f"{eval_path} is missing; write it with `megatron-dyt eval --load "
            f"{directory / 'checkpoint'} --tasks {','.join(t for t, _ in _EVAL_METRICS.values())} "
            f"--output {eval_path}`, or pass --allow-missing-eval to report without it"
        )
    return Run(
        name=name,
        directory=directory,
        log=log,
        evaluation=_read_evaluation(eval_path),
        stats=_load_stats(directory, log, allow_missing_stats),
        info=_read_object(directory / "run.json"),
    )


def metrics(run: Run, *, allow_missing_eval: bool = False) -> dict[str, float | int | None]:
    """The numbers of `METRICS`: nats per token, bits, share, seconds, tokens, peak learning rate.

    None stands for a value that is not finite (a run that diverged) or, where allowed, for one that
    was not evaluated.
    """
    log = run.log
    if not log.validation:
        raise UserError(
            f"{run.directory / 'train.log'} has no validation loss; train with validation data "
            "(--valid-data-path or --split), --eval-interval and --eval-iters > 0"
        )
    steady = [seconds for _, seconds in run.steady_steps()]
    numbers: dict[str, float | int | None] = {"valid_loss": _finite(log.validation[-1].loss)}
    for key in _EVAL_METRICS:
        numbers[key] = _evaluated(run, key, allow_missing_eval)
    numbers["seconds_per_step"] = _finite(statistics.median(steady)) if steady else None
    numbers["tokens"] = log.points[-1].consumed_samples * run.tokens_per_sample
    numbers["learning_rate"] = _learning_rate(run)
    return numbers


def summarize(
    runs: Sequence[Run], *, elapsed_seconds: float | None = None, allow_missing_eval: bool = False
) -> dict[str, Any]:
    """The content of results.json: `metrics` of each run by name, and the `RESERVED` keys.

    `step_time_ratio` is the second run's seconds per step over the first's, None for one run.
    """
    results: dict[str, Any] = {run.name: metrics(run, allow_missing_eval=allow_missing_eval) for run in runs}
    steps = [results[run.name]["seconds_per_step"] for run in runs]
    results["elapsed_seconds"] = (
        sum(_elapsed(run) for run in runs) if elapsed_seconds is None else elapsed_seconds
    )
    results["step_time_ratio"] = steps[1] / steps[0] if len(steps) > 1 and all(steps[:2]) else None
    results["versions"] = _versions(runs)
    results["commands"] = {run.name: _commands(run) for run in runs}
    return results


def evaluation_rows(runs: Iterable[Run]) -> dict[tuple[str, str], dict[str, float]]:
    """All finite numbers of eval.json: {(task, metric): {run name: value}}, without error bars."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for run in runs:
        for task, values in run.evaluation.get("results", {}).items():
            for key, value in values.items():
                metric = key.removesuffix(",none")
                if _is_number(value) and "_stderr" not in metric:
                    rows.setdefault((task, metric), {})[run.name] = float(value)
    return rows


def _load_stats(directory: Path, log: RunLog, allow_missing: bool) -> tuple[StatsRecord, ...]:
    path = directory / "checkpoint" / "dyt_stats.jsonl"
    files = sorted(
        [*path.parent.glob("dyt_stats.stage*.jsonl"), *path.parent.glob(path.name)],
        key=lambda file: file.stat().st_mtime,
    )
    if files:
        _check_stages(path, files, log)
        return read_stats(*files)
    if log.arguments.get("normalization") == "DyT" and not allow_missing:
        raise UserError(
            f"{path} is missing; `python -m megatron_dyt.pretrain --normalization DyT "
            f"--dyt-stats-interval N --save {directory / 'checkpoint'} ...` writes it, or pass "
            "--allow-missing-stats to report without it"
        )
    return ()


def _check_stages(path: Path, files: Sequence[Path], log: RunLog) -> None:
    """Each pipeline stage has written a file; without one of them layers would be missing unnoticed."""
    count = log.arguments.get("pipeline_model_parallel_size", "1")
    stages = int(count) if count.isdigit() else 1
    wanted = [path.with_name(f"dyt_stats.stage{stage}.jsonl") for stage in range(stages)]
    missing = [file.name for file in wanted if file not in files]
    if stages > 1 and missing:
        raise UserError(
            f"{path.parent} lacks {', '.join(missing)} of a run with {stages} pipeline stages; copy the "
            "files of all stages there (every stage's first rank writes one)"
        )


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data = json.loads(read_text(path, "give a JSON file"))
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}); write it again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a JSON {type(data).__name__}; a JSON object is needed")
    return data


def _read_evaluation(path: Path) -> dict[str, Any]:
    data = _read_object(path)
    results = data.get("results", {})
    if not isinstance(results, dict) or not all(isinstance(v, dict) for v in results.values()):
        raise UserError(
            f"{path}: 'results' must be {{task: {{metric: value}}}} as "
            "`megatron-dyt eval` writes it; run the evaluation again"
        )
    return data


def _evaluated(run: Run, key: str, allow_missing: bool) -> float | None:
    task, metric = _EVAL_METRICS[key]
    values = run.evaluation.get("results", {}).get(task, {})
    for name in (f"{metric},none", metric):
        if _is_number(values.get(name)):
            return float(values[name])
    if allow_missing:
        return None
    found = ", ".join(sorted(run.evaluation.get("results", {}))) or "none"
    raise UserError(
        f"{run.directory / 'eval.json'} has no {metric!r} of task {task!r} (tasks in it: {found}); "
        f"run `megatron-dyt eval --load {run.directory / 'checkpoint'} "
        f"--tasks {task} ...` again, or pass --allow-missing-eval to report without it"
    )


def _learning_rate(run: Run) -> float | None:
    """The peak: what run.json or Megatron's arguments say, else the largest one logged."""
    sources: tuple[Any, ...] = (run.info.get("learning_rate"), run.log.arguments.get("lr"))
    for stated in sources:
        try:
            return _finite(float(stated))
        except (TypeError, ValueError):
            continue
    return max((lr for lr in run.log.learning_rates if math.isfinite(lr)), default=None)


def _elapsed(run: Run) -> float:
    """Seconds of training and evaluation; without run.json, training is summed from the log."""
    train: Any = run.info.get("seconds")
    if not _is_number(train):
        points = run.log.points
        before = [0, *(point.iteration for point in points[:-1])]
        spans = [
            (point.iteration - start) * point.seconds for start, point in zip(before, points, strict=True)
        ]
        train = sum(span for span in spans if math.isfinite(span))
    evaluation: Any = run.evaluation.get("seconds", 0.0)
    return float(train) + (float(evaluation) if _is_number(evaluation) else 0.0)


def _versions(runs: Iterable[Run]) -> dict[str, str]:
    """What the evaluations recorded, all values where they differ; for the rest what is here."""
    recorded: dict[str, list[str]] = {}
    for run in runs:
        versions = run.evaluation.get("versions")
        for name, value in versions.items() if isinstance(versions, dict) else ():
            values = recorded.setdefault(name.replace("_", "-"), [])
            if str(value) not in values:
                values.append(str(value))
    here = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            here[package] = version(package)
    return here | {name: " / ".join(values) for name, values in recorded.items()}


def _commands(run: Run) -> dict[str, str]:
    stated = {"train": run.info.get("command"), "evaluate": run.evaluation.get("command")}
    return {
        step: " ".join(map(str, command)) if isinstance(command, list) else str(command)
        for step, command in stated.items()
        if command
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
