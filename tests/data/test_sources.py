"""Every format gives the same documents; damage is found; memory does not grow with the file."""

import io
import json
import struct
import tracemalloc
import zlib
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

zstd = sources._zstd()

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


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_of_no_bytes_holds_no_documents(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").touch()
    assert list(FileSource(tmp_path / f"a{suffix}").read(Fields())) == []


# Frames of zstd with a window of 2 GiB, and what `pzstd` puts in front of each of its frames.
LONG = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.enable_long_distance_matching: 1}
SKIPPED = struct.pack("<III", 0x184D2A50, 4, 1234)


def long_window(content: bytes) -> bytes:
    """Without the size of the content, by which zstd would make the window smaller."""
    compressor = zstd.ZstdCompressor(options=LONG)
    return compressor.compress(content[:1]) + compressor.compress(content[1:]) + compressor.flush()


def test_every_window_of_zstd_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(long_window(json_lines(RECORDS)))
    assert zstd.get_frame_info(path.read_bytes()).decompressed_size is None
    with pytest.raises(OSError, match="too much memory"), pyarrow.input_stream(str(path)) as plain:
        plain.read()
    assert [item for _position, item in FileSource(path).read(Fields())] == DOCUMENTS
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BrokenSourceError, match="truncated or damaged"):
        list(FileSource(path).read(Fields()))


def test_zstd_frames_of_all_kinds_in_a_row(tmp_path: Path) -> None:
    first, second = json_lines(RECORDS[:300]), json_lines(RECORDS[300:])
    path = tmp_path / "a.jsonl.zst"
    empty = zstd.compress(b"")
    path.write_bytes(SKIPPED + zstd.compress(first) + empty + SKIPPED + long_window(second) + SKIPPED)
    assert [item for _position, item in FileSource(path).read(Fields())] == DOCUMENTS


@pytest.mark.parametrize(
    "error",
    [
        pyarrow.ArrowMemoryError("malloc of size 2147483648 failed"),
        zstd.ZstdError("Unable to decompress Zstandard data: Allocation error : not enough memory"),
    ],
)
def test_too_little_memory_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(sources, "_read_json", fail)
    source = FileSource(write(tmp_path / "a.jsonl.zst"))
    with pytest.raises(UserError, match=r"a.jsonl.zst needs more memory than there is") as failure:
        list(source.read(Fields()))
    assert not isinstance(failure.value, BrokenSourceError)


def bgzip(content: bytes) -> bytes:
    """As samtools' bgzip: small gzip members with their size in the header, and an empty one at the end."""
    members = b""
    for part in (*(content[start : start + 65280] for start in range(0, len(content), 65280)), b""):
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        packed = packer.compress(part) + packer.flush()
        header = struct.pack("<4BI2BH2BHH", 31, 139, 8, 4, 0, 0, 255, 6, 66, 67, 2, len(packed) + 25)
        members += header + packed + struct.pack("<II", zlib.crc32(part), len(part))
    return members


def test_bgzip_is_gzip(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(bgzip(json_lines(RECORDS)))
    assert [item for _position, item in FileSource(tmp_path / "a.jsonl.gz").read(Fields())] == DOCUMENTS


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
        Document(""),
    ]
    with pytest.raises(
        BrokenSourceError, match=r'no column "text"; it has body, meta.pile_set_name: choose with --json-key'
    ):
        list(FileSource(tmp_path / "a.parquet").read(Fields()))


STRUCT = pyarrow.struct({"content": pyarrow.string(), "lang": pyarrow.string()})


@pytest.mark.parametrize(
    ("columns", "fields", "expected"),
    [
        ({"text": pyarrow.array(["a", None], pyarrow.large_string())}, Fields(), [("a", None), ("", None)]),
        ({"text": pyarrow.array(["a", None], pyarrow.string_view())}, Fields(), [("a", None), ("", None)]),
        ({"text": pyarrow.nulls(2)}, Fields(), [("", None), ("", None)]),
        (
            {
                "data": pyarrow.array([{"content": "a", "lang": "en"}, {"lang": "de"}, None], STRUCT),
                "n": [1, 2, 3],
            },
            Fields("data.content", "data.lang"),
            [("a", "en"), ("", "de"), ("", None)],
        ),
        # A column with a dot in its name comes before a path.
        (
            {"data": pyarrow.array([{"content": "a"}], STRUCT), "data.content": ["b"]},
            Fields("data.content"),
            [("b", None)],
        ),
        ({"a.b": pyarrow.array([{"content": "a"}], STRUCT)}, Fields("a.b.content"), [("a", None)]),
        # As Spark writes an object.
        (
            {
                "text": ["a", "b"],
                "meta": pyarrow.array(
                    [{"pile_set_name": "X", "c": "d"}, None], pyarrow.map_("string", "string")
                ),
            },
            Fields(),
            [("a", "X"), ("b", None)],
        ),
    ],
)
def test_columns_of_other_types(
    tmp_path: Path, columns: dict[str, Any], fields: Fields, expected: list[tuple[str, str | None]]
) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    items = [item for _position, item in FileSource(tmp_path / "a.parquet").read(fields)]
    assert items == [Document(*each) for each in expected]


