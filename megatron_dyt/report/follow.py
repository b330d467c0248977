"""Progress of a run in the terminal, from the metrics that it writes: step, loss, pace, time left.

With `--log` it also keeps the run's output in a file, and shows of it what a person must see.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO, TextIO

from tqdm import tqdm

from megatron_dyt.errors import UserError, describe
from megatron_dyt.report import metrics
from megatron_dyt.report.metrics import Evaluation, Record, Start, Step

_log = logging.getLogger(__name__)

# How often the file is looked at; a step of a large model takes longer.
POLL_SECONDS = 0.5
# Between two lines of progress where they are kept, in a log.
_LOG_SECONDS = 5.0
# Time left is told from the median of so many of the last lines: one slow step must not move it.
_RECENT = 20
_SHOWN = re.compile(r"^(megatron_dyt|DyT |WARNING: DyT)|successfully (saved|loaded) checkpoint|Error\b")
# What torch puts in front of each line of a traceback once there are several processes.
_RANK = re.compile(r"^\[rank\d+\]: ?")


def follow_run(directory: Path, name: str, log: Path | None = None) -> None:
    """Show on stdout the progress of the run in `directory`, until its last step.

    Args:
        directory: where metrics.jsonl is or will be.
        name: what to call the run.
        log: standard input is the run's output: append it to this file, and end when it ends.

    Raises:
        UserError: the directory, or that of `log`, does not exist; or lines are missing in `log`.
    """
    if log is not None:
        _follow_output(directory, Display(name, sys.stdout, from_start=True), log)
        return
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist; {metrics.HOW_TO_WRITE}")
    if not metrics.find(directory).is_file():
        _log.info("waiting for %s, which training writes from its first step on", metrics.find(directory))
    display, tail = Display(name, sys.stdout), Tail(directory)
    while not display.complete:
        display.show(tail.read())
        time.sleep(POLL_SECONDS)
    display.close()


def _follow_output(directory: Path, display: Display, log: Path) -> None:
    if sys.stdin is None:
        raise UserError("--log keeps what comes by standard input, which is closed; give it the run's output")
    if not log.parent.is_dir():
        raise UserError(f"the directory of {log} does not exist; make it first: mkdir -p {log.parent}")
    try:
        file = log.open("ab")
    except OSError as error:
        raise UserError(f"--log {log} cannot be written ({describe(error)}); give another file") from error
    # An interrupt ends the run in front of the pipe; its last lines belong into the log, and then this ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tail = Tail(directory)
    tail.read()  # What an interrupted run has written is no progress of this one.
    # Its end waits for that of the output, also where nothing can be shown: a run that nobody reads dies.
    with ThreadPoolExecutor(1) as thread:
        copying = thread.submit(keep, sys.stdin.buffer, file, display.write_line)
        while not copying.done():
            wait([copying], POLL_SECONDS)
            display.show(tail.read())
    display.show(tail.read())  # What was written since the last look.
    display.close()
    if not copying.result():
        raise UserError(f"--log {log} lacks lines of the run that could not be written; is the disk full?")
    display.write_line(f"{display.name}: log ended, kept in {log}")


class Tail:
    """Reads what was appended to a run's metrics since the last time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.position = 0
        # The file's number: a resumed run puts another in its place when lines of the old one are void.
        self.inode = 0

    def read(self) -> list[Record]:
        """The records of the new complete lines; none while there is no file."""
        path = metrics.find(self.directory)
        if not path.is_file():
            return []
        with path.open("rb") as file:
            replaced = self.inode not in (0, inode := os.fstat(file.fileno()).st_ino)
            self.inode, self.position = inode, 0 if replaced else self.position
            file.seek(self.position)
            # What stands behind the last newline is a line that is being written.
            whole, newline, _ = file.read().rpartition(b"\n")
        self.position += len(whole + newline)
        records = list(metrics.parse(whole.decode(errors="replace").splitlines()))
        starts = [index for index, record in enumerate(records) if isinstance(record, Start)]
        return records[starts[-1] :] if replaced and starts else records  # Before it stands what is known.


