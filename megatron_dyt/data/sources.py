"""Corpora as a stream of documents: JSON lines (plain, zstd, gzip) and Parquet files.

Memory is bounded whatever the size of a file: longer lines than `MAX_LINE_BYTES` are malformed, and a Parquet
file is read page by page, with as many rows to a page as its writer has put there. Nothing is lost silently:
each record is a document or is named with what is wrong with it, and a file that ends too early is an error.
"""

import glob
import itertools
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from megatron_dyt.data.dataset_manifest import Fields, Identity
from megatron_dyt.errors import UserError

_log = logging.getLogger(__name__)

_JSON = (".jsonl", ".json", ".ndjson")
_COMPRESSIONS = {".zst": "zstd", ".zstd": "zstd", ".gz": "gzip", "": None}
# What a file's name ends with: (format, compression).
FORMATS = {
    kind + end: ("json", compression) for kind in _JSON for end, compression in _COMPRESSIONS.items()
} | {".parquet": ("parquet", None)}
ENDINGS = ".jsonl, .json or .ndjson, with .zst, .zstd or .gz behind, or .parquet"
# What is beside the text in a directory: descriptions of data sets, and what this command writes.
_NO_TEXT = re.compile(r"(dataset_infos?|state|manifest|.*\.manifest)\.json|.*\.malformed\.jsonl")
# Text for certain, in what nothing here reads: to pass over it would lose it.
_UNREAD_TEXT = re.compile(r".*\.(jsonl?|ndjson|parquet)\.(bz2|xz|lzma|lz4|snappy|sz|deflate|br|zip|7z)")
# Kinds of malformed records.
NO_JSON = "not valid JSON"
NO_OBJECT = "not a JSON object"
NO_UTF8 = "not UTF-8"
# A text takes up to ten times its bytes while it is worked on, and a worker is to stay below 1 GB.
MAX_LINE_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
# Each may be as long as a book; a batch costs about 6 us.
_PARQUET_ROWS = 4
# The largest window that zstd writes (--long=31) and a decoder of 64 bits takes. libzstd's own limit is 2^27.
_ZSTD_WINDOW_LOG = 31


@dataclass(frozen=True)
class Document:
    """A text, which may be empty, and where it comes from, if the record says so."""

    text: str
    domain: str | None = None


@dataclass(frozen=True)
class Malformed:
    """A record that holds no usable text.

    Attributes:
        place: number of its line or row, from 1.
        kind: what is wrong, the same for all records with that fault.
        detail: about this one.
    """

    place: int
    kind: str
    detail: str


Item = Document | Malformed


class BrokenSourceError(UserError):
    """A source that cannot be read to its end, or holds no text at all."""


