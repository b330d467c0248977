"""Tokenize JSON-lines text into a Megatron indexed dataset.

    python -m megatron_dyt.data.prepare --input t.jsonl --tokenizer-model t.model --output-prefix P

writes P.bin and P.idx, for `--train-data-path P` and its like, and P.manifest.json. A document is
BOS + text + EOS, as the DyT paper's LLaMA runs have it; Megatron adds neither at training time. A
second run with the same inputs and settings does nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_dyt.data.files import read_json, sha256, whole_files, write_json
from megatron_dyt.data.jsonl import check_inputs, parse_text, read_lines
from megatron_dyt.data.progress import Progress
from megatron_dyt.errors import UserError, run_main

FORMAT = 1
BATCH_BYTES = 2_000_000


@dataclass(frozen=True)
class Settings:
    """What determines the dataset, besides the content of the sources."""

    sources: tuple[Path, ...]
    tokenizer_model: Path
    bos: bool = True
    append_eod: bool = True


@dataclass
class Counts:
    """What went into the dataset. Empty documents are left out and counted apart."""

    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


@dataclass
class Batch:
    """Documents that are tokenized together; `source_bytes` is what they took in their file."""

    texts: list[str] = field(default_factory=list)
    source_bytes: int = 0


def read_batches(sources: Sequence[Path]) -> Iterator[Batch]:
    """Yield the texts of `sources` in order, about `BATCH_BYTES` at a time."""
    batch = Batch()
    for source in sources:
        for number, line in read_lines(source):
            batch.texts.append(parse_text(line, source, number))
            batch.source_bytes += len(line)
            if batch.source_bytes >= BATCH_BYTES:
                yield batch
                batch = Batch()
    if batch.texts:
        yield batch


class Encoder:
    """Text to token ids with a SentencePiece model, with the document's begin and end around it.

    Raises:
        UserError: the model is missing or unreadable, or lacks a piece that the settings ask for.
    """

    def __init__(self, settings: Settings, threads: int) -> None:
        self.processor = load_tokenizer(settings.tokenizer_model)
        self.threads = threads
        self.prefix = self._special("BOS", "--no-bos") if settings.bos else []
        self.suffix = self._special("EOS", "--no-append-eod") if settings.append_eod else []

    def _special(self, name: str, remedy: str) -> list[int]:
        piece: int = getattr(self.processor, f"{name.lower()}_id")()
        if piece < 0:
            raise UserError(f"the tokenizer has no {name} piece; use another tokenizer or {remedy}")
        return [piece]

    @property
    def vocab_size(self) -> int:
        return int(self.processor.vocab_size())

    def __call__(self, texts: list[str]) -> list[list[int]]:
        encoded = self.processor.encode(texts, num_threads=self.threads)
        return [self.prefix + ids + self.suffix for ids in encoded]


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model; `UserError` when it is missing or not one."""
    if not path.is_file():
        raise UserError(
            f"tokenizer model {path} does not exist; "
            "make one with python -m megatron_dyt.data.train_tokenizer"
        )
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is not a SentencePiece model, or is cut off") from error


def output_paths(prefix: Path) -> tuple[Path, Path, Path]:
    """The data, index and manifest files of a dataset prefix."""
    return (
        prefix.with_name(prefix.name + ".bin"),
        prefix.with_name(prefix.name + ".idx"),
        prefix.with_name(prefix.name + ".manifest.json"),
    )