class Display:
    """A progress bar on a terminal, in a log a line every few seconds; with other lines above it.

    Args:
        name: what to call the run.
        output: where to show it.
        from_start: the first records to come are news, not the history of a run that goes on.
    """

    def __init__(self, name: str, output: TextIO, from_start: bool = False) -> None:
        self.name = name
        self.output = output
        self.shows_evaluations = from_start
        self.bar: tqdm[None] | None = None
        self.total = 0
        self.complete = False
        # Of the latest steps.
        self.seconds: list[float] = []
        # When the last line of progress was written to a log; None before the first.
        self.written: float | None = None

    def show(self, records: list[Record]) -> None:
        """Bring the display up to date with `records`."""
        for record in records:
            if isinstance(record, Start):
                self.total = int(record.arguments.get("train_iters") or 0)
            elif isinstance(record, Step):
                self.seconds = [*self.seconds[1 - _RECENT :], record.seconds]
            elif self.shows_evaluations:
                self._show_evaluation(record)
        self.shows_evaluations = self.shows_evaluations or bool(records)
        if steps := [record for record in records if isinstance(record, Step)]:
            self._draw(steps[-1])

    def _show_evaluation(self, evaluation: Evaluation) -> None:
        kind = "test" if evaluation.is_test else "validation"
        which = f"{evaluation.name}, " if evaluation.name else ""
        at = f"{which}step {evaluation.iteration}"
        self.write_line(f"{self.name}: {kind} loss {evaluation.loss:.4f} ({at})")

    def _draw(self, step: Step) -> None:
        self.complete = step.iteration >= self.total
        pace = statistics.median(self.seconds)
        left = tqdm.format_interval(max(0, self.total - step.iteration) * pace)
        state = f"loss {step.loss:.3f}, {pace:.2f} s per step, {left} left"
        if self.output.isatty():
            self.bar = self.bar or self._new_bar(step.iteration)
            self.bar.set_postfix_str(state, refresh=False)
            self.bar.update(step.iteration - self.bar.n)
            self.bar.refresh()
        elif self.complete or self.written is None or time.monotonic() - self.written >= _LOG_SECONDS:
            self.written = time.monotonic()
            self.write_line(f"{self.name}: step {step.iteration}/{self.total}, {state}")

    def _new_bar(self, iteration: int) -> tqdm[None]:
        return tqdm(
            desc=self.name,
            total=self.total,
            initial=iteration,
            file=self.output,
            dynamic_ncols=True,
            delay=1e-9,  # No bar before the first loss is in it.
            bar_format="{desc}: {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}{postfix}",
        )

    def write_line(self, line: str) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.write(line, file=self.output)
        else:
            self.output.write(line + "\n")
        self.output.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


def keep(lines: Iterable[bytes], log: BinaryIO, show: Callable[[str], None]) -> bool:
    """Append `lines` to `log` as they come, close it, and `show` the lines that a person must see.

    These are the plugin's own, saved and loaded checkpoints, tracebacks and errors. All lines are read,
    whatever becomes of the log and of what is shown.

    Returns:
        Whether all of them are in the log.
    """
    whole, faults = True, list[OSError]()
    in_traceback = False  # and its last line, the exception, is not indented
    for line in lines:
        whole = _append(log, line, faults) and whole
        text = line.decode(errors="replace").rstrip()
        bare = _RANK.sub("", text)
        is_exception = in_traceback and not bare[:1].isspace()
        in_traceback = bare.startswith("Traceback") or (in_traceback and not is_exception)
        if in_traceback or is_exception or _SHOWN.search(bare):
            with contextlib.suppress(OSError, ValueError):  # Nobody reads it, or its encoding lacks a letter.
                show(text)
    with contextlib.suppress(OSError):
        log.close()  # It writes what is left in the buffer.
        return whole
    return False


def _append(log: BinaryIO, line: bytes, faults: list[OSError]) -> bool:
    """Whether `log` took the line: what it cannot write now stays in its buffer, for the next line's turn."""
    taken = 0
    try:
        taken = log.write(line)
        log.flush()
    except OSError as error:
        if not faults:
            _log.warning("--log %s cannot be written now (%s); the run goes on", log.name, error.strerror)
            faults.append(error)
    return taken == len(line)