class Source(Protocol):
    """Where documents come from; small and picklable, so that it can go to a worker.

    Attributes:
        name: of the dataset that is made of it, if nothing else names it.
        unit: what `Malformed.place` counts: "line" or "row".
        size: bytes to read, 0 where unknown.
    """

    @property
    def name(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def size(self) -> int: ...

    def identity(self) -> Identity:
        """What changes when the content does."""

    def read(self, fields: Fields) -> Iterator[tuple[int, Item]]:
        """Yield (bytes read so far, document or malformed record).

        Raises:
            BrokenSourceError: the content ends too early or is damaged.
        """


@dataclass(frozen=True)
class FileSource:
    """A file of one of the `FORMATS`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(suffix_of(self.path))

    @property
    def unit(self) -> str:
        return "row" if self._format == "parquet" else "line"

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def _format(self) -> str:
        return FORMATS[suffix_of(self.path)][0]

    def __str__(self) -> str:
        return str(self.path)

    def identity(self) -> Identity:
        """Name, size and time stamp: hashing a corpus of many TB on every start would take hours."""
        stat = self.path.stat()
        return {"name": self.path.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}

    def read(self, fields: Fields) -> Iterator[tuple[int, Item]]:
        if self.size == 0:
            # In any format; Spark and filters write such parts.
            return
        with _broken_is_said(self.path):
            if self._format == "parquet":
                yield from _read_parquet(self.path, fields)
            else:
                yield from _read_json(self.path, FORMATS[suffix_of(self.path)][1], fields)


def suffix_of(path: Path) -> str:
    """Which of `FORMATS` a file is in by its name; "" for none."""
    return next((suffix for suffix in FORMATS if path.name.endswith(suffix)), "")


def find(inputs: Sequence[str]) -> list[FileSource]:
    """The files that `inputs` name: files, directories (see `_files_of_text`) and glob patterns.

    Raises:
        UserError: something is missing, of unknown format, or given twice.
    """
    paths: list[Path] = []
    for given in inputs:
        paths += _expand(given)
    for path in paths:
        if not suffix_of(path):
            raise UserError(f"input {path}: its name must end with {ENDINGS}")
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise UserError(f"input {path} is given twice; its documents would be in the data twice")
        seen.add(path.resolve())
    return [FileSource(path) for path in paths]


def _expand(given: str) -> list[Path]:
    path = Path(given)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_of_text(path)
    found = sorted(Path(each) for each in glob.glob(given, recursive=True) if os.path.isfile(each))
    if not found:
        raise UserError(f"input {given} does not exist; give files, directories or quoted patterns")
    return found


def _files_of_text(directory: Path) -> list[Path]:
    """The files below a directory that are data, in order; what else is there is counted in a line.

    Raises:
        UserError: there are none, or some are text in a compression that is not read.
    """
    found: list[Path] = []
    others: list[Path] = []
    for path in _below(directory):
        if _UNREAD_TEXT.fullmatch(path.name) and not _is_hidden(path.name):
            raise UserError(
                f"input {path}: this compression is not read. Pack it as .zst or .gz, or give a pattern that "
                f"leaves it out, such as '{directory}/**/*.jsonl'"
            )
        is_text = suffix_of(path) and not _NO_TEXT.fullmatch(path.name) and not _is_hidden(path.name)
        if is_text and not path.exists():
            raise UserError(
                f"input {path} is a link to nothing. Mend or remove it, or give a pattern, which passes over "
                f"it: '{directory}/**/*{suffix_of(path)}'"
            )
        (found if is_text else others).append(path)
    if not found:
        there = f"; it has {_kinds(others)}" if others else ""
        raise UserError(f"input {directory}: no file in it ends with {ENDINGS}{there}")
    if others:
        _log.info("%s: %d files are read; left out: %s", directory, len(found), _kinds(others))
    return sorted(found)


def _is_hidden(name: str) -> bool:
    """Whether Spark, Hive and Hadoop pass over a file or directory of this name.

    _SUCCESS, _temporary, _delta_log, .part-0.crc, .cache, ._x.jsonl; but _year=2020 is a partition.
    """
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _kinds(paths: Iterable[Path]) -> str:
    """Files by what their names end with, and those that are no text whatever they end with."""

    def kind(path: Path) -> str:
        if _is_hidden(path.name):
            return "that begin with . or _"
        return path.name if suffix_of(path) else path.suffix or path.name

    return ", ".join(f"{count:,} {name}" for name, count in Counter(map(kind, paths)).most_common())


def _below(directory: Path) -> Iterator[Path]:
    """All files below a directory, also behind links, each directory once, and no hidden directory."""
    seen: set[str] = set()
    for place, directories, files in os.walk(directory, onerror=_raise, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            directories.clear()
            continue
        seen.add(real)
        directories[:] = sorted(name for name in directories if not _is_hidden(name))
        yield from (Path(place, name) for name in files)


def _raise(error: OSError) -> None:
    raise error


# --- reading ---------------------------------------------------------------------------------------------


@contextmanager
def _broken_is_said(path: Path) -> Iterator[None]:
    """Decoders' errors as `BrokenSourceError`; the operating system's errors as they are."""
    import pyarrow

    try:
        yield
    except (OSError, EOFError, pyarrow.ArrowException, _zstd().ZstdError) as error:
        reason = " ".join(str(error).split())
        # Arrow's error is Python's too; zstd's has its text alone.
        if isinstance(error, MemoryError) or "not enough memory" in reason:
            raise UserError(
                f"{path} needs more memory than there is ({reason}); give more, or fewer --workers"
            ) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BrokenSourceError(
            f"{path} is truncated or damaged ({reason}); get it again, or leave it out "
            "(prepare-data: --skip-broken-shards)"
        ) from error


def _zstd() -> ModuleType:
    # pyarrow's decoder has libzstd's limit of the window, which cannot be raised there.
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def _read_json(path: Path, compression: str | None, fields: Fields) -> Iterator[tuple[int, Item]]:
    import pyarrow

    with pyarrow.OSFile(str(path)) as raw, _decompressed(raw, compression) as stream:
        # By map, so that a line is gone when its document is worked on.
        for item in map(parse_line, split_lines(stream), itertools.count(1), itertools.repeat(fields)):
            yield raw.tell(), item


def _decompressed(raw: Any, compression: str | None) -> Any:
    import pyarrow

    if compression == "zstd":
        zstd = _zstd()
        options = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
        return zstd.ZstdFile(_InPieces(raw), options=options)
    return pyarrow.CompressedInputStream(raw, compression) if compression else raw


class _InPieces:
    """A stream that is read in pieces as large as pyarrow's, and not zstd's of 8 KiB."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def read(self, size: int) -> bytes:
        piece: bytes = self.raw.read(64 << 10)
        return piece


def split_lines(stream: Any) -> Iterator[bytes | None]:
    """Lines of a binary stream without their ends; None for one longer than `MAX_LINE_BYTES`."""
    begun: list[bytes] = []
    size = 0
    while chunk := stream.read(_CHUNK_BYTES):
        first, *others = chunk.split(b"\n")
        size += len(first)
        # What is too long is counted, not held.
        begun.append(first if size <= MAX_LINE_BYTES else b"")
        if others:
            yield _joined(begun) if size <= MAX_LINE_BYTES else None
            yield from others[:-1]
            begun, size = [others[-1]], len(others[-1])
    if size:
        yield _joined(begun) if size <= MAX_LINE_BYTES else None


def _joined(parts: list[bytes]) -> bytes:
    """The parts as one, and no longer in the list: a long line is in memory once."""
    whole = b"".join(parts)
    parts.clear()
    return whole


def _read_parquet(path: Path, fields: Fields) -> Iterator[tuple[int, Item]]:
    import pyarrow.parquet

    size = path.stat().st_size
    # Pages are read when they are needed; by default a whole row group is.
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_CHUNK_BYTES) as file:
        columns = dict(_columns(file.schema_arrow))
        wanted = [_column_of(path, columns) for path in (fields.text, fields.domain)]
        if wanted[0] is None:
            raise BrokenSourceError(
                f'{path} has no column "{fields.text}"; it has {", ".join(columns)}: choose with --json-key'
            )
        rows, total = 0, max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(_PARQUET_ROWS, columns=list(filter(None, wanted)), use_threads=False):
            for index in range(batch.num_rows):
                rows += 1
                yield size * rows // total, _row(batch, index, rows, fields)


