"""One record of a corpus: its text and its domain, or what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

DEFAULT_TEXT_KEY = "text"
# Where The Pile's records have it.
DEFAULT_DOMAIN_KEY = "meta.pile_set_name"


@dataclass(frozen=True)
class Fields:
    """Which fields of a record are read.

    Attributes:
        text: key (column) of the text.
        domain: keys from the record down to its domain, with dots between them.
    """

    text: str = DEFAULT_TEXT_KEY
    domain: str = DEFAULT_DOMAIN_KEY


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


class BadRecordError(ValueError):
    """What is wrong with a record: `kind` and `detail` as in `Malformed`."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind} ({detail})")
        self.kind, self.detail = kind, detail


def parse_line(line: bytes, fields: Fields) -> Document:
    """The document on one JSON line; a blank line is an empty one.

    Raises:
        BadRecordError: not UTF-8, not JSON, not an object, or no usable text.
    """
    if not line.strip():
        return Document("")
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecordError("not UTF-8", f"{error.reason} at byte {error.start}") from error
    # A line of brackets alone exhausts the parser's stack.
    except (ValueError, RecursionError) as error:
        raise BadRecordError("not valid JSON", str(error)) from error
    if not isinstance(record, dict):
        raise BadRecordError("not a JSON object", f"a {type(record).__name__}")
    return document(record, fields)


def document(record: dict[str, Any], fields: Fields) -> Document:
    """The document of a record; bytes are taken for UTF-8.

    Raises:
        BadRecordError: no usable text.
    """
    if fields.text not in record:
        keys = ", ".join(map(repr, list(record)[:10]))
        raise BadRecordError(f'no "{fields.text}"', f"it has {keys or 'no fields'}")
    text = record[fields.text]
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise BadRecordError("not UTF-8", f"{error.reason} at byte {error.start}") from error
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise BadRecordError(f'"{fields.text}" is not a string', f"it is {kind}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair.
        raise BadRecordError("not valid Unicode", f"{error.reason} at character {error.start}") from error
    return Document(text, _domain(record, fields.domain))


def _domain(record: Any, path: str) -> str | None:
    for key in path.split("."):
        if not isinstance(record, dict):
            return None
        record = record.get(key)
    return record if isinstance(record, str) else None
