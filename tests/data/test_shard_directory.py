"""Inputs find their shards again: no document is in a directory twice, and none is lost."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dyt.data.dataset_manifest import DatasetManifest
from megatron_dyt.data.hub import HubDataset, HubSource
from megatron_dyt.data.shard import Shard
from megatron_dyt.data.shard_directory import shards_of
from megatron_dyt.data.sources import FileSource, Source
from megatron_dyt.errors import UserError
from tests.data.samples import manifest, write_jsonl

OUT = Path("out")


@pytest.fixture
def a(tmp_path: Path) -> FileSource:
    return file(tmp_path / "a" / "x.jsonl", "of a")


@pytest.fixture
def b(tmp_path: Path) -> FileSource:
    return file(tmp_path / "b" / "x.jsonl", "and of b")


def file(path: Path, text: str) -> FileSource:
    path.parent.mkdir(exist_ok=True)
    return FileSource(write_jsonl(path, [text]))


def manifests(shards: Sequence[Shard]) -> dict[str, DatasetManifest]:
    """What is known of finished shards."""
    found = {}
    for shard in shards:
        identities = tuple(source.identity() for source in shard.sources)
        made_from = replace(manifest().made_from, sources=identities)
        found[shard.name] = replace(
            manifest(), sources=[str(source) for source in shard.sources], made_from=made_from
        )
    return found


def again(sources: Sequence[Source], there: dict[str, DatasetManifest], overwrite: bool = False) -> list[str]:
    return [shard.prefix.name for shard in shards_of(OUT, sources, there, overwrite)]


def test_more_inputs_do_not_rename_those_that_are_there(a: FileSource, b: FileSource) -> None:
    one = manifests(shards_of(OUT, [a], {}, False))
    assert list(one) == ["x"]
    assert again([a, b], one) == ["x", "b-x.jsonl"]
    both = manifests(shards_of(OUT, [a, b], {}, False))
    assert list(both) == ["a-x.jsonl", "b-x.jsonl"]
    assert again([b], both) == ["b-x.jsonl"]


def test_changed_and_moved_inputs_keep_their_shards(a: FileSource, b: FileSource, tmp_path: Path) -> None:
    both = manifests(shards_of(OUT, [a, b], {}, False))
    os.utime(a.path, (1, 1))
    assert again([a], both) == ["a-x.jsonl"]
    (tmp_path / "c").mkdir()
    assert again([FileSource(b.path.rename(tmp_path / "c" / "x.jsonl"))], both) == ["b-x.jsonl"]


def test_relative_paths_are_the_same_inputs(a: FileSource, monkeypatch: pytest.MonkeyPatch) -> None:
    there = manifests([Shard(OUT / "other", (a,))])
    os.utime(a.path, (1, 1))
    monkeypatch.chdir(a.path.parent)
    assert again([FileSource(Path("x.jsonl"))], there) == ["other"]


def test_files_that_are_alike_are_told_apart_by_their_places(a: FileSource, tmp_path: Path) -> None:
    twin = file(tmp_path / "b" / "x.jsonl", "of b")
    for source in (a, twin):
        os.utime(source.path, (1, 1))
    assert a.identity() == twin.identity()
    assert again([twin, a], manifests(shards_of(OUT, [a], {}, False))) == ["b-x.jsonl", "x"]


def test_another_file_of_the_same_name_replaces_nothing(a: FileSource, b: FileSource) -> None:
    there = manifests(shards_of(OUT, [a], {}, False))
    with pytest.raises(UserError, match=r"out/x was made of other data than .*b/x\.jsonl.*--overwrite"):
        again([b], there)
    assert again([b], there, overwrite=True) == ["x"]


def test_an_input_in_a_dataset_of_several_is_refused(a: FileSource, b: FileSource) -> None:
    with pytest.raises(UserError, match=r"a/x\.jsonl is in out/all already"):
        again([a], manifests([Shard(OUT / "all", (a, b))]))


def parts(count: int, content: str = "1") -> list[HubSource]:
    dataset = HubDataset("some/set", revision=f"commit{content}")
    return [HubSource(dataset, content, index, count) for index in range(count)]


def test_a_data_set_that_has_changed_is_refused() -> None:
    there = manifests(shards_of(OUT, parts(2), {}, False))
    assert again(parts(2), there) == list(there)
    for overwrite in (False, True):
        with pytest.raises(
            UserError, match=r"out has some-set-train in 2 parts, but it has 3 now.*revision commit1"
        ):
            again(parts(3), there, overwrite)
    with pytest.raises(UserError, match=r"other data than some/set/train, part 1 of 2.*revision commit1"):
        again(parts(2, "2"), there)
    assert again(parts(2, "2"), there, overwrite=True) == list(there)
    other = [replace(part, dataset=HubDataset("other/set")) for part in parts(3)]
    assert again(other, there) == [part.name for part in other]