def _columns(fields: Any, within: str = "") -> Iterator[tuple[str, Any]]:
    """Path and type of every column; those in a struct have its path and a dot in front."""
    import pyarrow

    for field in fields:
        if pyarrow.types.is_struct(field.type):
            yield from _columns(field.type, f"{within}{field.name}.")
        else:
            yield within + field.name, field.type


def _column_of(path: str, columns: dict[str, Any]) -> str | None:
    """The column that holds what is at `path`: its own, or a map whose keys the rest of it names."""
    import pyarrow

    maps = (name for name in columns if pyarrow.types.is_map(columns[name]) and path.startswith(f"{name}."))
    return path if path in columns else next(maps, None)


def _row(batch: Any, index: int, number: int, fields: Fields) -> Item:
    try:
        record = {
            name: batch.column(name)[index].as_py(maps_as_pydicts="lossy") for name in batch.schema.names
        }
    except UnicodeDecodeError as error:
        # Parquet says that it is text, and nobody has looked.
        return Malformed(number, NO_UTF8, f"{error.reason} at byte {error.start}")
    return as_item(record, number, fields)


# --- one record ------------------------------------------------------------------------------------------


def parse_line(line: bytes | None, number: int, fields: Fields) -> Item:
    """What is on a JSON line; a blank one is an empty document, None one that was too long to be read."""
    if line is None:
        return Malformed(number, "too long", f"more than {MAX_LINE_BYTES >> 20} MiB in one line")
    if not line.strip():
        return Document("")
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Malformed(number, NO_UTF8, f"{error.reason} at byte {error.start}")
    # A line of brackets alone exhausts the parser's stack.
    except (ValueError, RecursionError) as error:
        return Malformed(number, NO_JSON, str(error))
    if not isinstance(record, dict):
        return Malformed(number, NO_OBJECT, f"a {type(record).__name__}")
    return as_item(record, number, fields)


def as_item(record: dict[str, Any], number: int, fields: Fields) -> Item:
    """The document of a record, or what is wrong with it; null is an empty text, bytes are UTF-8."""
    try:
        text = _value_at(record, fields.text)
    except KeyError:
        keys = ", ".join(map(repr, _paths(record)[:10]))
        return Malformed(number, f'no "{fields.text}"', f"it has {keys or 'no fields'}")
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            return Malformed(number, NO_UTF8, f"{error.reason} at byte {error.start}")
    if text is None:
        text = ""
    if not isinstance(text, str):
        return Malformed(number, f'"{fields.text}" is not a string', f"it is {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair.
        return Malformed(number, "not valid Unicode", f"{error.reason} at character {error.start}")
    return Document(text, _domain(record, fields.domain))


def _domain(record: dict[str, Any], path: str) -> str | None:
    try:
        domain = _value_at(record, path)
    except KeyError:
        return None
    return domain if isinstance(domain, str) else None


def _value_at(record: Any, path: str) -> Any:
    """What is under a path of keys with dots between them; KeyError where a key is missing.

    Keys may have dots themselves; one that is the whole path comes first. In null everything is null.
    """
    if record is None:
        return None
    if not isinstance(record, dict):
        raise KeyError(path)
    if path in record:
        return record[path]
    for dot in re.finditer(r"\.", path):
        if (key := path[: dot.start()]) in record:
            return _value_at(record[key], path[dot.end() :])
    raise KeyError(path)


def _paths(record: dict[str, Any]) -> list[str]:
    """The keys of a record, and of the records in it, as one writes them for --json-key."""
    return [
        path
        for key, value in record.items()
        for path in ([f"{key}.{inner}" for inner in value] if isinstance(value, dict) and value else [key])
    ]
