"""Worker processes: all shards, each once; errors and deaths come back; nothing is left running."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_dyt.data import tokenizers, workers
from megatron_dyt.data.dataset_manifest import SENTENCEPIECE
from megatron_dyt.data.settings import Settings, Shard
from megatron_dyt.data.sources import FileSource
from megatron_dyt.data.workers import Broken, Event, Finished, Progressed, run
from megatron_dyt.errors import UserError
from tests.data.samples import source_texts, write_jsonl


@pytest.fixture
def settings(tokenizer_model: Path) -> Settings:
    return Settings(tokenizers.find(SENTENCEPIECE, str(tokenizer_model)))


def shards(tmp_path: Path, count: int) -> list[Shard]:
    sources = [write_jsonl(tmp_path / f"{number}.jsonl", source_texts()) for number in range(count)]
    return [Shard(tmp_path / "out" / source.stem, (FileSource(source),)) for source in sources]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_processes_write_what_one_process_writes(tmp_path: Path, settings: Settings) -> None:
    some = shards(tmp_path, 3)
    (tmp_path / "1.jsonl").write_text('{"body": "no text"}\n')
    found = []
    for count in (1, 2):
        events: list[Event] = []

        def listen(event: Event, events: list[Event] = events) -> bool:
            events.append(event)
            return True

        run(some, settings, count, listen)
        assert sorted(event.number for event in events if isinstance(event, Finished)) == [0, 2]
        (broken,) = [event for event in events if isinstance(event, Broken)]
        assert broken.number == 1
        assert "there is no text in" in broken.problem
        found.append(files(tmp_path / "out"))
        for path in (tmp_path / "out").iterdir():
            path.unlink()
    assert found[0] == found[1]
    assert sorted(found[0]) == [f"{n}.{end}" for n in (0, 2) for end in ("bin", "idx", "manifest.json")]


@pytest.mark.parametrize("count", [1, 2])
def test_no_shard_is_begun_after_the_listener_said_no(tmp_path: Path, settings: Settings, count: int) -> None:
    run(shards(tmp_path, 4), settings, count, lambda event: not isinstance(event, Finished))
    assert len(list((tmp_path / "out").glob("*.manifest.json"))) == count
    assert not list((tmp_path / "out").glob("*.partial"))


def test_progress_is_told_now_and_then(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "REPORT_SECONDS", 0.0)
    (shard,) = shards(tmp_path, 1)
    events: list[Event] = []

    def listen(event: Event) -> bool:
        events.append(event)
        return True

    run([shard], settings, 1, listen)
    *progress, last = events
    assert isinstance(last, Finished)
    assert progress[-1] == Progressed(0, shard.size, last.manifest["text_bytes"], last.manifest["tokens"])


def test_an_error_in_a_worker_is_raised_here_with_its_place(tmp_path: Path, settings: Settings) -> None:
    some = shards(tmp_path, 2)
    (tmp_path / "out").mkdir()
    # A directory where a file must go: what a worker cannot go on from.
    (tmp_path / "out" / "1.bin.partial").mkdir()
    with pytest.raises(IsADirectoryError) as failure:
        run(some, settings, 2, lambda event: True)
    assert "in shard.py" in failure.value.__notes__[0].replace(os.sep, " in ")
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_named(tmp_path: Path, settings: Settings) -> None:
    def kill(event: Event) -> bool:
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGKILL)
        return True

    with pytest.raises(
        RuntimeError, match=r"worker that wrote .*out/.* was killed by SIGKILL \(out of memory"
    ):
        run(shards(tmp_path, 6), settings, 2, kill)
    assert not multiprocessing.active_children()


def test_an_error_of_the_listener_stops_the_workers(tmp_path: Path, settings: Settings) -> None:
    def fail(event: Event) -> bool:
        raise UserError("enough")

    with pytest.raises(UserError, match="enough"):
        run(shards(tmp_path, 4), settings, 2, fail)
    assert not multiprocessing.active_children()
    assert not list((tmp_path / "out").glob("*.partial"))


def test_what_cannot_be_pickled_comes_as_text() -> None:
    class OddError(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("not this one")

    assert str(workers._sendable(OddError("what it said"))) == "OddError: what it said"
    assert json.dumps(str(workers._sendable(OSError(28, "full")))) == '"[Errno 28] full"'
