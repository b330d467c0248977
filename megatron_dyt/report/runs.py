"""A run's directory as data, and the numbers that compare runs.

A directory holds `checkpoint/` (what training was given as --save) with `metrics.jsonl` and, for a DyT run,
`dyt_stats.jsonl`; `eval.json`, written by `megatron-dyt eval`; and optionally `run.json` with any of
`command`, `learning_rate` and `seconds`.
"""

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
from megatron_dyt.report import dyt_stats, metrics
from megatron_dyt.report.dyt_stats import StatsRecord
from megatron_dyt.report.metrics import RunMetrics

# The numbers of a run in results.json.
NUMBERS = (
    "valid_loss",
    "bits_per_byte",
    "next_line_acc",
    "seconds_per_step",
    "tokens",
    "learning_rate",
)
# Its other keys, which no run may be called.
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
    metrics: RunMetrics
    evaluation: dict[str, Any]
    stats: tuple[StatsRecord, ...]
    info: dict[str, Any]

    @property
    def last_iteration(self) -> int:
        """The last step that was logged."""
        return self.metrics.steps[-1].iteration

    @property
    def evaluated_iteration(self) -> int | None:
        """The iteration of the checkpoint that eval.json is about, if it says so."""
        checkpoint = self.evaluation.get("checkpoint")
        at = checkpoint.get("iteration") if isinstance(checkpoint, dict) else None
        return at if isinstance(at, int) else None

    def steady_steps(self) -> list[tuple[int, float]]:
        """(iteration, seconds per step) of each line past the warm-up.

        Warm-up is the first tenth of the lines and at least one: the first line is the first step alone,
        with all that is set up in it. A shorter run counts whole.
        """
        steps = [(s.iteration, s.seconds) for s in self.metrics.steps if math.isfinite(s.seconds)]
        return steps[max(1, len(steps) // 10) :] or steps


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
            f"checkpoint/{metrics.FILE_NAME} and eval.json"
        )
    found = metrics.read(metrics.find(directory))
    if not found.steps:
        raise UserError(f"{found.path} has evaluations and no training step; train first")
    eval_path = directory / "eval.json"
    if not eval_path.is_file() and not allow_missing_eval:
        raise UserError(
            f"{eval_path} is missing; write it with `megatron-dyt eval --load "
            f"{_checkpoints(directory)} --tasks {','.join(t for t, _ in _EVAL_METRICS.values())} "
            f"--output {eval_path}`, or pass --allow-missing-eval to report without it"
        )
    return Run(
        name=name,
        directory=directory,
        metrics=found,
        evaluation=_read_evaluation(eval_path),
        stats=_load_stats(directory, found, allow_missing_stats),
        info=_read_object(directory / "run.json"),
    )


def numbers(run: Run, *, allow_missing_eval: bool = False) -> dict[str, float | int | None]:
    """The numbers of `NUMBERS`: nats per token, bits, share, seconds, tokens, peak learning rate.

    None stands for a value that is not finite (a run that diverged) or, where allowed, for one that
    was not evaluated.
    """
    if not run.metrics.validation:
        raise UserError(
            f"{run.metrics.path} has no validation loss; train with validation data "
            "(--valid-data-path or --split), --eval-interval and --eval-iters > 0"
        )
    steady = [seconds for _, seconds in run.steady_steps()]
    return {
        "valid_loss": _finite(run.metrics.validation[-1][1]),
        **{key: _evaluated(run, key, allow_missing_eval) for key in _EVAL_METRICS},
        "seconds_per_step": statistics.median(steady) if steady else None,
        "tokens": run.metrics.steps[-1].consumed_tokens,
        "learning_rate": _learning_rate(run),
    }


def summarize(
    runs: Sequence[Run], *, elapsed_seconds: float | None = None, allow_missing_eval: bool = False
) -> dict[str, Any]:
    """The content of results.json: `numbers` of each run by name, and the `RESERVED` keys.

    `step_time_ratio` is the second run's seconds per step over the first's, None for one run.
    """
    results: dict[str, Any] = {run.name: numbers(run, allow_missing_eval=allow_missing_eval) for run in runs}
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


def _checkpoints(directory: Path) -> Path:
    """What training had as --save: `checkpoint/` in the directory, or this itself where that is not there."""
    inside = directory / "checkpoint"
    return inside if inside.is_dir() else directory


def _load_stats(directory: Path, run: RunMetrics, allow_missing: bool) -> tuple[StatsRecord, ...]:
    """The statistics beside the metrics, or beside the checkpoints where --metrics-dir took those away."""
    stages = int(run.arguments.get("pipeline_model_parallel_size", 1))
    saved = _checkpoints(directory)
    if files := dyt_stats.find(run.path.parent, stages) or dyt_stats.find(saved, stages):
        return dyt_stats.read(files)
    if run.arguments.get("normalization") == "DyT" and not allow_missing:
        raise UserError(
            f"{saved / dyt_stats.FILE_NAME} is missing; {dyt_stats.HOW_TO_WRITE}; or pass "
            "--allow-missing-stats to report without it"
        )
    return ()


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
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
        f"run `megatron-dyt eval --load {_checkpoints(run.directory)} "
        f"--tasks {task} ...` again, or pass --allow-missing-eval to report without it"
    )


def _learning_rate(run: Run) -> float | None:
    """The peak: what run.json or Megatron's arguments say, else the largest one logged."""
    sources: tuple[Any, ...] = (run.info.get("learning_rate"), run.metrics.arguments.get("lr"))
    for stated in sources:
        try:
            return _finite(float(stated))
        except (TypeError, ValueError):
            continue
    return max((s.learning_rate for s in run.metrics.steps if math.isfinite(s.learning_rate)), default=None)


def _elapsed(run: Run) -> float:
    """Seconds of training and evaluation; without run.json, training is the sum of its steps."""
    train: Any = run.info.get("seconds")
    if not _is_number(train):
        train = run.metrics.train_seconds
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
