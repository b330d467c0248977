"""Progress of a run from its metrics, watched while it is written or beside its piped output."""

import io
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.report import follow
from megatron_dyt.report.follow import Display, Tail, follow_run, keep
from tests.report.made_up_runs import start_line, step_line, validation_line, write_lines


def append(path: Path, *lines: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what comes on standard input."""
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(follow.signal, "signal", lambda *_: None)

    def give(lines: Iterable[bytes]) -> None:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=lines))

    return give


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


def test_what_a_person_must_see_is_shown_and_noise_is_not(tmp_path: Path) -> None:
    log = [
        b"INFO: something\n",
        b"DyT attn  4 sites\n",
        b"WARNING: DyT ffn: alpha*std(x) = 9\n",
        b"megatron_dyt: CPU runtime set --use-cpu-initialization\n",
        b" validation loss at iteration 50 | lm loss value: 4.5E+00 | lm loss PPL: 9.0E+01 |\n",
        b"  successfully saved checkpoint from iteration 50 to x\n",
        b"\xff\xfe\n",
        b"Traceback (most recent call last):\n",
        b'  File "x.py", line 1\n',
        b"ValueError: no\n",
        b"  indented noise\n",
        b"[rank1]: Traceback (most recent call last):\n",
        b'[rank1]:   File "y.py", line 2\n',
        b"[rank1]: megatron_dyt.errors.TrainingFault: step 2\n",
        b"[rank1]: noise\n",
    ]
    said: list[str] = []
    assert keep(log, (tmp_path / "train.log").open("ab"), said.append)
    assert said == [
        "DyT attn  4 sites",
        "WARNING: DyT ffn: alpha*std(x) = 9",
        "megatron_dyt: CPU runtime set --use-cpu-initialization",
        "  successfully saved checkpoint from iteration 50 to x",
        "Traceback (most recent call last):",
        '  File "x.py", line 1',
        "ValueError: no",
        "[rank1]: Traceback (most recent call last):",
        '[rank1]:   File "y.py", line 2',
        "[rank1]: megatron_dyt.errors.TrainingFault: step 2",
    ]
    assert (tmp_path / "train.log").read_bytes() == b"".join(log)


def test_the_output_is_kept_and_its_end_ends_it(
    tmp_path: Path, piped: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "checkpoint" / "metrics.jsonl", [start_line(), step_line(100, 2.5)])
    (tmp_path / "train.log").write_text("first run\n")

    def output() -> Iterator[bytes]:
        yield b"noise\n"
        append(path, start_line(), step_line(51, 2.75), validation_line(51, 2.0))
        yield b"megatron_dyt: a word\n"

    piped(output())
    follow_run(tmp_path / "checkpoint", "dyt", tmp_path / "train.log")
    assert (tmp_path / "train.log").read_text() == "first run\nnoise\nmegatron_dyt: a word\n"
    assert capsys.readouterr().out.splitlines() == [
        "megatron_dyt: a word",
        "dyt: validation loss 2.0000 (step 51)",
        "dyt: step 51/200, loss 2.750, 0.50 s per step, 01:14 left",
        f"dyt: log ended, kept in {tmp_path / 'train.log'}",
    ]


def test_lines_before_an_early_end_are_shown(
    tmp_path: Path, piped: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class DoneAtOnce(follow.ThreadPoolExecutor):
        def submit(self, *args: Any) -> Any:
            done = super().submit(*args)
            done.result()
            return done

    monkeypatch.setattr(follow, "ThreadPoolExecutor", DoneAtOnce)
    path = tmp_path / "checkpoint" / "metrics.jsonl"

    def output() -> Iterator[bytes]:
        write_lines(path, [start_line(), step_line(7, 2.75)])
        yield b"noise\n"

    piped(output())
    follow_run(tmp_path / "checkpoint", "dyt", tmp_path / "train.log")
    assert "dyt: step 7/200, loss 2.750" in capsys.readouterr().out


def test_a_run_that_ends_before_its_first_step_is_no_error(
    tmp_path: Path, piped: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    piped([b"Traceback (most recent call last):\n"])
    follow_run(tmp_path / "checkpoint", "dyt", tmp_path / "train.log")
    assert "Traceback" in capsys.readouterr().out


def noise(unread: list[bytes]) -> Iterator[bytes]:
    """More lines than a buffer holds; each is taken out of `unread`."""
    while unread:
        yield unread.pop()


def test_a_log_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, piped: Any, caplog: pytest.LogCaptureFixture
) -> None:
    piped(noise(lines := [b"x" * 99 + b"\n"] * 9999))
    with pytest.raises(UserError, match="--log /dev/full lacks lines"):
        follow_run(tmp_path, "r", Path("/dev/full"))
    assert not lines
    assert [record.message for record in caplog.records] == [
        "--log /dev/full cannot be written now (No space left on device); the run goes on"
    ]


@pytest.mark.parametrize(("between", "all_are_there"), [(2, True), (9999, False)])
def test_lines_come_again_when_there_is_space(tmp_path: Path, between: int, all_are_there: bool) -> None:
    """Without a gap where the buffer has room for those between."""
    lines = [b"%04d" % i + b"x" * 95 + b"\n" for i in range(between)]
    log, full = (tmp_path / "log").open("ab"), os.open("/dev/full", os.O_WRONLY)
    own = os.dup(log.fileno())

    def filling() -> Iterator[bytes]:
        os.dup2(full, log.fileno())
        yield from lines
        os.dup2(own, log.fileno())
        yield b"last\n"

    assert keep(filling(), log, print) == all_are_there
    found = (tmp_path / "log").read_bytes()
    assert found.endswith(b"last\n")
    assert (found == b"".join([*lines, b"last\n"])) == all_are_there


def test_a_reader_that_goes_does_not_end_the_run(
    tmp_path: Path, piped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(path := tmp_path / "metrics.jsonl", [start_line()])
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr("sys.stdout", os.fdopen(writer, "w"))
    lines = [b"megatron_dyt: a word\n"] * 9999

    def output() -> Iterator[bytes]:
        yield lines.pop()
        append(path, step_line(1))
        time.sleep(0.1)  # So that there is a step to show.
        yield from noise(lines)

    piped(output())
    with pytest.raises(BrokenPipeError):  # The command ends as others do of which nobody reads the output.
        follow_run(tmp_path, "r", tmp_path / "train.log")
    assert not lines
    assert len((tmp_path / "train.log").read_bytes().splitlines()) == 9999


def test_missing_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; training with this plugin writes it"):
        follow_run(tmp_path / "no", "r")
    with pytest.raises(UserError, match="does not exist; make it first"):
        follow_run(tmp_path, "r", tmp_path / "no" / "train.log")
    with pytest.raises(UserError, match=r"--log .* cannot be written \(IsADirectoryError.*give another file"):
        follow_run(tmp_path, "r", tmp_path)
