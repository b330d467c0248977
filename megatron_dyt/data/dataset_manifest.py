"""The manifest of prepared data: what is in them, and what they were made from.

`megatron-dyt prepare-data` writes PREFIX.manifest.json beside PREFIX.bin and PREFIX.idx, and manifest.json
over all datasets of a directory. The classes here are the only place that knows their keys: a field's name is
its key in the file, and what is equal here is equal there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, get_args, get_origin, get_type_hints

from megatron_dyt.atomic import read_json, write_json
from megatron_dyt.errors import UserError

# Of the manifests that this version writes and reads.
FORMAT = 3
END = ".manifest.json"
# A corpus has some dozens of domains; thousands are a key that means something else.
MAX_DOMAINS = 1000
OTHER_DOMAINS = "other"

# What changes when the content of a source does: name, size and time stamp of a file; name and revision of a
# part of a data set on the Hub.
Identity = dict[str, str | int | None]


def manifest_path(prefix: Path) -> Path:
    """Where the manifest of the dataset at `prefix` is."""
    return prefix.parent / (prefix.name + END)


def output_paths(prefix: Path) -> tuple[Path, Path]:
    """The data and index files of a dataset prefix."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def unfinished_mark(prefix: Path) -> Path:
    """What is there while the dataset at `prefix` has new files and no manifest yet: they are ours."""
    return prefix.parent / (prefix.name + ".unfinished")


def malformed_path(prefix: Path) -> Path:
    """Where the malformed records of a dataset are named."""
    return prefix.with_name(prefix.name + ".malformed.jsonl")


def all_paths(prefix: Path) -> tuple[Path, ...]:
    """Every file that a dataset may have."""
    return (*output_paths(prefix), manifest_path(prefix), malformed_path(prefix))


# --- what data are made from -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Fields:
    """Which fields of a record are read.

    Attributes:
        text: key (column) of the text.
        domain: keys from the record down to its domain, with dots between them; the default is The Pile's.
    """

    text: str = "text"
    domain: str = "meta.pile_set_name"


@dataclass(frozen=True)
class Filters:
    """Which documents are left out; none by default.

    Attributes:
        min_characters, max_characters: limits of a document's length.
        domains: if given, only documents of these are taken.
        not_domains: documents of these are left out.
    """

    min_characters: int = 0
    max_characters: int | None = None
    domains: tuple[str, ...] = ()
    not_domains: tuple[str, ...] = ()

    def reason(self, text: str, domain: str | None) -> str | None:
        """Why a document is left out; None when it is not."""
        if len(text) < self.min_characters:
            return "too short"
        if self.max_characters is not None and len(text) > self.max_characters:
            return "too long"
        if (self.domains and domain not in self.domains) or domain in self.not_domains:
            return "domain"
        return None


# The types of tokenizers that data are made with, by Megatron's names.
SENTENCEPIECE = "SentencePieceTokenizer"
HUGGING_FACE = "HuggingFaceTokenizer"


@dataclass(frozen=True)
class TokenizerIdentity:
    """A tokenizer, wherever its file is.

    Attributes:
        type: `SENTENCEPIECE` or `HUGGING_FACE`.
        sha256: of its file.
        bos, eos: ids, None where it has none. A Hugging Face tokenizer names them in another file than the
            one that is hashed.
    """

    type: str
    sha256: str
    bos: int | None
    eos: int | None


@dataclass(frozen=True)
class MadeFrom:
    """What determines the ids, besides the sources: equal for equal data."""

    tokenizer: TokenizerIdentity
    bos: bool
    append_eod: bool
    fields: Fields
    filters: Filters

    def with_sources(self, sources: Iterable[Identity]) -> MadeFromSources:
        return MadeFromSources(**vars(self), sources=tuple(sources))

    def differing(self, other: MadeFrom) -> list[str]:
        """Names of the settings in which `other` is not like this, whatever its sources."""
        names = [each.name for each in dataclasses.fields(MadeFrom)]
        return [name for name in names if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True)
class MadeFromSources(MadeFrom):
    """`MadeFrom`, with the sources one after the other: equal for equal datasets."""

    sources: tuple[Identity, ...]


# --- what is in them -------------------------------------------------------------------------------------


