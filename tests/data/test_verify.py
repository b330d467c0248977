"""--verify finds every kind of damage, and --print-blend says what Megatron reads."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.utils import get_blend_from_list

from megatron_dyt.atomic import sha256
from megatron_dyt.data.indexed_dataset import HEADER
from megatron_dyt.data.verify import blend, verify
from megatron_dyt.errors import UserError
from tests.bits import flip
from tests.data.samples import VOCAB_SIZE, prepare, source_texts, write_jsonl


@pytest.fixture
def prepared(tmp_path: Path, tokenizer_model: Path) -> Path:
    """Two shards."""
    sources = [write_jsonl(tmp_path / f"{n}.jsonl", source_texts()[n::2]) for n in range(2)]
    command = ["--input", *sources, "--tokenizer-model", tokenizer_model, "--workers", 1]
    prepare(*command, "--output", tmp_path / "out")
    return tmp_path / "out"


def test_what_was_written_is_good(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(prepared) == (2, [])
    assert verify(prepared / "0") == (1, [])
    capsys.readouterr()
    prepare("--verify", prepared)
    assert capsys.readouterr().out == f"{prepared}: 2 shards are as they were written\n"
    moved = prepared.rename(prepared.with_name("moved"))
    assert verify(moved) == (2, [])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda d: flip(d / "1.bin", 1000), "1.bin has another content (SHA-256) than was written"),
        (lambda d: flip(d / "1.idx", 100), "1.idx has another content (SHA-256) than was written"),
        (lambda d: (d / "1.bin").write_bytes(b"1234"), "1.bin has 4 bytes and had "),
        (lambda d: (d / "1.idx").unlink(), "1.idx is missing"),
        (lambda d: (d / "1.manifest.json").unlink(), "1.manifest.json is missing, damaged or"),
        (lambda d: (d / "1.manifest.json").write_text("{"), "1.manifest.json is missing, damaged or"),
    ],
)
def test_damage_is_named(prepared: Path, damage: Callable[[Path], object], problem: str) -> None:
    damage(prepared)
    count, problems = verify(prepared)
    assert count == 2
    assert len(problems) == 1
    assert problem in problems[0]
    with pytest.raises(UserError, match="1 problems in 2 shards"):
        prepare("--verify", prepared)


def rewritten(prefix: Path, change: Callable[[bytearray, bytearray], None], **manifest: int) -> None:
    """Change data and index, and let the manifest's checksums agree with them."""
    files = [prefix.with_name(prefix.name + end) for end in (".bin", ".idx")]
    contents = [bytearray(path.read_bytes()) for path in files]
    change(*contents)
    path = prefix.with_name(prefix.name + ".manifest.json")
    said = json.loads(path.read_text()) | manifest
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
        said["outputs"][file.name] = {"bytes": len(content), "sha256": sha256(file)}
    path.write_text(json.dumps(said))


def set_id(data: bytearray, _index: bytearray) -> None:
    data[200:202] = np.uint16(VOCAB_SIZE).tobytes()


def shift_lengths(_data: bytearray, index: bytearray) -> None:
    lengths = np.frombuffer(index, "<i4", 2, HEADER.size) + np.array([1, -1])
    index[HEADER.size : HEADER.size + 8] = lengths.astype("<i4").tobytes()


def other_version(_data: bytearray, index: bytearray) -> None:
    index[9] = 2


@pytest.mark.parametrize(
    ("change", "manifest", "problem"),
    [
        (set_id, {}, f"holds id {VOCAB_SIZE}, the vocabulary has {VOCAB_SIZE}"),
        (shift_lengths, {}, "does not divide 0.bin into its documents"),
        (other_version, {}, "does not begin as the index of 5 documents of uint16 does"),
        (lambda data, index: None, {"documents": 6}, "does not begin as the index of 6 documents"),
        (lambda data, index: None, {"tokens": 6}, "its manifest 6"),
    ],
)
def test_contradictions_are_named(
    prepared: Path, change: Callable[[bytearray, bytearray], None], manifest: dict[str, int], problem: str
) -> None:
    rewritten(prepared / "0", change, **manifest)
    _count, problems = verify(prepared / "0")
    assert len(problems) == 1
    assert problem in problems[0]


def test_a_shard_that_is_not_the_directorys_is_named(prepared: Path) -> None:
    rewritten(prepared / "0", lambda data, index: data.__setitem__(slice(2, 4), data[4:6]))
    _count, problems = verify(prepared)
    assert len(problems) == 1
    assert "its manifest is not the one that" in problems[0]


def test_a_directory_without_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a directory with manifest\.json nor a prefix"):
        verify(tmp_path)
    with pytest.raises(UserError, match=r"has no manifest\.json of prepare-data"):
        blend([tmp_path])


def test_a_current_directory_without_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"neither a directory with manifest\.json nor a prefix"):
        verify(Path())


# --- blends ----------------------------------------------------------------------------------------------


def test_a_blend_is_what_megatron_reads(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = [json.loads((prepared / f"{n}.manifest.json").read_text())["tokens"] for n in range(2)]
    capsys.readouterr()
    prepare("--print-blend", prepared)
    words = capsys.readouterr().out.split()
    assert get_blend_from_list(words) == ([f"{prepared}/0", f"{prepared}/1"], [float(n) for n in tokens])


def test_one_shard_is_its_prefix(prepared: Path) -> None:
    assert blend([prepared / "0"]) == [str(prepared / "0")]
    assert len(blend([prepared / "0", prepared / "1"])) == 4
    assert len(blend([prepared, prepared / "1"])) == 4


def test_blends_that_cannot_work_are_refused(prepared: Path, tmp_path: Path) -> None:
    (prepared / "0.idx").rename(tmp_path / "0.idx")
    with pytest.raises(UserError, match=r"0\.idx is missing"):
        blend([prepared])
    (tmp_path / "0.idx").rename(prepared / "0.idx")
    spaced = prepared.rename(prepared.with_name("two words"))
    with pytest.raises(UserError, match="has a space in its path"):
        blend([spaced])
    path = spaced.rename(prepared) / "0.manifest.json"
    other = json.loads(path.read_text())
    other["made_from"]["tokenizer"]["sha256"] = "0" * 64
    path.write_text(json.dumps(other))
    with pytest.raises(UserError, match="made with different tokenizers"):
        blend([prepared / "0", prepared / "1"])
