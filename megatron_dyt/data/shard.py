"""One shard: from its sources to P.bin, P.idx and P.manifest.json, whole or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dyt.atomic import (
    partial_path,
    read_json,
    sha256,
    sole_writer,
    whole_files,
    write_atomically,
    write_json,
)
from megatron_dyt.data.dataset_manifest import FORMAT, manifest_path
from megatron_dyt.data.indexed_dataset import IndexedDatasetWriter
from megatron_dyt.data.records import Document, Malformed
from megatron_dyt.data.settings import Settings, Shard
from megatron_dyt.data.sources import BrokenSourceError, Source
from megatron_dyt.data.tokenizers import Encoder
from megatron_dyt.data.word_cache import Ids
from megatron_dyt.data.word_table import Integers

# Text that is encoded and written at a time.
BATCH_CHARACTERS = 1 << 20
_RECORD = 100
# Malformed records that are named one by one; the manifest counts all.
MAX_REPORTED = 1000
# So many malformed records and no good one: the wrong key, or no corpus at all.
HOPELESS = 1000
# A corpus has some dozens of domains; thousands are a key that means something else.
MAX_DOMAINS = 1000

# Called with the bytes read and the counts, now and then.
Report = Callable[[int, "Counts"], None]


@dataclass
class Counts:
    """What went into a dataset, and what was left out: empty, malformed and filtered records."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty_documents: int = 0
    malformed: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    domains: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, document: Document, tokens: int) -> None:
        """Count a document that was written, its BOS and EOD among the tokens."""
        size = len(document.text.encode())
        self.documents += 1
        self.tokens += tokens
        self.text_bytes += size
        if document.domain is not None:
            domain = document.domain
            if domain not in self.domains and len(self.domains) >= MAX_DOMAINS:
                domain = "other"
            entry = self.domains.setdefault(domain, {"documents": 0, "tokens": 0, "text_bytes": 0})
            entry["documents"] += 1
            entry["tokens"] += tokens
            entry["text_bytes"] += size


def output_paths(prefix: Path) -> tuple[Path, Path]:
    """The data and index files of a dataset prefix."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def report_path(prefix: Path) -> Path:
    """Where malformed records are named."""
    return prefix.with_name(prefix.name + ".malformed.jsonl")


def all_paths(prefix: Path) -> tuple[Path, ...]:
    """Every file that a dataset may have."""
    return (*output_paths(prefix), manifest_path(prefix), report_path(prefix))


def made_from(shard: Shard, settings: Settings) -> dict[str, Any]:
    """What must be equal for an existing dataset to be the one that is asked for."""
    return {**settings.made_from(), "sources": shard.identities()}


def finished(shard: Shard, settings: Settings) -> dict[str, Any] | None:
    """The shard's manifest if it and its files are what these settings give, else None."""
    manifest = read_json(manifest_path(shard.prefix))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    if manifest["made_from"] != made_from(shard, settings):
        return None
    paths = [shard.prefix.with_name(name) for name in manifest["outputs"]]
    sizes = {path.name: path.stat().st_size for path in paths if path.is_file()}
    expected = {name: output["bytes"] for name, output in manifest["outputs"].items()}
    return manifest if sizes == expected else None


def write(shard: Shard, settings: Settings, encode: Encoder, report: Report) -> dict[str, Any]:
    """Write the shard and return its manifest. Memory is bounded by the largest document.

    Raises:
        BrokenSourceError: a source cannot be read to its end, or there is no text.
        UserError: another process is writing it.
    """
    data, _index = output_paths(shard.prefix)
    with sole_writer(data):
        # Another process may have finished it since this one looked.
        if manifest := finished(shard, settings):
            partial_path(data).unlink()
            return manifest
        return _write(shard, settings, encode, report)


def _write(shard: Shard, settings: Settings, encode: Encoder, report: Report) -> dict[str, Any]:
    origin = made_from(shard, settings)
    outputs = data, index = output_paths(shard.prefix)
    with whole_files(outputs) as (partial_data, partial_index):
        work = _Work(
            settings, encode, IndexedDatasetWriter(partial_data, partial_index, settings.tokenizer.dtype)
        )
        try:
            work.run(shard, report)
            work.writer.finish()
        finally:
            work.writer.close()
        checksums = {data.name: work.writer.digest.hexdigest(), index.name: sha256(partial_index)}
        # An old manifest must not vouch for a half-replaced dataset.
        manifest_path(shard.prefix).unlink(missing_ok=True)
    if not work.counts.documents:
        # All were filtered out, and a dataset without documents is an error to Megatron.
        for path in outputs:
            path.unlink()
    _write_report(report_path(shard.prefix), work.named)
    manifest = {
        "format": FORMAT,
        **vars(work.counts),
        "dtype": np.dtype(settings.tokenizer.dtype).name,
        "vocab_size": settings.tokenizer.vocab_size,
        "tokenizer": settings.tokenizer.name,
        "sources": [str(source) for source in shard.sources],
        "outputs": {
            path.name: {"bytes": path.stat().st_size, "sha256": checksums[path.name]}
            for path in outputs
            if path.is_file()
        },
        "made_from": origin,
    }
    write_json(manifest_path(shard.prefix), manifest)
    return manifest