@dataclass
class Amount:
    """How much text there is, and how many tokens of it, BOS and EOD among them."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def add(self, documents: int, tokens: int, text_bytes: int) -> None:
        self.documents += documents
        self.tokens += tokens
        self.text_bytes += text_bytes


@dataclass
class Counts(Amount):
    """What went into data, and what was left out: empty, malformed and filtered records, by kind."""

    empty_documents: int = 0
    malformed: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    domains: dict[str, Amount] = field(default_factory=dict)

    def add_document(self, text: str, domain: str | None, tokens: int) -> None:
        """Count a document that was written."""
        size = len(text.encode())
        self.add(1, tokens, size)
        if domain is not None:
            if domain not in self.domains and len(self.domains) >= MAX_DOMAINS:
                domain = OTHER_DOMAINS
            self.domains.setdefault(domain, Amount()).add(1, tokens, size)

    def add_malformed(self, kind: str, count: int = 1) -> None:
        self.malformed[kind] = self.malformed.get(kind, 0) + count

    def add_filtered(self, reason: str, count: int = 1) -> None:
        self.filtered[reason] = self.filtered.get(reason, 0) + count

    def add_counts(self, other: Counts) -> None:
        """Count all that another dataset counts."""
        self.add(other.documents, other.tokens, other.text_bytes)
        self.empty_documents += other.empty_documents
        for kind, count in other.malformed.items():
            self.add_malformed(kind, count)
        for reason, count in other.filtered.items():
            self.add_filtered(reason, count)
        for domain, amount in other.domains.items():
            entry = self.domains.setdefault(domain, Amount())
            entry.add(amount.documents, amount.tokens, amount.text_bytes)

    def left_out(self) -> dict[str, int]:
        """What is not in the data, for people, by kind."""
        return {
            "empty": self.empty_documents,
            "malformed (named in *.malformed.jsonl)": sum(self.malformed.values()),
            "filtered": sum(self.filtered.values()),
        }


@dataclass(frozen=True)
class Output:
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclass
class DatasetManifest(Counts):
    """The manifest beside a dataset.

    Attributes:
        dtype: of the ids: "uint16" or "int32".
        vocab_size: the tokenizer's largest id + 1.
        tokenizer: its path or name, as it was given.
        sources: where the text was; of files the absolute paths.
        outputs: the dataset's files by name; none where no document was left.
        made_from: decides whether the dataset is the one that is asked for.
    """

    dtype: str = field(kw_only=True)
    vocab_size: int = field(kw_only=True)
    tokenizer: str = field(kw_only=True)
    sources: list[str] = field(kw_only=True)
    outputs: dict[str, Output] = field(kw_only=True)
    made_from: MadeFromSources = field(kw_only=True)

    @classmethod
    def read(cls, prefix: Path) -> Self | None:
        """The manifest of the dataset at `prefix`; None where there is none, or one of another version."""
        return _read(cls, manifest_path(prefix))

    def write(self, prefix: Path) -> None:
        _write(self, manifest_path(prefix))

    def is_complete(self, prefix: Path) -> bool:
        """Whether the files of the dataset at `prefix` are there and have the sizes that were written."""
        paths = {prefix.with_name(name): output.bytes for name, output in self.outputs.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


@dataclass
class ShardEntry(Amount):
    """What the manifest of a directory says of one dataset in it."""

    dtype: str = field(kw_only=True)
    sources: list[str] = field(kw_only=True)
    outputs: dict[str, Output] = field(kw_only=True)


@dataclass
class DirectoryManifest(Counts):
    """The manifest over all datasets of a directory, whose counts it sums up.

    Attributes:
        vocab_size, tokenizer: as in `DatasetManifest`.
        shards: the datasets by name.
        broken_shards: what is wrong with the sources that were left out, by the dataset's name.
        made_from: the same for all datasets.
    """

    vocab_size: int = field(kw_only=True)
    tokenizer: str = field(kw_only=True)
    shards: dict[str, ShardEntry] = field(kw_only=True)
    broken_shards: dict[str, str] = field(kw_only=True)
    made_from: MadeFrom = field(kw_only=True)

    @classmethod
    def over(
        cls,
        datasets: Mapping[str, DatasetManifest],
        broken: Mapping[str, str],
        tokenizer: str,
        vocab_size: int,
        made_from: MadeFrom,
    ) -> Self:
        """The manifest over `datasets`, by name."""
        names = [each.name for each in dataclasses.fields(ShardEntry)]
        whole = cls(
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            shards={
                key: ShardEntry(**{name: getattr(each, name) for name in names})
                for key, each in datasets.items()
            },
            broken_shards=dict(broken),
            made_from=made_from,
        )
        for each in datasets.values():
            whole.add_counts(each)
        whole.domains = dict(sorted(whole.domains.items()))
        return whole

    @classmethod
    def path(cls, directory: Path) -> Path:
        return directory / "manifest.json"

    @classmethod
    def find(cls, directory: Path) -> Self | None:
        """The manifest of a directory of datasets; None where there is none, or one of another version."""
        return _read(cls, cls.path(directory))

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The manifest of a directory of datasets; `UserError` where there is none."""
        manifest = cls.find(directory)
        if manifest is None:
            raise UserError(
                f"{directory} has no manifest.json of prepare-data: it is another directory, or prepare-data "
                "has not finished there; run it again with the same --output"
            )
        return manifest

    def write(self, directory: Path) -> None:
        _write(self, self.path(directory))

    def left_out(self) -> dict[str, int]:
        without = sum(not shard.documents for shard in self.shards.values())
        return {
            "broken shards": len(self.broken_shards),
            **super().left_out(),
            "shards without documents": without,
        }


def manifests(directory: Path) -> dict[str, DatasetManifest]:
    """The manifest of each finished dataset in a directory, by the dataset's name."""
    names = sorted(path.name.removesuffix(END) for path in directory.glob("*" + END))
    found = {name: DatasetManifest.read(directory / name) for name in names}
    return {name: manifest for name, manifest in found.items() if manifest is not None}


# --- as JSON ---------------------------------------------------------------------------------------------


def _read[T](kind: type[T], path: Path) -> T | None:
    value = read_json(path)
    try:
        return _parse(kind, value) if value["format"] == FORMAT else None
    except (KeyError, TypeError, AttributeError):
        return None


def _write(manifest: DatasetManifest | DirectoryManifest, path: Path) -> None:
    write_json(path, {"format": FORMAT, **dataclasses.asdict(manifest)})


def _parse(kind: Any, value: Any) -> Any:
    """A value of JSON as `kind`: a dataclass, a collection of them, or what JSON has itself."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: _parse(hint, value[name]) for name, hint in hints.items()})
    parameters = get_args(kind)
    if get_origin(kind) is tuple:
        return tuple(_parse(parameters[0], each) for each in value)
    if get_origin(kind) is dict:
        return {key: _parse(parameters[1], each) for key, each in value.items()}
    return value


_hints = functools.cache(get_type_hints)
