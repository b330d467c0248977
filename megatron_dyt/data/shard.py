"""One dataset: from its sources to P.bin, P.idx and P.manifest.json, whole or not at all.

Shapes: T tokens and D documents of one batch of text.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_dyt.atomic import partial_path, sha256, sole_writer, whole_files, write_atomically
from megatron_dyt.data.dataset_manifest import (
    Counts,
    DatasetManifest,
    Fields,
    Filters,
    MadeFrom,
    MadeFromSources,
    Output,
    malformed_path,
    manifest_path,
    output_paths,
)
from megatron_dyt.data.indexed_dataset import IndexedDatasetWriter
from megatron_dyt.data.sources import NO_JSON, BrokenSourceError, Document, Malformed, Source
from megatron_dyt.data.tokenizers import Encoder, Tokenizer
from megatron_dyt.data.word_cache import Ids
from megatron_dyt.data.word_table import Integers

# Text that is encoded and written at a time: long enough that NumPy's calls cost nothing beside it, short
# enough for a worker of 160 MB.
BATCH_CHARACTERS = 1 << 20
# What a record counts for in a batch besides its characters: a million empty ones are several batches.
_RECORD_CHARACTERS = 100
# Malformed records that are named one by one; the manifest counts all.
MAX_NAMED = 1000
# So many malformed records and no good one: the wrong key, or no corpus. The rest may take hours to read.
MAX_MALFORMED_WITHOUT_TEXT = 1000

# Called with the bytes read and the counts, after each batch.
Report = Callable[[int, Counts], None]


@dataclass(frozen=True)
class Settings:
    """What determines the ids, besides the sources."""

    tokenizer: Tokenizer
    bos: bool = True
    append_eod: bool = True
    fields: Fields = field(default_factory=Fields)
    filters: Filters = field(default_factory=Filters)

    def made_from(self) -> MadeFrom:
        """As a manifest holds it."""
        return MadeFrom(self.tokenizer.identity(), self.bos, self.append_eod, self.fields, self.filters)


@dataclass(frozen=True)
class Shard:
    """One dataset to be written: its prefix, and the sources that go into it one after the other."""

    prefix: Path
    sources: tuple[Source, ...]

    @property
    def name(self) -> str:
        return self.prefix.name

    @property
    def size(self) -> int:
        """Bytes to read, 0 where unknown."""
        return sum(source.size for source in self.sources)

    def made_from(self, settings: Settings) -> MadeFromSources:
        """What must be equal for an existing dataset to be the one that is asked for."""
        return settings.made_from().with_sources(source.identity() for source in self.sources)


def finished(shard: Shard, settings: Settings) -> DatasetManifest | None:
    """The shard's manifest if it and its files are what these settings give, else None."""
    manifest = DatasetManifest.read(shard.prefix)
    if manifest is None or manifest.made_from != shard.made_from(settings):
        return None
    return manifest if manifest.is_complete(shard.prefix) else None


def write(shard: Shard, settings: Settings, encode: Encoder, report: Report) -> DatasetManifest:
    """Write the shard and return its manifest. Memory is bounded by the largest document.

    Raises:
        BrokenSourceError: a source cannot be read to its end, or all its records are malformed.
        UserError: another process is writing it.
    """
    data, _index = output_paths(shard.prefix)
    with sole_writer(data):
        # Another process may have finished it since this one looked.
        if manifest := finished(shard, settings):
            partial_path(data).unlink()
            return manifest
        return _write(shard, settings, encode, report)


def _write(shard: Shard, settings: Settings, encode: Encoder, report: Report) -> DatasetManifest:
    # Before the sources are read: what changes meanwhile must not count as read.
    made_from = shard.made_from(settings)
    outputs = data, index = output_paths(shard.prefix)
    tokenizer = settings.tokenizer
    with whole_files(outputs) as (partial_data, partial_index):
        with IndexedDatasetWriter(partial_data, partial_index, tokenizer.dtype) as writer:
            work = _Work(shard, settings, encode, writer)
            work.run(report)
            writer.finish()
        checksums = {data: writer.sha256(), index: sha256(partial_index)}
        # An old manifest must not vouch for a half-replaced dataset.
        manifest_path(shard.prefix).unlink(missing_ok=True)
    if not work.counts.documents:
        # All were empty or filtered out, and a dataset without documents is an error to Megatron.
        for path in outputs:
            path.unlink()
    _write_malformed(malformed_path(shard.prefix), work.named)
    manifest = DatasetManifest(
        **vars(work.counts),
        dtype=np.dtype(tokenizer.dtype).name,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.name,
        sources=[str(source) for source in shard.sources],
        outputs={
            path.name: Output(path.stat().st_size, checksums[path]) for path in outputs if path.is_file()
        },
        made_from=made_from,
    )
    manifest.write(shard.prefix)
    return manifest


