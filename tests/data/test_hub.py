"""A Hugging Face data set in a local directory: its parts, its rows, what is wrong with it."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from megatron_dyt.data.dataset_manifest import Fields
from megatron_dyt.data.hub import HubDataset, find
from megatron_dyt.data.sources import BrokenSourceError, Document, Malformed, _zstd
from megatron_dyt.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "set"
    path.mkdir()
    for part in range(3):
        rows = [{"text": f"{part} {row}", "meta": {"pile_set_name": "ABC"[part]}} for row in range(4)]
        (path / f"train-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_part_for_each_file_and_all_rows_once(directory: Path) -> None:
    parts = find(HubDataset(str(directory)), Fields())
    assert [part.name.rsplit("-", 3)[1] for part in parts] == ["00000", "00001", "00002"]
    found = [[item for _position, item in part.read(Fields())] for part in parts]
    assert found == [[Document(f"{part} {row}", "ABC"[part]) for row in range(4)] for part in range(3)]


def test_identity_changes_with_the_files(directory: Path) -> None:
    dataset = HubDataset(str(directory))
    before = [part.identity() for part in find(dataset, Fields())]
    assert before == [part.identity() for part in find(dataset, Fields())]
    os.utime(directory / "train-1.jsonl", (1, 1))
    assert before != [part.identity() for part in find(dataset, Fields())]


def test_all_parts_are_of_the_commit_that_the_data_set_had_at_the_start(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the Hub, in whose place a directory stands, it may get another between two parts."""
    load, commits, read = datasets.load_dataset, {None: "first"}, []

    def builder(path: str, config: str | None, revision: str | None) -> SimpleNamespace:
        files = SimpleNamespace(origin_metadata=[(path, commits.get(revision, revision))] * 3)
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": files}), hash="hash")

    def stream(path: str, config: str | None, revision: str | None, **options: Any) -> Any:
        read.append(commits.get(revision, revision))
        return load(str(directory), config, **options)

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(datasets, "load_dataset", stream)
    parts = find(HubDataset("some/set"), Fields())
    commits[None] = "second"
    for part in parts:
        assert len(list(part.read(Fields()))) == 4
    assert read == ["first"] * 4
    assert [part.identity()["revision"] for part in parts] == ["first"] * 3
    # What a run that goes on with them gives.
    same = find(HubDataset("some/set", revision="first"), Fields())
    assert [part.identity() for part in same] == [part.identity() for part in parts]
    assert parts[0].identity() != find(HubDataset("some/set"), Fields())[0].identity()


def test_rows_without_text_are_malformed(directory: Path) -> None:
    (directory / "train-0.jsonl").write_text('{"text": [1]}\n{"text": null}\n')
    part = find(HubDataset(str(directory)), Fields())[0]
    assert [item for _position, item in part.read(Fields())] == [
        Malformed(1, '"text" is not a string', "it is list"),
        Document(""),
    ]


def test_text_in_a_record_of_the_record(directory: Path) -> None:
    part = find(HubDataset(str(directory)), Fields("meta.pile_set_name"))[0]
    assert next(item for _position, item in part.read(Fields("meta.pile_set_name"))) == Document("A", "A")


def test_zstd_of_several_frames(directory: Path) -> None:
    for path in directory.glob("*.jsonl"):
        lines = path.read_bytes().splitlines(keepends=True)
        path.with_name(f"{path.name}.zst").write_bytes(b"".join(map(_zstd().compress, lines)))
        path.unlink()
    parts = find(HubDataset(str(directory)), Fields())
    assert [item for _position, item in parts[1].read(Fields())] == [
        Document(f"1 {row}", "B") for row in range(4)
    ]


def test_a_file_without_rows_is_a_part_without_documents(directory: Path) -> None:
    (directory / "train-1.jsonl").write_text("")
    parts = find(HubDataset(str(directory)), Fields())
    assert [len(list(part.read(Fields()))) for part in parts] == [4, 0, 4]


def test_bad_data_sets_are_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be opened.*--hf-split"):
        find(HubDataset(str(directory), split="nonsense"), Fields())
    with pytest.raises(UserError, match=r'no column "body"; it has text, meta'):
        find(HubDataset(str(directory)), Fields("body"))
    parts = find(HubDataset(str(directory)), Fields())
    (directory / "train-2.jsonl").write_text('{"text": "2 0"}\n{"text": cut')
    with pytest.raises(BrokenSourceError, match="part 3 of 3: reading failed after"):
        list(parts[2].read(Fields()))
