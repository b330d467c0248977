"""The queue of a sweep: processes that train, several at a time, each run exactly once."""

import contextlib
import functools
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dyt.errors import UserError
from megatron_dyt.sweep import outcome, warm
from megatron_dyt.sweep.outcome import Outcome
from megatron_dyt.sweep.spec import Run

_log = logging.getLogger(__name__)

# Seconds between two looks at the processes; a run takes minutes.
_LOOK = 0.2
# Seconds that a process has to end after SIGTERM. torchrun's workers are sessions of their own, which only
# torchrun ends: it gives them 30.
_GRACE, _GRACE_OF_TORCHRUN = 10.0, 45.0
# So many runs that fail one after the other fail for the same reason, which the others share.
_FAILURES = 3

# The program and first arguments to which a run's flags are appended.
TRAIN = (sys.executable, "-m", "megatron_dyt.pretrain")


def torchrun(processes: int) -> tuple[str, ...]:
    """The start of a run on `processes` GPUs of this machine."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    return (*launcher, "--nproc-per-node", str(processes), "-m", "megatron_dyt.pretrain")


@dataclass(frozen=True)
class Options:
    """How runs are started.

    Attributes:
        parallel: runs at a time.
        threads: of each process (OMP_NUM_THREADS). Another number rounds otherwise.
        gpus: of each run; 0 leaves CUDA_VISIBLE_DEVICES alone.
        retry: do runs once more that have failed (not those that have diverged).
        save_interval: steps between a run's checkpoints, from which it goes on if the sweep is killed; 0 for
            no checkpoints.
        program: what a run's flags are appended to.
    """

    parallel: int = 1
    threads: int = 1
    gpus: int = 0
    retry: bool = False
    save_interval: int = 0
    program: tuple[str, ...] = TRAIN


@dataclass
class _Process:
    run: Run
    slot: int
    command: list[str]
    began: float
    popen: subprocess.Popen[bytes] | warm.Forked


def directory_of(output: Path, run: Run) -> Path:
    """Where a run writes: its log, metrics.jsonl, result.json."""
    return output / "runs" / run.name


def finished(output: Path, runs: Sequence[Run], retry: bool = False) -> dict[Run, Outcome]:
    """The runs that are done and need not be done again, with their outcomes."""
    found = {run: outcome.load(directory_of(output, run), run.flags) for run in runs}
    return {run: end for run, end in found.items() if end and not (retry and end.status == "failed")}


def run_all(
    output: Path, runs: Sequence[Run], options: Options, on_end: Callable[[dict[Run, Outcome]], object]
) -> dict[Run, Outcome]:
    """Do what is not done of `runs`, in their order.

    Args:
        on_end: called with all outcomes so far whenever a run has ended.

    Returns:
        The outcome of every run.

    Raises:
        UserError: three runs after each other failed, and the message has the end of the last one's log; or
            there are fewer GPUs than the runs need.
    """
    _devices(options.parallel - 1, options.gpus)
    # Megatron's cache of sample indices goes by path and not by content: data may have been made anew.
    shutil.rmtree(output / "cache", ignore_errors=True)
    done = finished(output, runs, options.retry)
    waiting = [run for run in runs if run not in done]
    progress = _Progress(len(runs), len(done))
    active: list[_Process] = []
    failures = 0
    parent = None
    if waiting and options.program == TRAIN:
        output.mkdir(parents=True, exist_ok=True)
        parent = warm.Parent(_environment(0, options), output / "imports.txt")
    try:
        while waiting or active:
            while waiting and len(active) < options.parallel and failures < _FAILURES:
                slot = min(set(range(options.parallel)) - {process.slot for process in active})
                active.append(_start(output, waiting.pop(0), slot, options, parent))
            ended = [process for process in active if process.popen.poll() is not None]
            for process in ended:
                active.remove(process)
                done[process.run] = result = _end(output, process)
                progress.report(process.run, result)
                failures = failures + 1 if result.status == "failed" else 0
                on_end(done)
            if failures >= _FAILURES and waiting and not active:
                raise UserError(_gave_up(output, waiting, process.run, result))
            if not ended:
                time.sleep(_LOOK)
    finally:
        _stop(active, _GRACE_OF_TORCHRUN if options.gpus else _GRACE)
        if parent:
            parent.close()
    return {run: done[run] for run in runs}


def _gave_up(output: Path, waiting: Sequence[Run], last: Run, result: Outcome) -> str:
    log = directory_of(output, last) / outcome.LOG_NAME
    return (
        f"{_FAILURES} runs failed one after the other, so {len(waiting)} were not started. The last one: "
        f"{' | '.join(result.log_tail)} (all of it: {log}). Correct the cause, and start again with "
        "--retry-failed"
    )


def _start(output: Path, run: Run, slot: int, options: Options, parent: warm.Parent | None) -> _Process:
    directory = directory_of(output, run)
    if not options.save_interval:
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / outcome.RESULT_NAME).unlink(missing_ok=True)
    if options.save_interval:
        outcome.keep_flags(directory, run.flags)
    flags = [*run.flags, *_own_flags(output, directory, slot, options)]
    command = [*options.program, *flags]
    log = directory / outcome.LOG_NAME
    began = time.monotonic()
    forked = parent and parent.fork(flags, log)
    return _Process(run, slot, command, began, forked or _popen(command, log, _environment(slot, options)))


def _popen(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            # Ctrl-C in the terminal is for the sweep, which then stops its runs: else they would end first,
            # and count as failed.
            start_new_session=True,
            preexec_fn=functools.partial(warm.end_with, os.getpid()),
        )


def _environment(slot: int, options: Options) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        # Threads must not burn the time of a busy machine while they wait.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
        **({"CUDA_VISIBLE_DEVICES": _devices(slot, options.gpus)} if options.gpus else {}),
    }


def _own_flags(output: Path, directory: Path, slot: int, options: Options) -> list[str]:
    # A cache for each slot: Megatron writes one in place, where another process would read half of it.
    flags = ["--metrics-dir", str(directory), "--data-cache-path", str(output / "cache" / str(slot))]
    if options.save_interval:
        saved = str(directory / outcome.CHECKPOINT_NAME)
        flags += ["--save", saved, "--load", saved, "--save-interval", str(options.save_interval)]
    return flags


def _devices(slot: int, gpus: int) -> str:
    """The GPUs of a slot, out of those that the sweep may use."""
    first, end = slot * gpus, (slot + 1) * gpus
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    visible = given.split(",") if given else [str(number) for number in range(end)]
    if end > len(visible):
        raise UserError(
            f"{slot + 1} runs at a time of {gpus} GPUs each need {end}, and CUDA_VISIBLE_DEVICES={given} has "
            f"{len(visible)}; give a smaller --parallel or --nproc, or more GPUs"
        )
    return ",".join(visible[first:end])


def _end(output: Path, process: _Process) -> Outcome:
    directory = directory_of(output, process.run)
    seconds = time.monotonic() - process.began
    result = outcome.of(directory, process.popen.wait(), seconds)
    outcome.save(directory, result, process.run.flags, process.command)
    # Of a run that is done only its numbers are wanted.
    if result.status == "finished":
        outcome.clear(directory)
    return result


def _stop(active: Sequence[_Process], grace: float) -> None:
    """End what still runs, with all its processes, `grace` seconds after asked; these runs stay undone."""
    for process in active:
        _signal(process, signal.SIGTERM)
    until = time.monotonic() + grace
    for process in active:
        try:
            process.popen.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.popen.wait()


def _signal(process: _Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.popen.pid, number)


class _Progress:
    """A line for each run that ends, with how many runs an hour were done and how long the rest takes."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self.began, self.ended = time.monotonic(), 0
        if done:
            _log.info("%d of %d runs are done already", done, total)

    def report(self, run: Run, result: Outcome) -> None:
        self.done += 1
        self.ended += 1
        hours = (time.monotonic() - self.began) / 3600
        rate = self.ended / hours
        left = (self.total - self.done) / rate * 60
        loss = "none" if result.valid_loss is None else f"{result.valid_loss:.4f}"
        _log.info(
            "%d of %d: %s %s, validation loss %s, %.0f s; %.1f runs an hour, %.0f minutes left",
            *(self.done, self.total, run.name, result.status, loss, result.seconds, rate, left),
        )
        if result.status != "finished":
            _log.warning("%s at step %d: %s", result.status, result.step, " | ".join(result.log_tail))
