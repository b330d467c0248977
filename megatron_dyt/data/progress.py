"""One progress line for long steps: done, total, rate and time left.

On a terminal the line redraws in place; in a log a new line appears every few seconds, so that a
step of hours leaves a readable log.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self, TextIO

TERMINAL_SECONDS = 0.1
LOG_SECONDS = 5.0


class Progress:
    """Context manager that reports work of known size.

    Args:
        label: what is being done, printed first.
        total: the size of the work, in the unit that `update` counts in; 0 means unknown.
        unit: the printed unit, for example "MB".
        scale: how many counted units make one printed unit, for example 1e6 for bytes shown as MB.
        stream: where to print; stderr by default, so that a command's output stays clean.
    """

    def __init__(
        self,
        label: str,
        total: float,
        unit: str = "MB",
        scale: float = 1e6,
        stream: TextIO | None = None,
    ) -> None:
        self.label, self.total, self.unit, self.scale = label, total, unit, scale
        self.stream = sys.stderr if stream is None else stream
        self.redraws = self.stream.isatty()
        self.started = self.printed = time.monotonic()
        self.width = 0

    def update(self, done: float, note: str = "") -> None:
        """Print the line if it is due. `done` is the sum so far; `note` is appended as it is."""
        now = time.monotonic()
        if now - self.printed >= (TERMINAL_SECONDS if self.redraws else LOG_SECONDS):
            self.printed = now
            self._print(self.line(done, now - self.started, note))

    def say(self, line: str) -> None:
        """Print a line of its own."""
        self._clear()
        self.stream.write(line + "\n")
        self.stream.flush()

    def line(self, done: float, seconds: float, note: str = "") -> str:
        """The text for `done` after `seconds` of work."""
        rate = done / seconds if seconds > 0 else 0.0
        parts = [self._amount(done), f"{rate / self.scale:.1f} {self.unit}/s"]
        if note:
            parts.append(note)
        if self.total and rate:
            parts.append(f"{duration(max(self.total - done, 0) / rate)} left")
        return f"{self.label}: " + ", ".join(parts)

    def _amount(self, done: float) -> str:
        if not self.total:
            return f"{done / self.scale:.1f} {self.unit}"
        share = min(done / self.total, 1.0)
        return f"{done / self.scale:.1f}/{self.total / self.scale:.1f} {self.unit} ({share:.0%})"

    def _print(self, line: str) -> None:
        if self.redraws:
            # Padding wipes what a longer previous line left behind.
            self.stream.write("\r" + line.ljust(self.width))
            self.width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Clear the redrawn line: what follows (a summary or an error) starts on a clean one."""
        self._clear()

    def _clear(self) -> None:
        if self.redraws and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.stream.flush()


def duration(seconds: float) -> str:
    """`seconds` for people: "42 s", "3 min 05 s", "2 h 07 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