def test_row_groups_may_be_empty(tmp_path: Path) -> None:
    schema = pyarrow.schema({"text": pyarrow.string()})
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", schema) as file:
        for texts in ([], ["a"], [], ["b", "c"], []):
            file.write_table(pyarrow.table({"text": texts}, schema))
    items = [item for _position, item in FileSource(tmp_path / "a.parquet").read(Fields())]
    assert items == [Document("a"), Document("b"), Document("c")]


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


# What Spark, Delta Lake, macOS, git and `hf download` leave beside the data, and a partition.
BESIDE = """_SUCCESS ._SUCCESS.crc .part-0.json.gz.crc _temporary/0/part-0.json _delta_log/0.json
    _delta_log/0.checkpoint.parquet ._0.jsonl .git/a.json .cache/huggingface/download/0.parquet.metadata
    _metadata.json README.md LICENSE 0.csv 1.csv state.json"""
DATA = "_year=2020/part-0.json part-0.json.gz z.ndjson.zstd"


def test_what_is_data_in_a_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (*BESIDE.split(), *DATA.split()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with caplog.at_level("INFO"):
        assert [str(source.path.relative_to(tmp_path)) for source in find([str(tmp_path)])] == DATA.split()
    left_out = "5 that begin with . or _, 2 .csv, 1 .md, 1 LICENSE, 1 state.json"
    assert sorted(caplog.messages[0].split("left out: ")[1].split(", ")) == sorted(left_out.split(", "))
    assert "3 files are read" in caplog.messages[0]
    # What is named is taken.
    assert len(find([str(tmp_path / "_delta_log" / "0.json"), str(tmp_path / ".git")])) == 2


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl is a link to nothing"):
        find([str(tmp_path)])
    assert [source.name for source in find([f"{tmp_path}/**/*.jsonl"])] == ["a"]


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
        (["a.txt"], r"a.txt: its name must end with .jsonl, .json or .ndjson, with .zst"),
        (["nothing"], r"no file in it ends with .* \.parquet$"),
        (["other"], r"no file in it ends with .* \.parquet; it has 2 .csv, 1 that begin with . or _"),
        (
            ["packed"],
            r"packed.1.jsonl.xz: this compression is not read. Pack it as .zst .*'packed/\*\*/\*.jsonl'",
        ),
        (["a.jsonl", "./a.jsonl"], "a.jsonl is given twice"),
    ],
)
def test_bad_inputs_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a.jsonl"), RECORDS[:1])
    Path("a.txt").write_text("x")
    for directory, names in (
        ("nothing", ""),
        ("other", "a.csv b.csv _b.jsonl.xz"),
        ("packed", "0.jsonl 1.jsonl.xz"),
    ):
        Path(directory).mkdir()
        for name in names.split():
            Path(directory, name).touch()
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
    ("line", "path", "text"),
    [
        ('{"data": {"content": "x"}}', "data.content", "x"),
        ('{"a": {"b": {"c": "x"}}}', "a.b.c", "x"),
        # Keys with dots: as the whole path, and within it.
        ('{"data.content": "x", "data": {"content": "y"}}', "data.content", "x"),
        ('{"a.b": {"c.d": "x"}}', "a.b.c.d", "x"),
        # Null, whole or on the way, is an empty text.
        ('{"text": null}', "text", ""),
        ('{"data": {"content": null}}', "data.content", ""),
        ('{"data": null}', "data.content", ""),
    ],
)
def test_text_is_looked_up_by_its_path(line: str, path: str, text: str) -> None:
    assert parse_line(line.encode(), 1, Fields(path)) == Document(text)


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        (b'{"id": 1, "data": {"body": "x", "n": 2}}', "it has 'id', 'data.body', 'data.n'"),
        (b'{"data": ["content"]}', "it has 'data'"),
        (b'{"data": {}}', "it has 'data'"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(line: bytes, detail: str) -> None:
    assert parse_line(line, 1, Fields("data.content")) == Malformed(1, 'no "data.content"', detail)


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
