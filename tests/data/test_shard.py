"""One shard: documents, counts, reports, and outputs that are complete or absent."""

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_dyt.atomic import sole_writer
from megatron_dyt.data import shard as shard_module
from megatron_dyt.data.dataset_manifest import (
    Amount,
    Counts,
    DatasetManifest,
    Fields,
    Filters,
    Output,
)
from megatron_dyt.data.indexed_dataset import IndexedDatasetWriter
from megatron_dyt.data.shard import Settings, Shard, finished, write
from megatron_dyt.data.sources import BrokenSourceError, FileSource
from megatron_dyt.data.word_cache import Ids
from megatron_dyt.data.word_table import Integers
from megatron_dyt.errors import UserError
from tests.data.samples import documents, source_texts

DOMAINS = ["Github", "ArXiv", None]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Ten documents, three of them without a domain; an empty one, a blank line and two malformed ones."""
    lines = []
    for number, text in enumerate(source_texts()):
        domain = DOMAINS[number % 3]
        lines.append(json.dumps({"text": text} | ({"meta": {"pile_set_name": domain}} if domain else {})))
    lines[3:3] = ['{"text": ""}', "", '{"text": cut', '{"body": "x"}']
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def make(settings: Settings, *sources: Path, name: str = "out") -> DatasetManifest:
    shard = Shard(sources[0].parent / name, tuple(map(FileSource, sources)))
    return write(shard, settings, settings.tokenizer.encoder(), lambda read, counts: None)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("batch", [1, 20_000, 1 << 20])
@pytest.mark.parametrize(("bos", "eod"), [(True, True), (True, False), (False, True), (False, False)])
def test_documents_are_the_texts_with_their_ends(
    settings: Settings, corpus: Path, monkeypatch: pytest.MonkeyPatch, batch: int, bos: bool, eod: bool
) -> None:
    monkeypatch.setattr(shard_module, "BATCH_CHARACTERS", batch)
    make(Settings(settings.tokenizer, bos, eod), corpus)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(settings.tokenizer.file))
    expected = [[1] * bos + ids + [2] * eod for ids in processor.encode(source_texts())]
    assert documents(corpus.with_name("out")) == expected


def test_what_another_process_has_finished_is_not_written_again(settings: Settings, corpus: Path) -> None:
    manifest = make(settings, corpus)
    before = names(corpus.parent)
    os.utime(corpus.with_name("out.bin"), (1, 1))
    assert make(settings, corpus) == manifest
    assert corpus.with_name("out.bin").stat().st_mtime == 1
    assert names(corpus.parent) == before


def test_manifest_says_what_there_is(settings: Settings, corpus: Path) -> None:
    manifest = make(settings, corpus)
    directory = corpus.parent
    found = documents(directory / "out")
    assert manifest == DatasetManifest.read(directory / "out")
    assert (manifest.documents, manifest.empty_documents) == (10, 2)
    assert manifest.tokens == sum(map(len, found))
    assert manifest.text_bytes == sum(len(text.encode()) for text in source_texts())
    assert manifest.malformed == {"not valid JSON": 1, 'no "text"': 1}
    assert manifest.domains == {
        domain: Amount(
            len(found[start::3]),
            sum(map(len, found[start::3])),
            sum(len(text.encode()) for text in source_texts()[start::3]),
        )
        for start, domain in enumerate(["Github", "ArXiv"])
    }
    assert (manifest.dtype, manifest.sources) == ("uint16", [str(corpus)])
    for name, output in manifest.outputs.items():
        content = (directory / name).read_bytes()
        assert output == Output(len(content), hashlib.sha256(content).hexdigest())
    assert names(directory) == [
        *("corpus.jsonl", "out.bin", "out.idx", "out.malformed.jsonl", "out.manifest.json"),
    ]


def test_malformed_records_are_named_and_the_list_is_bounded(
    settings: Settings, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(settings, corpus)
    report = corpus.with_name("out.malformed.jsonl")
    first, second = map(json.loads, report.read_text().splitlines())
    assert (first["source"], first["line"]) == (str(corpus), 6)
    assert first["problem"].startswith("not valid JSON (")
    assert second == {"source": str(corpus), "line": 7, "problem": "no \"text\" (it has 'body')"}
    monkeypatch.setattr(shard_module, "MAX_NAMED", 1)
    os.utime(corpus, (1, 1))
    assert sum(make(settings, corpus).malformed.values()) == 2
    assert len(report.read_text().splitlines()) == 1
    # What is mended is not named any longer.
    corpus.write_text('{"text": "good"}\n')
    make(settings, corpus)
    assert not report.exists()


def test_several_sources_are_one_dataset(settings: Settings, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "one more"}\n')
    manifest = make(settings, other, corpus)
    assert manifest.documents == 11
    assert settings.tokenizer.encoder()(["one more"])[0].tolist() == documents(tmp_path / "out")[0][1:-1]


@pytest.mark.parametrize(
    ("filters", "kept", "why"),
    [
        (Filters(), range(10), {}),
        (Filters(min_characters=30_000), None, "too short"),
        (Filters(max_characters=30_000), None, "too long"),
        (Filters(domains=("ArXiv",)), [1, 4, 7], "domain"),
        (Filters(not_domains=("ArXiv", "Books")), [0, 2, 3, 5, 6, 8, 9], "domain"),
    ],
)
def test_filters_leave_out_and_count(
    settings: Settings, corpus: Path, filters: Filters, kept: list[int] | None, why: str
) -> None:
    if kept is None:
        short = [len(text) < 30_000 for text in source_texts()]
        kept = [number for number in range(10) if short[number] == (why == "too long")]
        assert 0 < len(kept) < 10
    manifest = make(Settings(settings.tokenizer, filters=filters), corpus)
    _ids, lengths = settings.tokenizer.encoder()([source_texts()[number] for number in kept])
    assert [len(each) - 2 for each in documents(corpus.with_name("out"))] == lengths.tolist()
    assert manifest.filtered == ({why: 10 - len(kept)} if why else {})


def test_a_shard_of_which_nothing_is_left_has_no_files(settings: Settings, corpus: Path) -> None:
    nothing = Settings(settings.tokenizer, filters=Filters(domains=("Books",)))
    manifest = make(nothing, corpus)
    assert (manifest.documents, manifest.outputs) == (0, {})
    assert names(corpus.parent) == ["corpus.jsonl", "out.malformed.jsonl", "out.manifest.json"]
    assert finished(Shard(corpus.with_name("out"), (FileSource(corpus),)), nothing)


def test_texts_without_ids_are_empty(settings: Settings, corpus: Path) -> None:
    """As texts of spaces are to some tokenizers: Megatron takes no document of no tokens."""

    def encode(texts: Sequence[str]) -> tuple[Ids, Integers]:
        ids, lengths = settings.tokenizer.encoder()([text.strip() for text in texts])
        return ids, lengths

    corpus.write_text('{"text": "one"}\n{"text": "  "}\n{"text": "two"}\n')
    for bos in (False, True):
        shard = Shard(corpus.with_name("out"), (FileSource(corpus),))
        manifest = write(shard, Settings(settings.tokenizer, bos, False), encode, lambda read, counts: None)
        assert (manifest.documents, manifest.empty_documents) == (2, 1)
        found = documents(corpus.with_name("out"))
        assert found == [[1] * bos + encode([text])[0].tolist() for text in ("one", "two")]


def test_each_source_must_have_text(settings: Settings, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"body": "x"}\n' * 3)
    for sources in ((corpus, other), (other, corpus)):
        with pytest.raises(
            BrokenSourceError, match=r"no text in .*other\.jsonl: 3 records and all malformed\."
        ):
            make(settings, *sources)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"body": "x"}\n\n{"text": ""}\n', "1 records and all malformed, besides 2 empty ones"),
        ('[\n{"text": "x"},\n{"text": "y"},\n]', r"line 1: not valid JSON .*One record to a line is read"),
        ('[{"text": "x"}]', r"not a JSON object \(a list\)\. One record to a line .* jq -c '\.\[\]' FILE$"),
        ('"x"', r"not a JSON object \(a str\)\. --skip-broken-shards leaves this out$"),
        ("\udcff", r"not UTF-8 \(.*\)\. Convert it \(iconv -t UTF-8\); --skip-broken-shards"),
        ('{"text": 5}', r"is not a string \(it is int\)\. --json-key says"),
        ('{"body": "x"}\n' * 3, r"3 records and all malformed. The first, line 1: no \"text\" .*--json-key"),
        ('{"body": "x"}\n' * 5000 + '{"text": "y"}', r"1,000 records and all malformed"),
    ],
)
def test_no_text_leaves_the_old_dataset_whole(
    settings: Settings, corpus: Path, content: str, problem: str
) -> None:
    make(settings, corpus)
    before = {path.name: path.read_bytes() for path in corpus.parent.glob("out*")}
    corpus.write_text(content, errors="surrogateescape")
    with pytest.raises(BrokenSourceError, match=problem):
        make(settings, corpus)
    assert {path.name: path.read_bytes() for path in corpus.parent.glob("out*")} == before


def test_a_full_disk_leaves_nothing_half(
    settings: Settings, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_module, "BATCH_CHARACTERS", 20_000)
    add = IndexedDatasetWriter.add

    def full(self: IndexedDatasetWriter, *given: Any) -> None:
        if self.documents > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, *given)

    monkeypatch.setattr(IndexedDatasetWriter, "add", full)
    with pytest.raises(OSError, match="No space left"):
        make(settings, corpus)
    assert names(corpus.parent) == ["corpus.jsonl"]


@pytest.mark.parametrize("change", ["nothing", "source", "settings", "bin", "idx", "manifest", "format"])
def test_finished_is_what_the_same_command_would_write(settings: Settings, corpus: Path, change: str) -> None:
    make(settings, corpus)
    shard = Shard(corpus.with_name("out"), (FileSource(corpus),))
    manifest = corpus.with_name("out.manifest.json")
    match change:
        case "source":
            corpus.write_text(corpus.read_text() + "\n")
        case "settings":
            settings = Settings(settings.tokenizer, fields=Fields("body"))
        case "bin" | "idx":
            path = corpus.with_name(f"out.{change}")
            path.write_bytes(path.read_bytes()[:-1])
        case "manifest":
            manifest.unlink()
        case "format":
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 1}))
    assert (finished(shard, settings) is not None) == (change == "nothing")


def test_reports_grow_to_the_whole(settings: Settings, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "BATCH_CHARACTERS", 20_000)
    reports: list[tuple[int, int]] = []

    def report(read: int, counts: Counts) -> None:
        reports.append((read, counts.tokens))

    shard = Shard(corpus.with_name("out"), (FileSource(corpus), FileSource(corpus)))
    manifest = write(shard, settings, settings.tokenizer.encoder(), report)
    assert reports == sorted(reports)
    assert len(set(reports)) > 5
    assert reports[-1] == (2 * corpus.stat().st_size, manifest.tokens)


def test_two_processes_do_not_write_the_same_dataset(settings: Settings, corpus: Path) -> None:
    with sole_writer(corpus.with_name("out.bin")):
        partial = corpus.with_name("out.bin.partial")
        partial.write_bytes(b"half of the ids")
        with pytest.raises(UserError, match=r"out\.bin is being written by another process"):
            make(settings, corpus)
        assert partial.read_bytes() == b"half of the ids", "the one that was refused must not touch it"
    make(settings, corpus)
