"""`metrics.jsonl`: what Megatron logs of a training run, one JSON object per line, for any norm.

The last rank writes it, which is the one that prints Megatron's log lines and has the losses. All numbers
are ones that Megatron has just reduced and read for its own line, so the device is not made to wait once
more. docs/metrics.md describes the fields; `report/metrics.py` reads them.
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dyt import compat
from megatron_dyt.mcore.json_lines import JsonLines
from megatron_dyt.patching import bound, wrapper
from megatron_dyt.version import __version__

FILE_NAME = "metrics.jsonl"
# The timer of the steps since the last log line; Megatron stops it during evaluations and saves.
_STEP_TIMER = "interval-time"
# What Megatron counts in the dictionary in which it sums up losses.
_COUNTS = ("advanced iterations", "skipped iterations", "nan iterations")


@dataclass(frozen=True)
class Sums:
    """Sums over the steps since Megatron last started to count from zero.

    `losses` are over the `advanced` steps, which applied an update; `advanced` + `skipped` are all steps.
    """

    seconds: float
    advanced: int
    skipped: int
    nan: int
    losses: dict[str, float]

    @property
    def steps(self) -> int:
        return self.advanced + self.skipped

    def without(self, earlier: Sums) -> Sums:
        """These sums without `earlier` ones that are contained in them."""
        return Sums(
            self.seconds - earlier.seconds,
            self.advanced - earlier.advanced,
            self.skipped - earlier.skipped,
            self.nan - earlier.nan,
            {name: value - earlier.losses.get(name, 0.0) for name, value in self.losses.items()},
        )


_NOTHING = Sums(0.0, 0, 0, 0, {})


class MetricsWriter:
    """Writes one run's file.

    Args:
        path: the file, which is appended to.
        args: Megatron's validated arguments, after a checkpoint was loaded.
    """

    def __init__(self, path: Path, args: Namespace) -> None:
        # --skip-train evaluates a checkpoint, which may be an earlier one: no step is done again.
        self.file = JsonLines(path, sys.maxsize if getattr(args, "skip_train", False) else args.iteration)
        self.args = args
        # The dictionary of sums that Megatron's `training_log` works on, while it runs.
        self.running: dict[str, Any] | None = None
        # (seconds, whether Megatron sets the sums to zero now, the sums), where a line was logged.
        self.interval: tuple[float, bool, dict[str, Any]] | None = None
        # In the sums, and in a line of their own: Megatron logs a run's first step and goes on summing.
        self.in_earlier_line = _NOTHING
        # Losses of the evaluation that is running, one dictionary per validation set.
        self.evaluated: list[dict[str, torch.Tensor]] = []

    def end_of_interval(self, seconds: float, reset: bool) -> None:
        """Megatron has read the step timer: the sums are complete, and not set back to zero yet."""
        if self.running is not None:
            self.interval = seconds, reset, dict(self.running)

    def write_step(self, step: dict[str, Any]) -> None:
        """A line for the step that `training_log` was called with, if it logged one.

        Args:
            step: the arguments of `training_log` by name.
        """
        interval, self.interval = self.interval, None
        if interval is None:
            return
        seconds, reset, totals = interval
        since_reset = _sums(seconds, totals)
        sums = since_reset.without(self.in_earlier_line)
        self.in_earlier_line = _NOTHING if reset else since_reset
        per_step = sums.seconds / max(1, sums.steps)
        batch = _global_batch_size()
        samples = self.args.consumed_train_samples
        record = {
            "event": "train",
            "iteration": step["iteration"],
            "steps": sums.steps,
            "consumed_samples": samples,
            "consumed_tokens": samples * self.args.seq_length,
            "global_batch_size": batch,
            "losses": _means(sums, step["loss_dict"]),
            "skipped_steps": sums.skipped,
            "nan_steps": sums.nan,
            "seconds_per_step": _number(per_step),
            "tokens_per_second": _number(batch * self.args.seq_length / per_step) if per_step > 0 else None,
        }
        record |= {name: _number(step[name]) for name in _OF_THE_STEP if step.get(name) is not None}
        self.write(record)

    def write_evaluation(self, iteration: int, prefix: str) -> None:
        """A line per validation set (or test set) that was evaluated."""
        evaluated = self.evaluated
        names = getattr(self.args, "validation_set_names", None) or range(len(evaluated))
        several = getattr(self.args, "multiple_validation_sets", False)
        for name, losses in zip(names, evaluated, strict=False):
            self.write(
                {
                    # Megatron tells the final test from a validation by this text alone.
                    "event": "test" if prefix.endswith("on test set") else "validation",
                    "iteration": iteration,
                    "set": str(name) if several else None,
                    "losses": {key: _number(value) for key, value in losses.items()},
                }
            )

    def write(self, record: dict[str, Any]) -> None:
        """Append a line; the first one of a process comes after a line that describes the run."""
        self.file.append(*([record] if self.file.started else [self._start(), record]))

    def _start(self) -> dict[str, Any]:
        return {
            "event": "start",
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "megatron_dyt": __version__,
            "megatron_core": compat.megatron_build(),
            "torch": torch.__version__,
            "normalization": self.args.normalization,
            "arguments": {name: value for name, value in sorted(vars(self.args).items()) if _is_plain(value)},
        }


# Arguments of `training_log` that are fields too; left out where Megatron has none.
_OF_THE_STEP = ("learning_rate", "grad_norm", "num_zeros_in_grad", "params_norm", "loss_scale")


def _sums(seconds: float, totals: dict[str, Any]) -> Sums:
    advanced, skipped, nan = (int(totals.get(name, 0)) for name in _COUNTS)
    losses = {name: float(value) for name, value in totals.items() if name not in _COUNTS}
    return Sums(seconds, advanced, skipped, nan, losses)


def _means(sums: Sums, of_last_step: dict[str, Any]) -> dict[str, float | None]:
    """Each loss's mean over the steps that were not skipped; nothing where all were."""
    if sums.advanced == 0:
        return {}
    means = {name: _number(total / sums.advanced) for name, total in sums.losses.items()}
    if sums.steps == 1:
        # Of one step it is the loss itself, free of the rounding of a difference of sums.
        means |= {name: _number(value) for name, value in of_last_step.items()}
    return means


