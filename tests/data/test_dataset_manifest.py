"""Manifests: read and written, those of earlier versions too, and summed up over a directory."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dyt.data.dataset_manifest import (
    Amount,
    Counts,
    DatasetManifest,
    DirectoryManifest,
    Fields,
    Filters,
    manifests,
)
from megatron_dyt.errors import UserError
from tests.data.samples import manifest

# As this package has written it since format 3: the keys are the interface.
WRITTEN: dict[str, Any] = {
    "format": 3,
    **{"documents": 2, "tokens": 30, "text_bytes": 90, "empty_documents": 1},
    **{"malformed": {"not UTF-8": 1}, "filtered": {"domain": 4}},
    "domains": {"ArXiv": {"documents": 1, "tokens": 20, "text_bytes": 60}},
    **{"dtype": "uint16", "vocab_size": 600, "tokenizer": "t.model", "sources": ["a.jsonl"]},
    "outputs": {"a.bin": {"bytes": 60, "sha256": "cd"}, "a.idx": {"bytes": 80, "sha256": "ef"}},
    "made_from": {
        "tokenizer": {"type": "SentencePieceTokenizer", "sha256": "ab", "bos": 1, "eos": None},
        **{"bos": True, "append_eod": False, "fields": {"text": "text", "domain": "source"}},
        "filters": {"min_characters": 0, "max_characters": None, "domains": ["ArXiv"], "not_domains": []},
        "sources": [{"name": "a.jsonl", "bytes": 123, "mtime_ns": 5}],
    },
}


def test_a_manifest_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.manifest.json"
    path.write_text(json.dumps(WRITTEN))
    read = DatasetManifest.read(tmp_path / "a")
    assert read
    assert read.domains == {"ArXiv": Amount(1, 20, 60)}
    assert read.made_from.fields == Fields(domain="source")
    assert read.made_from.filters == Filters(domains=("ArXiv",))
    assert read.made_from.sources == ({"name": "a.jsonl", "bytes": 123, "mtime_ns": 5},)
    read.write(tmp_path / "a")
    assert json.loads(path.read_text()) == WRITTEN


@pytest.mark.parametrize(
    "content",
    ["", "[]", "3", '{"format": 3}', json.dumps(WRITTEN | {"format": 2})]
    + [json.dumps({name: value for name, value in WRITTEN.items() if name != left}) for left in WRITTEN]
    + [json.dumps(WRITTEN | {"made_from": value}) for value in (3, {}, {"tokenizer": {}})],
)
def test_what_is_damaged_or_of_another_version_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.manifest.json").write_text(content)
    assert DatasetManifest.read(tmp_path / "a") is None
    assert manifests(tmp_path) == {}


def test_settings_that_differ_are_named() -> None:
    one = manifest().made_from
    other = replace(manifest(bos=False).made_from, fields=Fields("body"), sources=())
    assert one.differing(other) == ["bos", "fields"]
    assert one.differing(replace(one, sources=())) == []


def test_too_many_domains_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_dyt.data.dataset_manifest.MAX_DOMAINS", 1)
    counts = Counts()
    for domain in ("A", "B", None, "C", "A"):
        counts.add_document("é", domain, 3)
    assert counts == Counts(5, 15, 10, domains={"A": Amount(2, 6, 4), "other": Amount(2, 6, 4)})


def test_a_directory_is_the_sum_of_its_datasets(tmp_path: Path) -> None:
    (tmp_path / "a.manifest.json").write_text(json.dumps(WRITTEN))
    manifest().write(tmp_path / "b")
    found = manifests(tmp_path)
    made_from = found["a"].made_from
    DirectoryManifest.over(found, {"c": "is damaged"}, "t.model", 600, made_from).write(tmp_path)
    whole = DirectoryManifest.read(tmp_path)
    assert whole.documents == 2 + found["b"].documents
    assert (whole.malformed, whole.domains) == ({"not UTF-8": 1}, {"ArXiv": Amount(1, 20, 60)})
    assert list(whole.shards) == ["a", "b"]
    assert whole.shards["a"].outputs == found["a"].outputs
    assert whole.left_out()["broken shards"] == 1
    (tmp_path / "manifest.json").write_text(json.dumps(WRITTEN))
    with pytest.raises(UserError, match=r"has no manifest\.json of prepare-data"):
        DirectoryManifest.read(tmp_path)
