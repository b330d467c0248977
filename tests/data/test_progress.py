"""The progress line: its text, and when it is printed to a terminal and to a log."""

from __future__ import annotations

import io

import pytest

from megatron_dyt.data import progress
from megatron_dyt.data.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_line_holds_amount_rate_note_and_time_left() -> None:
    line = Progress("train", 40e6, stream=io.StringIO()).line(10e6, 5.0, "3.0M tokens")
    assert line == "train: 10.0/40.0 MB (25%), 2.0 MB/s, 3.0M tokens, 15 s left"


def test_line_of_unknown_total_makes_no_promise() -> None:
    line = Progress("read", 0, unit="docs", scale=1, stream=io.StringIO()).line(30, 2.0)
    assert line == "read: 30.0 docs, 15.0 docs/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_log_prints_only_when_due(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 101.0, 106.0, 107.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    log = io.StringIO()
    with Progress("x", 10e6, stream=log) as bar:
        for done in (1e6, 6e6, 7e6):
            bar.update(done)
    assert log.getvalue() == "x: 6.0/10.0 MB (60%), 1.0 MB/s, 4 s left\n"


def test_terminal_redraws_one_line_and_clears_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    terminal = Terminal()
    with Progress("x", 10e6, stream=terminal) as bar:
        bar.update(1e6, "a long note")
        bar.update(2e6)
    _, first, second, wipe, end = terminal.getvalue().split("\r")
    assert first == "x: 1.0/10.0 MB (10%), 1.0 MB/s, a long note, 9 s left"
    assert second.startswith("x: 2.0/10.0 MB")
    assert len(second) == len(first)
    assert (wipe.strip(), end) == ("", "")
