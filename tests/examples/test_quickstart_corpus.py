"""The quickstart corpus: complete, split by path, made once."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from examples.quickstart import corpus
from megatron_dyt.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tree of 120 modules, with files that do not belong in a corpus."""
    root = tmp_path / "lib"
    for index in range(120):
        path = root / f"package{index % 3}" / f"module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"def f{index}():\r\n\treturn '漢字 {index}'\n".encode())
    (root / "package0" / "empty.py").touch()
    (root / "package0" / "latin.py").write_bytes(b"x = '\xe9'\n")
    (root / "package1" / "data.txt").write_text("not a module")
    (root / "package2" / "zz_copy.py").write_bytes((root / "package1" / "module1.py").read_bytes())
    (root / "_sysconfigdata__linux.py").write_text("build_time_vars = {}\n")
    for skipped in ("site-packages", "dist-packages"):
        (root / skipped).mkdir()
        (root / skipped / "installed.py").write_text("installed = 1\n")
    return root


def run(source: Path, output: Path) -> None:
    args = ["--output", str(output), "--source", str(source), "--min-megabytes", "0"]
    assert corpus.main(args) == 0


def records(output: Path) -> dict[str, list[dict[str, str]]]:
    return {
        split: [json.loads(line) for line in (output / f"{split}.jsonl").open()] for split in corpus.SPLITS
    }


def test_every_distinct_text_file_is_in_exactly_one_split(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    found = [record for split in records(tmp_path / "out").values() for record in split]
    assert sorted(record["path"] for record in found) == sorted(
        f"package{index % 3}/module{index}.py" for index in range(120)
    )
    for record in found:
        assert record["text"].encode() == (source / record["path"]).read_bytes()


def test_docstrings_are_another_corpus_of_the_same_files(source: Path, tmp_path: Path) -> None:
    for index in range(120):
        path = source / f"package{index % 3}" / f"module{index}.py"
        path.write_text(f'''"""Module {index}."""\nclass A:\n    """A class."""\n    x = "no docstring"\n''')
    (source / "package0" / "broken.py").write_text("def f(:")
    run(source, tmp_path / "out")
    args = ["--output", str(tmp_path / "out"), "--source", str(source), "--min-megabytes", "0"]
    assert corpus.main([*args, "--docstrings"]) == 0
    found = {r["path"]: r["text"] for split in records(tmp_path / "out").values() for r in split}
    assert found == {
        f"package{index % 3}/module{index}.py": f"Module {index}.\n\nA class." for index in range(120)
    }


def test_split_depends_on_the_path_alone(source: Path, tmp_path: Path) -> None:
    (source / "package2" / "zz_copy.py").unlink()
    run(source, tmp_path / "full")
    for path in sorted(source.glob("package1/*.py"))[::2]:
        path.unlink()
    run(source, tmp_path / "slim")
    full, slim = records(tmp_path / "full"), records(tmp_path / "slim")
    for split in corpus.SPLITS:
        assert slim[split] == [entry for entry in full[split] if (source / entry["path"]).exists()]


def test_split_is_by_sha256_of_the_path() -> None:
    paths = [f"package/module{index}.py" for index in range(20_000)]
    splits = [corpus.split_of(path) for path in paths]
    assert splits.count("heldout") / len(paths) == pytest.approx(0.05, abs=0.01)
    assert splits.count("valid") / len(paths) == pytest.approx(0.03, abs=0.01)
    for path, split in list(zip(paths, splits, strict=True))[:200]:
        first_byte = hashlib.sha256(path.encode()).digest()[0]
        if first_byte > 0.08 * 256 + 1:
            assert split == "train"


def test_second_run_does_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    run(source, output)
    os.utime(output / "train.jsonl", (1, 1))
    capsys.readouterr()
    run(source, output)
    assert "up to date" in capsys.readouterr().out
    assert (output / "train.jsonl").stat().st_mtime == 1


@pytest.mark.parametrize("change", ["source", "truncated", "missing", "unfinished"])
def test_any_change_makes_the_corpus_again(source: Path, tmp_path: Path, change: str) -> None:
    output = tmp_path / "out"
    run(source, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    match change:
        case "source":
            (source / "package1" / "module1.py").write_text("changed = True\n")
        case "truncated":
            (output / "train.jsonl").write_bytes(before["train.jsonl"][:-10])
        case "missing":
            (output / "valid.jsonl").unlink()
        case "unfinished":
            (output / "manifest.json").unlink()
    run(source, output)
    after = {path.name: path.read_bytes() for path in output.iterdir()}
    assert after.keys() == before.keys()
    assert (after == before) == (change != "source")


def test_manifest_counts_and_hashes(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(source, output)
    manifest = json.loads((output / "manifest.json").read_text())
    for split, entries in records(output).items():
        entry = manifest["splits"][split]
        assert entry["documents"] == len(entries)
        assert entry["text_bytes"] == sum(len(record["text"].encode()) for record in entries)
        data = (output / f"{split}.jsonl").read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()


def test_too_little_text_is_a_clear_error_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"holds 0.0 MB of .py text.*5 MB are needed.*--source"):
        corpus.main(["--output", str(output), "--source", str(source)])
    assert not list(output.iterdir())
    with pytest.raises(UserError, match="is not a directory"):
        corpus.main(["--output", str(output), "--source", str(tmp_path / "none")])


def test_a_split_without_text_is_a_clear_error(tmp_path: Path) -> None:
    root = tmp_path / "lib"
    root.mkdir()
    (root / "one.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="none for heldout"):
        run(root, tmp_path / "out")


def test_the_running_python_has_enough(tmp_path: Path) -> None:
    assert corpus.main(["--output", str(tmp_path)]) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["splits"]["train"]["text_bytes"] > 4e6
    assert manifest["splits"]["heldout"]["documents"] >= 20
