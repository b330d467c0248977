"""One dataset: from its sources to P.bin, P.idx and P.manifest.json, whole or not at all.

Shapes: T tokens and D documents of one batch of text.
"""

import itertools
import json
import os
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
    unfinished_mark,
)
from megatron_dyt.data.indexed_dataset import IndexedDatasetWriter
from megatron_dyt.data.sources import (
    NO_JSON,
    NO_OBJECT,
    NO_UTF8,
    BrokenSourceError,
    Document,
    FileSource,
    Malformed,
    Source,
)
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
        # What has no manifest and no mark is another program's. Of ours, an old manifest must not vouch for a
        # half-replaced dataset.
        unfinished_mark(shard.prefix).touch()
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
        # A relative path is another file in another working directory.
        sources=[
            os.path.abspath(source.path) if isinstance(source, FileSource) else str(source)
            for source in shard.sources
        ],
        outputs={
            path.name: Output(path.stat().st_size, checksums[path]) for path in outputs if path.is_file()
        },
        made_from=made_from,
    )
    manifest.write(shard.prefix)
    unfinished_mark(shard.prefix).unlink(missing_ok=True)
    return manifest


def _write_malformed(path: Path, named: list[dict[str, str | int]]) -> None:
    if named:
        write_atomically(path, "".join(json.dumps(each) + "\n" for each in named).encode())
    else:
        path.unlink(missing_ok=True)


@dataclass
class _Read:
    """What the records of one source were so far; good ones are those with a text, taken or filtered."""

    good: int = 0
    empty: int = 0
    malformed: int = 0
    first: Malformed | None = None


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
        for position, texts in self._batches():
            ids, lengths = self.encode([document.text for document in texts])
            # A text of spaces may be nothing to a tokenizer.
            batch = list(itertools.compress(texts, lengths))
            self.counts.empty_documents += len(texts) - len(batch)
            ids, lengths = self._with_ends(ids, lengths[lengths > 0])
            self.writer.add(ids, lengths)
            for document, tokens in zip(batch, lengths.tolist(), strict=True):
                self.counts.add_document(document.text, document.domain, tokens)
            report(position, self.counts)

    def _batches(self) -> Iterator[tuple[int, list[Document]]]:
        """Yield (bytes read so far, documents that are to be written), also where all were left out."""
        batch: list[Document] = []
        read = size = 0
        for source in self.shard.sources:
            of_source = _Read()
            for position, item in source.read(self.settings.fields):
                if isinstance(item, Malformed):
                    self._note(item, source, of_source)
                    # The pass over the rest may take hours.
                    if of_source.malformed >= MAX_MALFORMED_WITHOUT_TEXT:
                        self._check_any_text(source, of_source)
                elif self._wanted(item, of_source):
                    batch.append(item)
                # A record costs something even when it is short.
                size += _RECORD_CHARACTERS + (len(item.text) if isinstance(item, Document) else 0)
                if size >= BATCH_CHARACTERS:
                    yield read + position, batch
                    batch, size = [], 0
            self._check_any_text(source, of_source)
            read += source.size
        yield read, batch

    def _wanted(self, document: Document, of_source: _Read) -> bool:
        if not document.text:
            self.counts.empty_documents += 1
            of_source.empty += 1
            return False
        of_source.good += 1
        reason = self.settings.filters.reason(document.text, document.domain)
        if reason:
            self.counts.add_filtered(reason)
        return not reason

    def _note(self, item: Malformed, source: Source, of_source: _Read) -> None:
        self.counts.add_malformed(item.kind)
        of_source.malformed += 1
        of_source.first = of_source.first or item
        if len(self.named) < MAX_NAMED:
            problem = f"{item.kind} ({item.detail})"
            self.named.append({"source": str(source), source.unit: item.place, "problem": problem})

    def _check_any_text(self, source: Source, of_source: _Read) -> None:
        """`BrokenSourceError` where all the records of a source that are not empty are malformed."""
        if of_source.good or (first := of_source.first) is None:
            return
        besides = f", besides {of_source.empty:,} empty ones" if of_source.empty else ""
        raise BrokenSourceError(
            f"there is no text in {source}: {of_source.malformed:,} records and all malformed{besides}. The "
            f"first, {source.unit} {first.place}: {first.kind} ({first.detail}). {self._hint(first)}"
        )

    def _hint(self, first: Malformed) -> str:
        """What to do about a source whose first malformed record is `first`."""
        key = self.settings.fields.text
        if first.kind == NO_JSON or (first.kind == NO_OBJECT and first.detail == "a list"):
            return "One record to a line is read; of an array: jq -c '.[]' FILE"
        whole = len(self.shard.sources) == 1
        hint = (
            "--skip-broken-shards leaves this out" if whole else "To go on without it, leave this input out"
        )
        if first.kind == NO_UTF8:
            return f"Convert it (iconv -t UTF-8); {hint}"
        if f'"{key}"' in first.kind:
            return f"--json-key says under which key the text is, now {key!r}; {hint}"
        return hint

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
