"""Progress of a run from its metrics, watched while it is written."""

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.report import follow
from megatron_dyt.report.follow import Display, Tail, follow_run
from tests.report.made_up_runs import start_line, step_line, validation_line, write_lines


def append(path: Path, *lines: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


HISTORY = [
    start_line(),
    step_line(1, seconds_per_step=9.0),
    step_line(100, 5.25, seconds_per_step=0.5),
    step_line(110, 5.125, seconds_per_step=0.5),
]


def test_a_terminal_has_a_bar_with_step_loss_pace_and_time_left(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", HISTORY)
    output = Terminal()
    display, tail = Display("dyt", output), Tail(tmp_path)
    display.show(tail.read())
    # The median of the pace: the first step's does not count.
    assert "| step 110/200, loss 5.125, 0.50 s per step, 00:45 left" in str(display.bar)
    append(tmp_path / "metrics.jsonl", step_line(120, 5.0), validation_line(120, 4.5))
    display.show(tail.read())
    assert "| step 120/200, loss 5.000" in str(display.bar)
    assert "dyt: validation loss 4.5000 (step 120)\n" in output.getvalue()
    assert not display.complete
    display.close()


def test_of_a_file_that_a_resumed_run_replaced_its_own_part_is_news(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [start_line(), step_line(10, 6.0), validation_line(10, 5.5), step_line(20, 5.0)])
    tail = Tail(tmp_path)
    assert len(tail.read()) == 4
    lines = [start_line(), step_line(10, 6.0), validation_line(10, 5.5), start_line(), step_line(11, 5.9)]
    write_lines(tmp_path / "new", lines)
    (tmp_path / "new").replace(path)
    assert [getattr(record, "iteration", None) for record in tail.read()] == [None, 11]
    append(path, step_line(21, 4.9))
    assert [record.iteration for record in tail.read()] == [21]


def test_a_log_has_a_line_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(follow.time, "monotonic", lambda: now[0])
    write_lines(tmp_path / "metrics.jsonl", HISTORY)
    output = io.StringIO()
    display, tail = Display("dyt", output), Tail(tmp_path)
    for seconds, iteration in ((0, 120), (1, 130), (9, 140), (0, 150), (0, 200)):
        now[0] += seconds
        append(tmp_path / "metrics.jsonl", step_line(iteration, 4.0))
        display.show(tail.read())
    assert display.complete
    assert output.getvalue().splitlines() == [
        f"dyt: step {at}/200, loss 4.000, 0.50 s per step, {left} left"
        for at, left in ((120, "00:40"), (140, "00:30"), (200, "00:00"))
    ]


def test_evaluations_are_said_as_they_come_and_not_those_of_before(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", [start_line(), step_line(50), validation_line(50, 4.5)])
    output = io.StringIO()
    display, tail = Display("r", output), Tail(tmp_path)
    display.show(tail.read())
    assert "4.5000" not in output.getvalue()
    append(path, step_line(60), validation_line(60, 4.25), validation_line(60, 4.0, "code"))
    append(path, validation_line(60, 3.0, event="test"))
    display.show(tail.read())
    said = [line for line in output.getvalue().splitlines() if "left" not in line]
    assert said == [
        "r: validation loss 4.2500 (step 60)",
        "r: validation loss 4.0000 (code, step 60)",
        "r: test loss 3.0000 (step 60)",
    ]


def test_a_line_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    tail = Tail(tmp_path)
    assert tail.read() == []
    path = tmp_path / "metrics.jsonl"
    text = json.dumps(step_line(1)) + "\n"
    path.write_text(text[:30])
    assert tail.read() == []
    path.write_text(text)
    assert len(tail.read()) == 1
    assert tail.read() == []


def test_following_ends_with_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that has not begun to write when it is looked at."""
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)
    lines = [start_line(), step_line(100), step_line(200, 2.5)]
    writing = threading.Timer(0.1, write_lines, (tmp_path / "checkpoint" / "metrics.jsonl", lines))
    writing.start()
    follow_run(tmp_path, "r")
    writing.join()
    shown = capsys.readouterr().out
    assert "waiting for" in shown
    assert "r: step 200/200, loss 2.500" in shown


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; training with this plugin writes it"):
        follow_run(tmp_path / "no", "r")
