"""A record is a document with its domain, or what is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_dyt.data.records import BadRecordError, Document, Fields, document, parse_line

PILE = b'{"text": "a\\r\\n\\t\xc3\xa9", "meta": {"pile_set_name": "ArXiv"}}\r'


def test_text_is_kept_exactly_and_the_domain_found() -> None:
    assert parse_line(PILE, Fields()) == Document("a\r\n\té", "ArXiv")
    assert parse_line(b'\xef\xbb\xbf{"text": "after a BOM"}', Fields()) == Document("after a BOM")
    assert parse_line(b" \r", Fields()) == Document("")


@pytest.mark.parametrize(
    ("record", "path", "domain"),
    [
        ({"meta": {"pile_set_name": "A"}}, "meta.pile_set_name", "A"),
        ({"source": "B"}, "source", "B"),
        ({"meta": {"a": {"b": "C"}}}, "meta.a.b", "C"),
        ({"meta": "no object"}, "meta.pile_set_name", None),
        ({"meta": None}, "meta.pile_set_name", None),
        ({"meta": {"pile_set_name": 5}}, "meta.pile_set_name", None),
        ({}, "meta.pile_set_name", None),
    ],
)
def test_domain_is_looked_up_by_its_path(record: dict[str, Any], path: str, domain: str | None) -> None:
    assert document({"content": "x", **record}, Fields("content", path)) == Document("x", domain)


@pytest.mark.parametrize(
    ("line", "kind", "detail"),
    [
        (b'{"text": "cut', "not valid JSON", "Unterminated string"),
        (b"[" * 200_000, "not valid JSON", "recursion"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not valid JSON", "digits"),
        (b'{"text": "\xff"}', "not UTF-8", "invalid start byte at byte 10"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8", "at byte 10"),
        (b'["text"]', "not a JSON object", "a list"),
        (b'{"body": "x", "id": 1}', 'no "text"', "it has 'body', 'id'"),
        (b"{}", 'no "text"', "no fields"),
        (b'{"text": 5}', '"text" is not a string', "it is int"),
        (b'{"text": null}', '"text" is not a string', "it is null"),
        (b'{"text": "ab\\ud800"}', "not valid Unicode", "at character 2"),
    ],
)
def test_what_is_wrong_is_named(line: bytes, kind: str, detail: str) -> None:
    with pytest.raises(BadRecordError) as failure:
        parse_line(line, Fields())
    assert failure.value.kind == kind
    assert detail in failure.value.detail


def test_bytes_are_utf_8() -> None:
    assert document({"text": "é".encode()}, Fields()) == Document("é")
    with pytest.raises(BadRecordError, match="not UTF-8"):
        document({"text": b"\xff"}, Fields())