def _write_report(path: Path, named: list[dict[str, Any]]) -> None:
    if named:
        write_atomically(path, "".join(json.dumps(each) + "\n" for each in named).encode())
    else:
        path.unlink(missing_ok=True)


class _Work:
    """Reading, encoding and writing of one shard."""

    def __init__(self, settings: Settings, encode: Encoder, writer: IndexedDatasetWriter) -> None:
        self.settings, self.encode, self.writer = settings, encode, writer
        tokenizer = settings.tokenizer
        self.begin = [tokenizer.bos] if settings.bos else []
        self.end = [tokenizer.eos] if settings.append_eod else []
        self.counts = Counts()
        self.named: list[dict[str, Any]] = []

    def run(self, shard: Shard, report: Report) -> None:
        for position, batch in self._batches(shard):
            ids, lengths = self.encode([document.text for document in batch])
            ids, lengths = self._with_ends(ids, lengths)
            self.writer.add(ids, lengths)
            for document, tokens in zip(batch, lengths.tolist(), strict=True):
                self.counts.add(document, tokens)
            report(position, self.counts)
        if not self.counts.documents and not self.counts.filtered:
            raise BrokenSourceError(self._no_text(shard))

    def _batches(self, shard: Shard) -> Iterator[tuple[int, list[Document]]]:
        """Yield (bytes read so far, documents that are to be written), also where all were left out."""
        batch: list[Document] = []
        read = size = 0
        for source in shard.sources:
            for position, item in source.read(self.settings.fields):
                if isinstance(item, Malformed):
                    self._note(item, source)
                    self._check_hope(shard, batch)
                elif self._wanted(item):
                    batch.append(item)
                # A record costs something even when it is short.
                size += _RECORD + (len(item.text) if isinstance(item, Document) else 0)
                if size >= BATCH_CHARACTERS:
                    yield read + position, batch
                    batch, size = [], 0
            read += source.size
        yield read, batch

    def _wanted(self, document: Document) -> bool:
        if not document.text:
            self.counts.empty_documents += 1
            return False
        reason = self.settings.filters.why_not(document)
        if reason:
            self.counts.filtered[reason] += 1
        return not reason

    def _note(self, item: Malformed, source: Source) -> None:
        self.counts.malformed[item.kind] += 1
        if len(self.named) < MAX_REPORTED:
            problem = f"{item.kind} ({item.detail})"
            self.named.append({"source": str(source), source.unit: item.place, "problem": problem})

    def _check_hope(self, shard: Shard, batch: list[Document]) -> None:
        """Stop early where nothing at all is good: the pass over the rest may take hours."""
        some = batch or self.counts.documents or self.counts.filtered
        if self.counts.malformed.total() >= HOPELESS and not some:
            raise BrokenSourceError(self._no_text(shard))

    def _no_text(self, shard: Shard) -> str:
        where = ", ".join(map(str, shard.sources))
        if not self.named:
            return f"there is no text in {where}: all its documents are empty"
        unit = shard.sources[0].unit
        return (
            f"there is no text in {where}: {self.counts.malformed.total():,} records and all malformed. The "
            f"first, {unit} {self.named[0].get(unit)}: {self.named[0]['problem']}. --json-key says under "
            f"which key the text is, now {self.settings.fields.text!r}"
        )

    def _with_ends(self, ids: Ids, lengths: Integers) -> tuple[Ids, Integers]:
        """BOS before and EOD behind every document, as the settings say."""
        extra = len(self.begin) + len(self.end)
        if not extra:
            return ids, lengths
        lengths = lengths + extra
        ends = np.cumsum(lengths)
        whole = np.empty(len(ids) + extra * len(lengths), ids.dtype)
        is_text = np.ones(len(whole), np.bool_)
        for places, special in ((ends - lengths, self.begin), (ends - 1, self.end)):
            if special:
                whole[places] = special
                is_text[places] = False
        whole[is_text] = ids
        return whole, lengths