def fingerprint(settings: Settings) -> dict[str, Any]:
    """What must be equal for an existing dataset to be the one that `settings` asks for.

    Sources are known by size and modification time: hashing a corpus of many TB on every start
    would take hours.
    """
    stats = [(str(source), source.stat()) for source in settings.sources]
    return {
        "format": FORMAT,
        "bos": settings.bos,
        "append_eod": settings.append_eod,
        "tokenizer_sha256": sha256(settings.tokenizer_model),
        "sources": [
            {"path": name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in stats
        ],
    }


def up_to_date(settings: Settings, prefix: Path) -> dict[str, Any] | None:
    """The manifest at `prefix` if it and its files are what `settings` gives, else None."""
    *files, manifest_path = output_paths(prefix)
    manifest = read_json(manifest_path)
    if not isinstance(manifest, dict) or manifest.get("made_from") != fingerprint(settings):
        return None
    sizes = {path.name: path.stat().st_size for path in files if path.is_file()}
    return manifest if manifest.get("outputs") == sizes else None


def prepare(settings: Settings, prefix: Path, threads: int = 1) -> dict[str, Any]:
    """Write the dataset at `prefix` and return its manifest.

    Documents are one sequence each, ids as uint16 where the vocabulary allows it, else int32.
    Memory is bounded by the batch but for the index, which Megatron's builder keeps (about 130
    bytes a document).

    Raises:
        UserError: bad sources, tokenizer, or no text at all.
    """
    # Here, because megatron.core takes seconds to import and a wrong path should fail at once.
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    total = check_inputs(settings.sources)
    encode = Encoder(settings, threads)
    made_from = fingerprint(settings)
    dtype = DType.optimal_dtype(encode.vocab_size)
    data, index, manifest_path = output_paths(prefix)
    counts = Counts()
    with whole_files([data, index]) as (partial_data, partial_index):
        builder = IndexedDatasetBuilder(str(partial_data), dtype=dtype)
        try:
            _tokenize(settings.sources, encode, builder, counts, Progress(prefix.name, total))
            if not counts.documents:
                raise UserError(f"no text in {', '.join(map(str, settings.sources))}")
            builder.finalize(str(partial_index))
        finally:
            builder.data_file.close()
        # An old manifest must not vouch for a half-replaced dataset.
        manifest_path.unlink(missing_ok=True)
    manifest = {
        **asdict(counts),
        "dtype": dtype.__name__,
        "vocab_size": encode.vocab_size,
        "outputs": {path.name: path.stat().st_size for path in (data, index)},
        "made_from": made_from,
    }
    write_json(manifest_path, manifest)
    return manifest


def _tokenize(
    sources: Sequence[Path], encode: Encoder, builder: Any, counts: Counts, progress: Progress
) -> None:
    """Encode every document of `sources` into Megatron's `builder`, keeping `counts`."""
    done = 0
    with progress:
        for batch in read_batches(sources):
            texts = [text for text in batch.texts if text]
            counts.empty_documents += len(batch.texts) - len(texts)
            counts.text_bytes += sum(len(text.encode()) for text in texts)
            for ids in encode(texts):
                builder.add_document(ids, [len(ids)])
                counts.documents += 1
                counts.tokens += len(ids)
            done += batch.source_bytes
            progress.update(done, f"{counts.tokens / 1e6:.1f}M tokens")


def summary(prefix: Path, manifest: dict[str, Any]) -> str:
    """One line for people about the dataset at `prefix`."""
    return (
        f"{prefix}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
        f"{manifest['text_bytes'] / manifest['tokens']:.2f} bytes a token, {manifest['dtype']}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dyt.data.prepare",
        description="Tokenize JSON-lines text into a Megatron indexed dataset.",
    )
    yes_no = argparse.BooleanOptionalAction
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="JSON-lines file(s)")
    parser.add_argument("--tokenizer-model", type=Path, required=True, help="SentencePiece .model")
    parser.add_argument("--output-prefix", type=Path, required=True, help="P of P.bin and P.idx")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads that tokenize"
    )
    parser.add_argument("--append-eod", action=yes_no, default=True, help="end documents with EOS")
    parser.add_argument("--bos", action=yes_no, default=True, help="begin documents with BOS")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise UserError(f"--workers must be at least 1, not {args.workers}")
    settings = Settings(tuple(args.input), args.tokenizer_model, args.bos, args.append_eod)
    check_inputs(settings.sources)
    load_tokenizer(settings.tokenizer_model)
    prefix: Path = args.output_prefix
    if manifest := up_to_date(settings, prefix):
        print(f"{summary(prefix, manifest)}; up to date")
        return 0
    replaces = output_paths(prefix)[1].exists()
    started = time.monotonic()
    manifest = prepare(settings, prefix, args.workers)
    print(f"{summary(prefix, manifest)}, {time.monotonic() - started:.1f} s")
    if replaces:
        # Megatron names cached sample indices by the path, not the content (megatron_dataset.py).
        print(
            f"{prefix} was replaced: delete the indices that Megatron cached for it "
            f"(the directory of --data-cache-path, else {prefix}/cache) before training on it"
        )
    return 0


if __name__ == "__main__":
    run_main(main)
