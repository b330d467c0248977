"""The progress of several shards is their sum, and a broken shard ends the run or does not."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from megatron_dyt.data import progress as progress_module
from megatron_dyt.data import tracker as tracker_module
from megatron_dyt.data.progress import Progress
from megatron_dyt.data.settings import Shard
from megatron_dyt.data.sources import FileSource
from megatron_dyt.data.tracker import Tracker
from megatron_dyt.data.workers import Broken, Finished, Progressed

FINISHED = Finished(0, {"text_bytes": 30_000_000, "tokens": 9_000_000})


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(b"x" * 1000)
    return [Shard(tmp_path / name, (FileSource(tmp_path / f"{name}.jsonl"),)) for name in "abc"]


def tracker(
    shards: list[Shard], total: int, skip: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tracker, io.StringIO]:
    log, clock = io.StringIO(), iter(range(0, 1000, 10))
    for module in (progress_module, tracker_module):
        monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    return Tracker(shards, Progress("pile", total, scale=1e3, unit="kB", stream=log), skip), log


def test_the_line_sums_up_all_shards(shards: list[Shard], monkeypatch: pytest.MonkeyPatch) -> None:
    track, log = tracker(shards, 3000, False, monkeypatch)
    assert track(Progressed(0, 400, 2_000_000, 500_000))
    assert track(Progressed(1, 600, 3_000_000, 700_000))
    assert track(FINISHED)
    first, second, third = log.getvalue().splitlines()
    assert first.startswith("pile: 0.4/3.0 kB (13%)")
    assert "0.5M tokens, 0 of 3 shards done" in first
    assert second.startswith("pile: 1.0/3.0 kB (33%)")
    assert "1.2M tokens, 0 of 3 shards done" in second
    assert third.startswith("pile: 1.6/3.0 kB (53%)")
    assert "MB/s of text, 9.7M tokens, 1 of 3 shards done" in third
    assert third.endswith("left")


def test_text_is_counted_where_the_size_is_unknown(
    shards: list[Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    track, log = tracker(shards[:1], 0, False, monkeypatch)
    track(Progressed(0, 0, 2_000_000, 500_000))
    assert log.getvalue().startswith("pile: 2000.0 kB, ")
    assert log.getvalue().endswith(" kB/s, 0.5M tokens\n")


@pytest.mark.parametrize("skip", [True, False])
def test_a_broken_shard_is_said_and_not_counted(
    shards: list[Shard], monkeypatch: pytest.MonkeyPatch, skip: bool
) -> None:
    track, log = tracker(shards, 3000, skip, monkeypatch)
    track(Progressed(1, 600, 3_000_000, 700_000))
    assert track(Broken(1, "b is truncated")) == skip
    assert "broken: b is truncated\n" in log.getvalue()
    assert "0.0M tokens" in log.getvalue().splitlines()[-1]
    assert track.broken == {"b": "b is truncated"}
    assert track(FINISHED) == skip


def test_time_left_is_by_the_shards_that_are_done_where_the_size_is_unknown(
    shards: list[Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    track, log = tracker(shards, 0, True, monkeypatch)
    track(Progressed(1, 0, 15_000_000, 1))
    track(FINISHED)
    track(Broken(2, "gone"))
    first, second, _broken, third = log.getvalue().splitlines()
    assert "left" not in first
    # The clock stands at 30 s: 45 MB, and 45 to come. At 50 s, with 2 shards to do, 15 to come.
    assert second.endswith("1 of 3 shards done, about 30 s left")
    assert third.endswith("1 of 3 shards done, about 17 s left")


def test_shards_without_text_say_no_time(shards: list[Shard], monkeypatch: pytest.MonkeyPatch) -> None:
    track, log = tracker(shards, 0, False, monkeypatch)
    assert track(Finished(1, {"text_bytes": 0, "tokens": 0}))
    assert "left" not in log.getvalue()
