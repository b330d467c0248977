"""Every format gives the same documents; damage is found; memory does not grow with the file."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_dyt.data import sources
from megatron_dyt.data.dataset_manifest import Fields
from megatron_dyt.data.sources import (
    FORMATS,
    BrokenSourceError,
    Document,
    FileSource,
    Malformed,
    as_item,
    find,
    parse_line,
    split_lines,
)
from megatron_dyt.errors import UserError

RECORDS: list[dict[str, Any]] = [
    {"text": f"document {number} é\n漢字 " * 50, "meta": {"pile_set_name": "AB"[number % 2]}}
    for number in range(700)
]
DOCUMENTS = [Document(record["text"], record["meta"]["pile_set_name"]) for record in RECORDS]


def json_lines(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def write(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    kind, compression = FORMATS[sources.suffix_of(path)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=300)
    else:
        with pyarrow.output_stream(str(path), compression=compression) as file:
            file.write(json_lines(records))
    return path


@pytest.mark.parametrize("suffix", FORMATS)
def test_all_formats_give_the_same_documents(tmp_path: Path, suffix: str) -> None:
    source = FileSource(write(tmp_path / f"shard.00{suffix}"))
    found = list(source.read(Fields()))
    assert [item for _position, item in found] == DOCUMENTS
    positions = [position for position, _item in found]
    assert positions == sorted(positions)
    assert positions[-1] == source.size == source.path.stat().st_size
    assert source.name == "shard.00"
    assert source.unit == ("row" if suffix == ".parquet" else "line")


def test_compressed_parts_one_after_the_other_are_one_file(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.jsonl.zst", RECORDS[:10]), write(tmp_path / "2.jsonl.zst", RECORDS[10:])
    both = tmp_path / "both.jsonl.zst"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    assert [item for _position, item in FileSource(both).read(Fields())] == DOCUMENTS


def test_malformed_records_stand_in_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": \n\n{"text": "\xff"}\n{"text": "last, without an end"}')
    items = [item for _position, item in FileSource(path).read(Fields())]
    assert [item if isinstance(item, Document) else (item.place, item.kind) for item in items] == [
        Document("one"),
        (2, "not valid JSON"),
        Document(""),
        (4, "not UTF-8"),
        Document("last, without an end"),
    ]


def test_parquet_rows_can_be_malformed_too(tmp_path: Path) -> None:
    texts = pyarrow.array([b"good", b"\xff", None], pyarrow.binary()).view(pyarrow.string())
    meta = pyarrow.array([{"pile_set_name": "A"}, None, None])
    pyarrow.parquet.write_table(pyarrow.table({"body": texts, "meta": meta}), tmp_path / "a.parquet")
    items = [item for _position, item in FileSource(tmp_path / "a.parquet").read(Fields("body"))]
    assert items == [
        Document("good", "A"),
        Malformed(2, "not UTF-8", "invalid start byte at byte 0"),
        Malformed(3, '"body" is not a string', "it is null"),
    ]
    with pytest.raises(
        BrokenSourceError, match=r'no column "text"; it has body, meta: choose with --json-key'
    ):
        list(FileSource(tmp_path / "a.parquet").read(Fields()))


def as_text(values: list[bytes]) -> pyarrow.Array:
    """A column of strings, of which nobody has looked whether they are UTF-8."""
    return pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())


def test_parquet_domains_and_dictionaries_can_be_malformed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    names = as_text([b"A", b"\xff", b"A"])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y", "z"], "source": names}), path)
    bad = Malformed(2, "not UTF-8", "invalid start byte at byte 0")
    assert [item for _position, item in FileSource(path).read(Fields(domain="source"))] == [
        Document("x", "A"),
        bad,
        Document("z", "A"),
    ]
    pyarrow.parquet.write_table(pyarrow.table({"text": names.dictionary_encode()}), path)
    assert [item for _position, item in FileSource(path).read(Fields())] == [
        Document("A"),
        bad,
        Document("A"),
    ]


def test_memory_does_not_grow_with_the_rows_of_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [str(number) * 500_000 for number in range(10, 74)]
    # A row a page, as writers do it with long texts.
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, write_batch_size=1)
    before = pyarrow.total_allocated_bytes()
    held = [pyarrow.total_allocated_bytes() - before for _item in FileSource(path).read(Fields())]
    assert len(held) == 64
    assert max(held) < 16 << 20


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def flip(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes(byte ^ 0xFF for byte in content[place : place + 8]) + content[place + 8 :]


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("damage", [cut, flip, lambda content: b"no such format at all"])
def test_damage_is_said(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path / f"a{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BrokenSourceError, match=rf"a{suffix} is truncated or damaged .*--skip-broken-shards"):
        list(FileSource(path).read(Fields()))


def test_errors_of_the_machine_are_no_damage(tmp_path: Path) -> None:
    source = FileSource(write(tmp_path / "a.jsonl.zst"))
    source.path.unlink()
    with pytest.raises(FileNotFoundError):
        list(source.read(Fields()))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("content", [b"", b"\n", b"a", b"a\n", b"\n\nab\n\ncd", b"ab\ncd\nef\n"])
def test_lines_are_those_of_splitting_the_whole(
    monkeypatch: pytest.MonkeyPatch, chunk: int, content: bytes
) -> None:
    monkeypatch.setattr(sources, "_CHUNK_BYTES", chunk)
    expected = content.split(b"\n")
    assert list(split_lines(io.BytesIO(content))) == (expected if expected[-1] else expected[:-1])


class Endless:
    """A stream of one line of `size` bytes, and one more."""

    def __init__(self, size: int) -> None:
        self.left, self.largest = size, 0

    def read(self, count: int) -> bytes:
        count = min(count, self.left)
        self.left -= count
        if self.left == 0 and count:
            return b"x" * (count - 5) + b"\nlast"
        return b"x" * count


def test_a_line_without_end_is_not_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1 << 20)
    tracemalloc.start()
    assert list(split_lines(Endless(100 << 20))) == [None, b"last"]
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_line_that_is_too_long_is_malformed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 10)
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 100)
    path = write(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y" * 200}, {"text": "z"}])
    items = [item for _position, item in FileSource(path).read(Fields())]
    assert items[::2] == [Document("x"), Document("z")]
    assert isinstance(items[1], Malformed)
    assert (items[1].place, items[1].kind) == (2, "too long")


def test_inputs_are_files_directories_and_patterns(tmp_path: Path) -> None:
    paths = [write(tmp_path / name) for name in ("b/2.parquet", "b/deep/3.jsonl.gz", "a/1.jsonl.zst")]
    (tmp_path / "b" / "readme.txt").write_text("no text for training")
    assert [source.path for source in find([str(paths[2]), str(tmp_path / "b")])] == [paths[2], *paths[:2]]
    assert [source.path for source in find([str(tmp_path / "*" / "*.jsonl.zst")])] == [paths[2]]


def test_linked_directories_are_searched_once(tmp_path: Path) -> None:
    path = write(tmp_path / "elsewhere" / "1.jsonl", RECORDS[:1])
    inside = write(tmp_path / "in" / "0.jsonl", RECORDS[:1])
    for name, target in (("link", path.parent), ("again", path.parent), ("loop", inside.parent)):
        (inside.parent / name).symlink_to(target)
    # Directories in order; what was seen is not looked at again.
    assert [source.path for source in find([str(inside.parent)])] == [
        inside,
        inside.parent / "again" / "1.jsonl",
    ]


def test_what_describes_a_data_set_is_no_text(tmp_path: Path) -> None:
    names = "dataset_infos.json dataset_info.json state.json manifest.json 0.manifest.json 0.malformed.jsonl"
    for name in (*names.split(), "0.json", "my_manifest.json"):
        (tmp_path / name).write_text("{}")
    assert [source.path.name for source in find([str(tmp_path)])] == ["0.json", "my_manifest.json"]
    # What is named is taken.
    assert len(find([str(tmp_path / "state.json")])) == 1


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["none.jsonl"], "none.jsonl does not exist"),
        (["*.parquet"], r"\*.parquet does not exist"),
        (["a.txt"], r"a.txt: its name must end with one of .jsonl.zst"),
        (["empty.jsonl"], "empty.jsonl is empty"),
        (["nothing"], "no file in it ends with"),
        (["a.jsonl", "./a.jsonl"], "a.jsonl is given twice"),
    ],
)
def test_bad_inputs_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a.jsonl"), RECORDS[:1])
    Path("a.txt").write_text("x")
    Path("empty.jsonl").touch()
    Path("nothing").mkdir()
    with pytest.raises(UserError, match=problem):
        find(given)


# --- one record ------------------------------------------------------------------------------------------

PILE = b'{"text": "a\\r\\n\\t\xc3\xa9", "meta": {"pile_set_name": "ArXiv"}}\r'


def test_text_is_kept_exactly_and_the_domain_found() -> None:
    assert parse_line(PILE, 1, Fields()) == Document("a\r\n\té", "ArXiv")
    assert parse_line(b'\xef\xbb\xbf{"text": "after a BOM"}', 1, Fields()) == Document("after a BOM")
    assert parse_line(b" \r", 1, Fields()) == Document("")


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
    assert as_item({"content": "x", **record}, 1, Fields("content", path)) == Document("x", domain)


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
    item = parse_line(line, 7, Fields())
    assert isinstance(item, Malformed)
    assert (item.place, item.kind) == (7, kind)
    assert detail in item.detail


def test_bytes_are_utf_8() -> None:
    assert as_item({"text": "é".encode()}, 1, Fields()) == Document("é")
    assert as_item({"text": b"\xff"}, 1, Fields()) == Malformed(
        1, "not UTF-8", "invalid start byte at byte 0"
    )
