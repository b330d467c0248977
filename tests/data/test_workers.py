"""Worker processes: all datasets, each once; errors and deaths come back; nothing is left running."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dyt.data import workers
from megatron_dyt.data.shard import Settings, Shard
from megatron_dyt.data.sources import FileSource
from megatron_dyt.data.workers import Broken, Event, Finished, Progressed, Tracker, write_all
from megatron_dyt.errors import UserError
from tests.data.samples import contents, source_texts, write_jsonl


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What the first process hears of."""
    heard: list[Event] = []
    note = Tracker.note

    def listen(self: Tracker, event: Event) -> bool:
        heard.append(event)
        return note(self, event)

    monkeypatch.setattr(Tracker, "note", listen)
    return heard


def shards(tmp_path: Path, count: int) -> list[Shard]:
    sources = [write_jsonl(tmp_path / f"{number}.jsonl", source_texts()) for number in range(count)]
    return [Shard(tmp_path / "out" / source.stem, (FileSource(source),)) for source in sources]


def test_processes_write_what_one_process_writes(
    tmp_path: Path, settings: Settings, events: list[Event]
) -> None:
    some = shards(tmp_path, 3)
    (tmp_path / "1.jsonl").write_text('{"body": "no text"}\n')
    found = []
    for count in (1, 2):
        events.clear()
        broken = write_all(some, settings, count, True, "test")
        assert list(broken) == ["1"]
        assert "there is no text in" in broken["1"]
        assert sorted(event.number for event in events if isinstance(event, Finished)) == [0, 2]
        found.append(contents(tmp_path / "out"))
        for path in (tmp_path / "out").iterdir():
            path.unlink()
    assert found[0] == found[1]
    assert sorted(found[0]) == [f"{n}.{end}" for n in (0, 2) for end in ("bin", "idx", "manifest.json")]


@pytest.mark.parametrize("count", [1, 2])
def test_when_no_other_may_be_begun_those_that_have_been_are_completed(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(Tracker, "note", lambda self, event: not isinstance(event, Finished))
    write_all(shards(tmp_path, 4), settings, count, False, "test")
    assert len(list((tmp_path / "out").glob("*.manifest.json"))) == count
    assert not list((tmp_path / "out").glob("*.partial"))


def test_progress_is_told_now_and_then(
    tmp_path: Path, settings: Settings, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "REPORT_SECONDS", 0.0)
    (shard,) = shards(tmp_path, 1)
    write_all([shard], settings, 1, False, "test")
    *progress, last = events
    assert isinstance(last, Finished)
    assert progress[-1] == Progressed(0, shard.size, last.text_bytes, last.tokens)


def test_an_error_in_a_worker_is_raised_here_with_its_place(tmp_path: Path, settings: Settings) -> None:
    some = shards(tmp_path, 2)
    (tmp_path / "out").mkdir()
    # A directory where a file must go: what a worker cannot go on from.
    (tmp_path / "out" / "1.bin.partial").mkdir()
    with pytest.raises(OSError, match=r"1\.bin\.partial") as failure:
        write_all(some, settings, 2, False, "test")
    assert "in shard.py" in failure.value.__notes__[0].replace(os.sep, " in ")
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_named(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(self: Tracker, event: Event) -> bool:
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGKILL)
        return True

    monkeypatch.setattr(Tracker, "note", kill)
    with pytest.raises(
        RuntimeError, match=r"worker that wrote .*out/.* was killed by SIGKILL \(out of memory"
    ):
        write_all(shards(tmp_path, 6), settings, 2, False, "test")
    assert not multiprocessing.active_children()


def test_an_error_here_stops_the_workers(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Tracker, event: Event) -> bool:
        raise UserError("enough")

    monkeypatch.setattr(Tracker, "note", fail)
    with pytest.raises(UserError, match="enough"):
        write_all(shards(tmp_path, 4), settings, 2, False, "test")
    assert not multiprocessing.active_children()
    assert not list((tmp_path / "out").glob("*.partial"))


def test_what_cannot_be_pickled_comes_as_text() -> None:
    class OddError(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("not this one")

    assert str(workers._sendable(OddError("what it said"))) == "OddError: what it said"
    assert json.dumps(str(workers._sendable(OSError(28, "full")))) == '"[Errno 28] full"'


def test_a_worker_imports_neither_torch_nor_megatron() -> None:
    """Either would cost each worker 0.7 GB and seconds."""
    code = "import sys, megatron_dyt.data.workers as w; print({'torch', 'megatron'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


# --- progress --------------------------------------------------------------------------------------------


def test_the_line_sums_up_all_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = shards(tmp_path, 3)
    size = some[0].size
    with contextlib.closing(Tracker(some, False, "pile")) as tracker:
        assert tracker.note(Progressed(0, 400, 2_000_000, 500_000))
        assert tracker.note(Progressed(1, 600, 3_000_000, 700_000))
        assert (tracker.bar.total, tracker.bar.n) == (3 * size, 1000)
        assert tracker.note(Finished(0, 30_000_000, 9_000_000))
        assert tracker.bar.n == size + 600
        assert tracker.bar.postfix.endswith("MB/s of text, 9.7M tokens, 1 of 3 done")


@pytest.mark.parametrize("skip", [True, False])
def test_a_broken_dataset_is_said_and_not_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], skip: bool
) -> None:
    with contextlib.closing(Tracker(shards(tmp_path, 2), skip, "pile")) as tracker:
        tracker.note(Progressed(1, 600, 3_000_000, 700_000))
        assert tracker.note(Broken(1, "b is truncated")) == skip
        assert "WARNING: broken: b is truncated" in capsys.readouterr().out
        assert (tracker.bar.n, tracker.broken) == (0, {"1": "b is truncated"})
        assert tracker.note(Finished(0, 1, 1)) == skip


def test_datasets_are_counted_where_the_size_is_unknown(tmp_path: Path) -> None:
    some = [Shard(shard.prefix, ()) for shard in shards(tmp_path, 2)]
    with contextlib.closing(Tracker(some, False, "pile")) as tracker:
        tracker.note(Progressed(1, 0, 2_000_000, 500_000))
        assert (tracker.bar.total, tracker.bar.n) == (2, 0)
        tracker.note(Finished(1, 2_000_000, 500_000))
        assert tracker.bar.n == 1