def _number(value: Any) -> float | None:
    """JSON has no word for a number that is not finite: None."""
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def _is_plain(value: Any) -> bool:
    """Whether JSON can say `value`: no class, function or object, and no infinity."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)


def _global_batch_size() -> int:
    from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size

    return int(get_current_running_global_batch_size())


_active: MetricsWriter | None = None


@wrapper
def wrap_setup(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`training.setup_model_and_optimizer`, after which a run's metrics are written."""
    global _active
    result = original(*args, **kwargs)
    _active = _writer()
    return result


def _writer() -> MetricsWriter | None:
    from megatron.training import get_args

    args = get_args()
    directory = getattr(args, "metrics_dir", None) or args.save  # The flag is absent with --yaml-cfg.
    # Checkpoints may be in an object store ("msc://..."), to which nothing can be appended.
    if not directory or "://" in directory or dist.get_rank() != dist.get_world_size() - 1:
        return None
    return MetricsWriter(Path(directory) / FILE_NAME, args)


@wrapper
def wrap_training_log(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`training.training_log`, called once per step, whose numbers are written where it logs them."""
    if _active is None:
        return original(*args, **kwargs)
    step = bound(original, *args, **kwargs).arguments
    _active.running = step["total_loss_dict"]
    try:
        result = original(*args, **kwargs)
    finally:
        _active.running = None
    _active.write_step(step)
    return result


@wrapper
def wrap_elapsed(
    original: Callable[..., float], self: Any, reset: bool = True, barrier: bool = False
) -> float:
    """`Timer.elapsed`: `training_log` reads the step timer when its sums are complete."""
    seconds = original(self, reset, barrier)
    if _active is not None and self.name == _STEP_TIMER:
        _active.end_of_interval(seconds, reset)
    return seconds


@wrapper
def wrap_evaluate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`training.evaluate`, whose losses are kept until Megatron has read them."""
    result = original(*args, **kwargs)
    if _active is not None and result[0] is not None:  # None: the time limit ended it.
        _active.evaluated.append(dict(result[0]))
    return result


@wrapper
def wrap_print_evaluation(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`training.evaluate_and_print_results`, which knows the iteration of an evaluation."""
    if _active is not None:
        _active.evaluated = []  # A script may have called `evaluate` by itself.
    result = original(*args, **kwargs)
    if _active is not None:
        given = bound(original, *args, **kwargs).arguments
        _active.write_evaluation(given["iteration"], given["prefix"])
    return result
