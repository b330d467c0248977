"""Progress of a run in the terminal, from the metrics that it writes: step, loss, pace, time left."""

from __future__ import annotations

import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from megatron_dyt.errors import UserError
from megatron_dyt.report import metrics
from megatron_dyt.report.metrics import Evaluation, Record, Start, Step

_log = logging.getLogger(__name__)

# How often the file is looked at; a step of a large model takes longer.
POLL_SECONDS = 0.5
# Between two lines of progress where they are kept, in a log.
_LOG_SECONDS = 5.0
# Time left is told from the median of so many of the last lines: one slow step must not move it.
_RECENT = 20


def follow_run(directory: Path, name: str) -> None:
    """Show on stdout the progress of the run in `directory`, until its last step.

    Args:
        directory: where metrics.jsonl is or will be.
        name: what to call the run.

    Raises:
        UserError: the directory does not exist.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist; {metrics.HOW_TO_WRITE}")
    if not metrics.find(directory).is_file():
        _log.info("waiting for %s, which training writes from its first step on", metrics.find(directory))
    display, tail = Display(name, sys.stdout), Tail(directory)
    while not display.complete:
        display.show(tail.read())
        time.sleep(POLL_SECONDS)
    display.close()


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
    """

    def __init__(self, name: str, output: TextIO) -> None:
        self.name = name
        self.output = output
        self.shows_evaluations = False  # The first records to come are history.
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
