"""Reads `metrics.jsonl`, which `mcore/metrics_writer.py` writes: `read(path)` gives a run's numbers, typed.

docs/metrics.md describes the fields. A run that was stopped and resumed has one file, in which each step
stands once. Half a line, which a killed run leaves, is passed over. A number that was not finite is nan.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dyt.errors import UserError

FILE_NAME = "metrics.jsonl"
# The loss of language models; a model without it is known by the first of its losses.
_MAIN_LOSS = "lm loss"


@dataclass(frozen=True)
class Start:
    """One start of the run's training: versions, and Megatron's arguments by their names in Python."""

    time: str
    normalization: str
    versions: dict[str, str]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A logged step. Losses, seconds and counts are those of the `steps` steps since the line before.

    Losses are means in nats per token; `seconds` and `tokens_per_second` are of one step, over all ranks.
    """

    iteration: int
    steps: int
    consumed_samples: int
    consumed_tokens: int
    losses: dict[str, float]
    learning_rate: float
    grad_norm: float
    skipped: int
    nan: int
    seconds: float
    tokens_per_second: float

    @property
    def loss(self) -> float:
        """The language model's loss, nan where no step was applied."""
        return _main(self.losses)


@dataclass(frozen=True)
class Evaluation:
    """Losses of an evaluation in or after training: on the validation set `name`, or on the test set."""

    iteration: int
    is_test: bool
    name: str | None
    losses: dict[str, float]

    @property
    def loss(self) -> float:
        """The language model's loss."""
        return _main(self.losses)


Record = Start | Step | Evaluation


@dataclass(frozen=True)
class RunMetrics:
    """A run's numbers in the order of iterations. There is at least one step or evaluation."""

    path: Path
    starts: tuple[Start, ...]
    steps: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]

    @property
    def arguments(self) -> dict[str, Any]:
        """Megatron's arguments, of the latest start."""
        return self.starts[-1].arguments if self.starts else {}

    @property
    def validation(self) -> tuple[tuple[int, float], ...]:
        """(iteration, validation loss); the mean over the sets where there are several."""
        sets: dict[int, list[float]] = {}
        for evaluation in self.evaluations:
            if not evaluation.is_test:
                sets.setdefault(evaluation.iteration, []).append(evaluation.loss)
        return tuple((at, sum(losses) / len(losses)) for at, losses in sorted(sets.items()))

    @property
    def skipped(self) -> tuple[int, int]:
        """Steps that the optimizer skipped, and those of them whose loss was not finite."""
        return sum(step.skipped for step in self.steps), sum(step.nan for step in self.steps)

    @property
    def train_seconds(self) -> float:
        """Time of all steps, without evaluations, checkpoints and start-up."""
        spans = (step.steps * step.seconds for step in self.steps)
        return sum(span for span in spans if math.isfinite(span))


def find(directory: Path) -> Path:
    """The file of the run in `directory`: in it, or beside its checkpoints in `checkpoint/`.

    The latter, which need not be there yet, where neither is.
    """
    direct = directory / FILE_NAME
    return direct if direct.is_file() else directory / "checkpoint" / FILE_NAME


def read(path: Path) -> RunMetrics:
    """The numbers in the file `path`.

    Raises:
        UserError: there is no such file, or no complete line of a step or an evaluation in it.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; {HOW_TO_WRITE}")
    run = collect(path, parse(path.read_text(encoding="utf-8", errors="replace").splitlines()))
    if not run.steps and not run.evaluations:
        raise UserError(
            f"{path} holds no complete line of a training step: the run ended before its first logged step, "
            "or the file is another one. Look at the end of the run's log, and train again"
        )
    return run


HOW_TO_WRITE = (
    "training with this plugin writes it into the directory of --save, or of --metrics-dir: torchrun "
    "--nproc-per-node 1 -m megatron_dyt.pretrain ... --save DIR/checkpoint"
)


def parse(lines: Iterable[str]) -> Iterator[Record]:
    """The records in `lines`, without lines that are incomplete or of an unknown kind."""
    for line in lines:
        try:
            data = json.loads(line)
            make = _KINDS.get(data["event"])
            record = make(data) if make else None
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if record is not None:
            yield record


def collect(path: Path, records: Iterable[Record]) -> RunMetrics:
    """The run that `records`, in the order of the file, make up."""
    starts: list[Start] = []
    steps: list[Step] = []
    evaluations: dict[tuple[int, bool, str | None], Evaluation] = {}
    for record in records:
        if isinstance(record, Start):
            starts.append(record)
        elif isinstance(record, Step):
            steps.append(record)
        else:
            evaluations[record.iteration, record.is_test, record.name] = record
    return RunMetrics(path, tuple(starts), tuple(steps), tuple(evaluations.values()))


def _start(data: dict[str, Any]) -> Start:
    versions = {
        name.replace("_", "-"): str(data[name])
        for name in ("megatron_dyt", "megatron_core", "torch")
        if name in data
    }
    return Start(str(data["time"]), str(data["normalization"]), versions, dict(data["arguments"]))


def _step(data: dict[str, Any]) -> Step:
    return Step(
        iteration=int(data["iteration"]),
        steps=int(data["steps"]),
        consumed_samples=int(data["consumed_samples"]),
        consumed_tokens=int(data["consumed_tokens"]),
        losses=_losses(data),
        learning_rate=_number(data.get("learning_rate")),
        grad_norm=_number(data.get("grad_norm")),
        skipped=int(data["skipped_steps"]),
        nan=int(data["nan_steps"]),
        seconds=_number(data["seconds_per_step"]),
        tokens_per_second=_number(data["tokens_per_second"]),
    )


def _evaluation(data: dict[str, Any]) -> Evaluation:
    return Evaluation(int(data["iteration"]), data["event"] == "test", data["set"], _losses(data))


_KINDS: dict[str, Callable[[dict[str, Any]], Record]] = {
    "start": _start,
    "train": _step,
    "validation": _evaluation,
    "test": _evaluation,
}


def _losses(data: dict[str, Any]) -> dict[str, float]:
    return {str(name): _number(value) for name, value in data["losses"].items()}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _main(losses: dict[str, float]) -> float:
    first = next(iter(losses.values()), math.nan)
    return losses.get(_MAIN_LOSS, first)