def _write_malformed(path: Path, named: list[dict[str, str | int]]) -> None:
    if named:
        write_atomically(path, "".join(json.dumps(each) + "\n" for each in named).encode())
    else:
        path.unlink(missing_ok=True)


class _Work:
    """Reading, encoding and writing of one shard, a batch of text at a time."""

    def __init__(
        self, shard: Shard, settings: Settings, encode: Encoder, writer: IndexedDatasetWriter
    ) -> None:
        self.shard, self.settings, self.encode, self.writer = shard, settings, encode, writer
        tokenizer = settings.tokenizer
        self.begin = [tokenizer.bos] if settings.bos else []
        self.end = [tokenizer.eos] if settings.append_eod else []
        self.counts = Counts()
        # As they go to the file of malformed records.
        self.named: list[dict[str, str | int]] = []

    def run(self, report: Report) -> None:
        for position, batch in self._batches():
            ids, lengths = self.encode([document.text for document in batch])
            ids, lengths = self._with_ends(ids, lengths)
            self.writer.add(ids, lengths)
            for document, tokens in zip(batch, lengths.tolist(), strict=True):
                self.counts.add_document(document.text, document.domain, tokens)
            report(position, self.counts)
        if self.named and not self.counts.documents and not self.counts.filtered:
            raise BrokenSourceError(self._no_text())

    def _batches(self) -> Iterator[tuple[int, list[Document]]]:
        """Yield (bytes read so far, documents that are to be written), also where all were left out."""
        batch: list[Document] = []
        read = size = 0
        for source in self.shard.sources:
            for position, item in source.read(self.settings.fields):
                if isinstance(item, Malformed):
                    self._note(item, source)
                    self._check_any_text(batch)
                elif self._wanted(item):
                    batch.append(item)
                # A record costs something even when it is short.
                size += _RECORD_CHARACTERS + (len(item.text) if isinstance(item, Document) else 0)
                if size >= BATCH_CHARACTERS:
                    yield read + position, batch
                    batch, size = [], 0
            read += source.size
        yield read, batch

    def _wanted(self, document: Document) -> bool:
        if not document.text:
            self.counts.empty_documents += 1
            return False
        reason = self.settings.filters.reason(document.text, document.domain)
        if reason:
            self.counts.add_filtered(reason)
        return not reason

    def _note(self, item: Malformed, source: Source) -> None:
        self.counts.add_malformed(item.kind)
        if len(self.named) < MAX_NAMED:
            problem = f"{item.kind} ({item.detail})"
            self.named.append({"source": str(source), source.unit: item.place, "problem": problem})

    def _check_any_text(self, batch: list[Document]) -> None:
        """Stop early where nothing at all is good: the pass over the rest may take hours."""
        some = batch or self.counts.documents or self.counts.filtered
        if sum(self.counts.malformed.values()) >= MAX_MALFORMED_WITHOUT_TEXT and not some:
            raise BrokenSourceError(self._no_text())

    def _no_text(self) -> str:
        where = ", ".join(map(str, self.shard.sources))
        unit = self.shard.sources[0].unit
        count = sum(self.counts.malformed.values())
        empty = self.counts.empty_documents
        besides = f", besides {empty:,} empty ones" if empty else ""
        hint = (
            f"--json-key says under which key the text is, now {self.settings.fields.text!r}; "
            "--skip-broken-shards leaves this out"
        )
        if str(self.named[0]["problem"]).startswith(NO_JSON):
            hint = "One record to a line is read; of an array: jq -c '.[]' FILE"
        return (
            f"there is no text in {where}: {count:,} records and all malformed{besides}. The first, {unit} "
            f"{self.named[0].get(unit)}: {self.named[0]['problem']}. {hint}"
        )

    def _with_ends(self, ids: Ids, lengths: Integers) -> tuple[Ids, Integers]:
        """BOS before and EOD behind every document, if set: (T,), (D,) -> (T + extra * D,), (D,)"""
        # Tokens that each document gets.
        extra = len(self.begin) + len(self.end)
        if not extra:
            return ids, lengths
        lengths = lengths + extra
        ends = np.cumsum(lengths)  # (D,)
        whole = np.empty(len(ids) + extra * len(lengths), ids.dtype)  # (T + extra * D,)
        is_text = np.ones(len(whole), np.bool_)  # (T + extra * D,)
        for places, special in ((ends - lengths, self.begin), (ends - 1, self.end)):
            if special:
                whole[places] = special
                is_text[places] = False
        whole[is_text] = ids
        return whole, lengths
