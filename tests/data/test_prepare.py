"""The command: from files to what Megatron reads, again after a kill, and what is refused."""

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import tokenizers

from megatron_dyt.data import train_tokenizer, workers
from megatron_dyt.data.dataset_manifest import DatasetManifest
from megatron_dyt.errors import UserError
from tests.data.samples import contents, documents, prepare, source_texts, write_jsonl

BOS, EOS = 1, 2
COMMAND = [sys.executable, "-m", "megatron_dyt", "prepare-data"]
Run = Callable[..., None]


@pytest.fixture
def run(tokenizer_model: Path) -> Run:
    """`run(flags...)` with the tokenizer, in one process unless told otherwise."""

    def run(*flags: object) -> None:
        prepare("--tokenizer-model", tokenizer_model, "--workers", 1, *flags)

    return run


@pytest.fixture
def pile(tmp_path: Path) -> Path:
    """Three compressed shards with domains, one of them with malformed lines."""
    directory = tmp_path / "pile"
    directory.mkdir()
    for number in range(3):
        lines = [
            json.dumps({"text": text, "meta": {"pile_set_name": ["Github", "ArXiv"][index % 2]}})
            for index, text in enumerate(source_texts()[number::3])
        ]
        if number == 1:
            lines += ['{"text": cut', '{"text": 5}']
        with pyarrow.output_stream(str(directory / f"{number:02d}.jsonl.zst"), compression="zstd") as file:
            file.write("".join(line + "\n" for line in lines).encode())
    return directory


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def output_of(capsys: pytest.CaptureFixture[str], function: Callable[[], object]) -> str:
    """What a command logs and prints."""
    capsys.readouterr()
    function()
    return capsys.readouterr().out


# --- a directory of shards -------------------------------------------------------------------------------


def test_a_directory_of_shards(run: Run, pile: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    run("--input", pile, "--output", tmp_path / "out", "--workers", 2)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    for number in range(3):
        found = documents(tmp_path / "out" / f"{number:02d}")
        assert found == [[BOS, *tokenizer.encode(text), EOS] for text in source_texts()[number::3]]
    whole = read(tmp_path / "out" / "manifest.json")
    parts = [read(tmp_path / "out" / f"{number:02d}.manifest.json") for number in range(3)]
    assert list(whole["shards"]) == ["00", "01", "02"]
    assert whole["documents"] == 10
    for key in ("documents", "tokens", "text_bytes"):
        assert whole[key] == sum(part[key] for part in parts)
        assert whole[key] == sum(domain[key] for domain in whole["domains"].values())
    assert list(whole["domains"]) == ["ArXiv", "Github"]
    assert whole["malformed"] == {"not valid JSON": 1, '"text" is not a string': 1}
    assert whole["broken_shards"] == {}


def test_finished_shards_are_left_alone_and_others_written(
    run: Run, pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("--input", pile, "--output", out)
    run(*command)
    before = contents(out)
    for name in before:
        os.utime(out / name, (1, 1))
    assert "up to date" in output_of(capsys, lambda: run(*command))
    assert {path.stat().st_mtime for path in out.iterdir()} == {1.0}
    (out / "01.idx").write_bytes(b"damaged")
    assert "replaced: " in output_of(capsys, lambda: run(*command))
    assert contents(out) == before
    untouched = {path.name for path in out.iterdir() if path.stat().st_mtime == 1}
    # Equal content keeps its file: the malformed lines and the total are the same again.
    assert untouched >= {"00.bin", "00.idx", "02.bin", "02.idx"}
    assert not untouched & {"01.bin", "01.idx", "01.manifest.json"}


def test_empty_parts_are_counted_and_do_not_stop(
    run: Run, pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pile / "03.jsonl.zst").touch()
    (pile / "04.jsonl.gz").write_bytes(gzip.compress(b""))
    (pile / "05.jsonl").write_text('{"text": ""}\n\n{"text": null}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), pile / "06.parquet")
    command = ("--input", pile, "--output", tmp_path / "out", "--workers", 2)
    text = output_of(capsys, lambda: run(*command))
    assert "7 shards, 10 documents" in text
    assert "left out: 3 empty, 2 malformed (named in *.malformed.jsonl), 4 shards without documents" in text
    manifest = read(tmp_path / "out" / "manifest.json")
    assert {name for name, shard in manifest["shards"].items() if not shard["documents"]} == {
        "03",
        "04",
        "05",
        "06",
    }
    assert not list((tmp_path / "out").glob("0[3-6].bin"))
    assert "up to date" in output_of(capsys, lambda: run(*command))
    prepare("--verify", tmp_path / "out")
    blend = output_of(capsys, lambda: prepare("--print-blend", tmp_path / "out")).split()
    assert [Path(word).name for word in blend[1::2]] == ["00", "01", "02"]


@pytest.mark.parametrize("destination", ["--output", "--output-prefix"])
def test_nothing_but_empty_parts_is_an_error(run: Run, tmp_path: Path, destination: str) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.jsonl", "b.parquet"):
        (tmp_path / "in" / name).touch()
    why = "2 shards without documents" if destination == "--output" else "the input is empty"
    with pytest.raises(UserError, match=f"no document is left: {why}"):
        run("--input", tmp_path / "in", destination, tmp_path / "out")


def test_more_input_extends_the_directory(run: Run, pile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--input", pile / "00.jsonl.zst", "--output", out)
    run("--input", pile / "01.jsonl.zst", pile / "02.jsonl.zst", "--output", out)
    assert list(read(out / "manifest.json")["shards"]) == ["00", "01", "02"]


def test_data_of_other_inputs_are_not_replaced(run: Run, pile: Path, tmp_path: Path) -> None:
    """A slip, and the work of hours. More inputs, or fewer, are no slip."""
    first, other = pile / "00.jsonl.zst", pile / "01.jsonl.zst"
    prefix = tmp_path / "out" / "train"
    run("--input", first, "--output-prefix", prefix)
    before = contents(prefix.parent)
    with pytest.raises(UserError, match=r"train was made of other data \(.*00.*\) than .*01.*--overwrite"):
        run("--input", other, "--output-prefix", prefix)
    assert contents(prefix.parent) == before
    run("--input", first, other, "--output-prefix", prefix)
    run("--input", other, "--output-prefix", prefix)
    run("--input", first, "--output-prefix", prefix, "--overwrite")
    assert contents(prefix.parent).keys() == before.keys()


@pytest.mark.parametrize("destination", ["--output", "--output-prefix"])
def test_a_relative_path_is_another_file_elsewhere(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, destination: str
) -> None:
    out = tmp_path / "out" / "x"
    for name in "ab":
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "x.jsonl", [f"of {name}"] * ord(name))
    monkeypatch.chdir(tmp_path / "a")
    run("--input", "x.jsonl", destination, out)
    (manifest,) = tmp_path.glob("out/**/x.manifest.json")
    assert read(manifest)["sources"] == [str(tmp_path / "a" / "x.jsonl")]
    # Earlier releases wrote the path as it was given.
    for sources in ([str(tmp_path / "a" / "x.jsonl")], ["x.jsonl"]):
        manifest.write_text(json.dumps(read(manifest) | {"sources": sources}))
        before = contents(manifest.parent)
        monkeypatch.chdir(tmp_path / "b")
        with pytest.raises(UserError, match="was made of other data"):
            run("--input", "x.jsonl", destination, out)
        assert contents(manifest.parent) == before
        monkeypatch.chdir(tmp_path / "a")
        run("--input", "x.jsonl", destination, out)


@pytest.mark.parametrize("manifest", [None, '{"format": 1}'])
@pytest.mark.parametrize("destination", ["--output", "--output-prefix"])
def test_data_of_other_programs_are_not_replaced(
    run: Run, pile: Path, tmp_path: Path, destination: str, manifest: str | None
) -> None:
    """Of Megatron's preprocess_data, or of another version of this command."""
    out = tmp_path / "out"
    out.mkdir()
    for end in ("bin", "idx"):
        (out / f"00.{end}").write_bytes(b"hours of work")
    if manifest:
        (out / "00.manifest.json").write_text(manifest)
    before = contents(out)
    place = out if destination == "--output" else out / "00"
    command = ("--input", pile / "00.jsonl.zst", destination, place)
    with pytest.raises(UserError, match=r"out/00\.bin is there, but no 00\.manifest\.json of.*--overwrite"):
        run(*command)
    assert contents(out) == before
    run(*command, "--overwrite")
    assert len(documents(out / "00")) == 4


def test_other_settings_are_not_mixed_in(
    run: Run, pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run("--input", pile, "--output", out)
    before = contents(out)
    with pytest.raises(UserError, match=r"00 was made with other settings \(bos\).*--overwrite"):
        run("--input", pile, "--output", out, "--no-bos")
    assert contents(out) == before
    command = ("--input", pile / "00.jsonl.zst", "--output", out, "--no-bos", "--overwrite")
    text = output_of(capsys, lambda: run(*command))
    assert "out/manifest.json leaves out datasets that were made with other settings" in text
    assert "01, 02\n" in text
    assert list(read(out / "manifest.json")["shards"]) == ["00"]
    assert documents(out / "00")[0][0] != BOS


def test_files_of_the_same_name_keep_their_directories(run: Run, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        write_jsonl(tmp_path / "in" / name / "train.jsonl", [name])
    run("--input", tmp_path / "in", "--output", tmp_path / "out")
    shards = read(tmp_path / "out" / "manifest.json")["shards"]
    assert {name: Path(shard["sources"][0]).parent.name for name, shard in shards.items()} == {
        "a-train.jsonl": "a",
        "b-train.jsonl": "b",
    }


def test_an_input_is_not_there_twice_when_another_of_its_name_is_added(run: Run, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "x.jsonl", [f"of {name}"] * (300 if name == "a" else 200))
    run("--input", tmp_path / "a" / "x.jsonl", "--output", tmp_path / "out")
    run("--input", tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl", "--output", tmp_path / "out")
    whole = read(tmp_path / "out" / "manifest.json")
    assert (list(whole["shards"]), whole["documents"]) == (["b-x.jsonl", "x"], 500)


def test_a_broken_shard_stops_and_can_be_skipped(
    run: Run, pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    whole = (pile / "01.jsonl.zst").read_bytes()
    (pile / "01.jsonl.zst").write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"01.jsonl.zst is truncated or damaged"):
        run("--input", pile, "--output", out)
    # What was finished stays; nothing is half, and nothing says that the data are complete.
    assert sorted(contents(out)) == ["00.bin", "00.idx", "00.manifest.json"]
    text = output_of(capsys, lambda: run("--input", pile, "--output", out, "--skip-broken-shards"))
    assert "2 shards" in text
    assert "1 broken shards" in text
    manifest = read(out / "manifest.json")
    assert list(manifest["shards"]) == ["00", "02"]
    assert "truncated" in manifest["broken_shards"]["01"]
    # Other inputs do not mend it.
    more = write_jsonl(tmp_path / "more.jsonl", ["more"])
    run("--input", more, "--output", out)
    manifest = read(out / "manifest.json")
    assert (list(manifest["shards"]), list(manifest["broken_shards"])) == (["00", "02", "more"], ["01"])
    # What was left out is no damage.
    assert "01 was left out" in output_of(capsys, lambda: prepare("--verify", out))
    (pile / "01.jsonl.zst").write_bytes(whole)
    run("--input", pile, "--output", out)
    assert read(out / "manifest.json")["broken_shards"] == {}


def test_a_shard_mended_by_a_run_that_failed_later_counts(run: Run, pile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, *_, last = sorted(pile.iterdir())
    whole = first.read_bytes()
    first.write_bytes(whole[:-10])
    run("--input", pile, "--output", out, "--skip-broken-shards")
    assert list(read(out / "manifest.json")["broken_shards"]) == ["00"]
    first.write_bytes(whole)
    last.write_bytes(last.read_bytes()[:-10])
    with pytest.raises(UserError, match=last.name):
        run("--input", pile, "--output", out)
    run("--input", write_jsonl(tmp_path / "more.jsonl", ["more"]), "--output", out)
    manifest = read(out / "manifest.json")
    assert manifest["broken_shards"] == {}
    assert "00" in manifest["shards"]


def test_a_shard_that_is_broken_now_does_not_count(
    run: Run, pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--input", pile, "--output", tmp_path / "out", "--skip-broken-shards")
    run(*command)
    (pile / "01.jsonl.zst").write_bytes((pile / "01.jsonl.zst").read_bytes()[:-10])
    os.utime(pile / "02.jsonl.zst", (1, 1))
    text = output_of(capsys, lambda: run(*command))
    assert "out/02. Delete the indices" in text
    assert "out/01" not in text
    whole = read(tmp_path / "out" / "manifest.json")
    assert (list(whole["shards"]), list(whole["broken_shards"])) == (["00", "02"], ["01"])
    assert whole["documents"] == sum(shard["documents"] for shard in whole["shards"].values()) == 7


def test_a_shard_that_vanishes_meanwhile_is_missed(
    run: Run, pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = workers.write_all

    def write_and_remove(*args: Any) -> dict[str, str]:
        broken = write(*args)
        (tmp_path / "out" / "01.manifest.json").unlink()
        return broken

    monkeypatch.setattr(workers, "write_all", write_and_remove)
    with pytest.raises(UserError, match="out/01 has vanished"):
        run("--input", pile, "--output", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_filters_and_keys(run: Run, tmp_path: Path) -> None:
    lines = [
        {"body": "short", "source": "A"},
        {"body": "long enough", "source": "A"},
        {"body": "x" * 20, "source": "B"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = ("--json-key", "body", "--domain-key", "source")
    command = ("--input", tmp_path / "in.jsonl", *keys, "--output")
    run(*command, tmp_path / "a", "--min-chars", 6, "--max-chars", 19)
    assert read(tmp_path / "a" / "manifest.json")["filtered"] == {"too short": 1, "too long": 1}
    run(*command, tmp_path / "b", "--not-domains", "A")
    assert list(read(tmp_path / "b" / "manifest.json")["domains"]) == ["B"]
    with pytest.raises(UserError, match="no document is left: 3 filtered"):
        run(*command, tmp_path / "c", "--domains", "none")


def test_a_hugging_face_data_set(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for part in range(2):
        write_jsonl(tmp_path / "set" / f"train-{part}.jsonl", source_texts()[part::2])
    run("--hf-dataset", tmp_path / "set", "--output", tmp_path / "out")
    run("--input", tmp_path / "set", "--output", tmp_path / "expected")
    found = sorted((tmp_path / "out").glob("*.bin"))
    expected = sorted((tmp_path / "expected").glob("*.bin"))
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in expected]


def test_a_hugging_face_tokenizer(hugging_face: Path, pile: Path, tmp_path: Path) -> None:
    kind = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", hugging_face)
    prepare(*kind, "--input", pile, "--output", tmp_path / "out", "--workers", 1)
    tokenizer = tokenizers.Tokenizer.from_file(str(hugging_face / "tokenizer.json"))
    expected = [[BOS, *tokenizer.encode(text).ids, EOS] for text in source_texts()[::3]]
    assert documents(tmp_path / "out" / "00") == expected


# --- interrupted -----------------------------------------------------------------------------------------


def children(pid: int) -> list[Path]:
    """Where /proc has the processes that `pid` has started."""
    return [Path("/proc", child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.distributed
def test_sigkill_costs_no_finished_shard(many: Path, run: Run, tmp_path: Path, tokenizer_model: Path) -> None:
    out = tmp_path / "killed-output"
    command = [*COMMAND, "--input", str(many), "--tokenizer-model", str(tokenizer_model), "--workers", "2"]
    process = subprocess.Popen([*command, "--output", str(out)])
    deadline = time.monotonic() + 120
    while not list(out.glob("*.manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    # The workers, of which one may still be importing, find that nobody listens, clear up and end.
    while any(worker.exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    done = {path.name.split(".")[0] for path in out.glob("*.manifest.json")}
    assert 0 < len(done) < 10
    assert sorted(contents(out)) == sorted(
        f"{n}.{end}" for n in done for end in ("bin", "idx", "manifest.json")
    )
    for path in out.iterdir():
        os.utime(path, (1, 1))
    run("--input", many, "--output", out)
    assert {path.name.split(".")[0] for path in out.iterdir() if path.stat().st_mtime == 1} == done
    run("--input", many, "--output", tmp_path / "in one go")
    assert contents(out) == contents(tmp_path / "in one go")


def test_data_without_their_manifest_yet_are_written_again(
    run: Run, pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill when the data have their names, which another program's have too."""
    out = tmp_path / "out"

    def interrupted(*_args: Any) -> None:
        raise OSError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(DatasetManifest, "write", interrupted)
        with pytest.raises(OSError, match="Input/output"):
            run("--input", pile, "--output", out)
    assert sorted(contents(out)) == ["00.bin", "00.idx", "00.unfinished"]
    run("--input", pile, "--output", out)
    assert not list(out.glob("*.partial"))


def test_half_written_files_of_a_dead_machine_are_no_obstacle(run: Run, pile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for end in ("bin", "idx"):
        (out / f"01.{end}.partial").write_bytes(b"half" * 100_000)
    run("--input", pile, "--output", out)
    assert not list(out.glob("*.partial"))
    prepare("--verify", out)


@pytest.mark.distributed
def test_files_that_may_not_grow_are_a_clear_error(pile: Path, tmp_path: Path, tokenizer_model: Path) -> None:
    """A real failed write in the middle: the kernel refuses it, as on a full disk."""
    command = [*COMMAND, "--input", str(pile), "--tokenizer-model", str(tokenizer_model), "--workers", "2"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    result = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, preexec_fn=limit
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "out failed: OSError" in result.stderr
    assert "a file grew past the allowed size" in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


# --- one dataset -----------------------------------------------------------------------------------------


def test_a_prefix_is_one_dataset_of_all_inputs(
    run: Run, source_jsonl: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", ["tab\tand\r\n", "", "漢字"])
    prefix = tmp_path / "out" / "train"
    run("--input", source_jsonl, more, "--output-prefix", prefix)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    found = documents(prefix)
    assert all(ids[0] == BOS and ids[-1] == EOS for ids in found)
    assert [tokenizer.decode(ids[1:-1]) for ids in found] == [*source_texts(), "tab\tand\r\n", "漢字"]
    manifest = read(tmp_path / "out" / "train.manifest.json")
    assert (manifest["documents"], manifest["empty_documents"]) == (11 + 1, 1)
    assert sorted(contents(tmp_path / "out")) == ["train.bin", "train.idx", "train.manifest.json"]


@pytest.mark.parametrize("change", ["source", "bos", "tokenizer", "truncated", "unfinished"])
def test_any_change_makes_the_dataset_again(
    tmp_path: Path,
    source_jsonl: Path,
    tokenizer_model: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
) -> None:
    source = write_jsonl(tmp_path / "s.jsonl", ["one", "two"])
    model = tmp_path / "t.model"
    model.write_bytes(tokenizer_model.read_bytes())
    prefix = tmp_path / "train"
    command = ["--input", source, "--tokenizer-model", model, "--output-prefix", prefix]
    prepare(*command)
    match change:
        case "source":
            write_jsonl(source, ["one", "two", "three"])
        case "bos":
            command.append("--no-bos")
        case "tokenizer":
            model.write_bytes(train_tokenizer.train([source_jsonl], 500))
        case "truncated":
            (tmp_path / "train.bin").write_bytes(b"12")
        case "unfinished":
            # As after a kill between the data's renames and the manifest's.
            (tmp_path / "train.manifest.json").unlink()
            (tmp_path / "train.unfinished").touch()
    if change in ("bos", "tokenizer"):
        # Other settings, not other text: perhaps a slip, and the work of hours.
        before = contents(tmp_path)
        with pytest.raises(UserError, match=rf"train was made with other settings \({change}.*--overwrite"):
            prepare(*command)
        assert contents(tmp_path) == before
        command.append("--overwrite")
    output = output_of(capsys, lambda: prepare(*command))
    assert "up to date" not in output
    assert "cached" in output
    assert len(documents(prefix)) == (3 if change == "source" else 2)
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_moved_tokenizer_or_source_is_the_same(
    run: Run, tmp_path: Path, tokenizer_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "s.jsonl", ["one", "two"])
    run("--input", source, "--output-prefix", tmp_path / "train")
    (tmp_path / "elsewhere").mkdir()
    source.rename(tmp_path / "elsewhere" / "s.jsonl")
    model = tmp_path / "elsewhere" / "t.model"
    model.write_bytes(tokenizer_model.read_bytes())
    command = ("--tokenizer-model", model, "--input", tmp_path / "elsewhere" / "s.jsonl")
    output = output_of(capsys, lambda: prepare(*command, "--output-prefix", tmp_path / "train"))
    assert "up to date" in output


# --- what is refused -------------------------------------------------------------------------------------


@pytest.fixture
def refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`refused(problem, flags...)`: the error, and no file that was not there before."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "a b.jsonl", "p.malformed.jsonl"):
        write_jsonl(tmp_path / name, ["text"])

    def check(problem: str, *flags: object) -> None:
        before = contents(tmp_path)
        with pytest.raises(UserError, match=problem):
            run(*flags)
        assert contents(tmp_path) == before

    return check


@pytest.mark.parametrize(
    ("problem", "flags"),
    [
        ("either --input or --hf-dataset", "--output out"),
        ("either --input or --hf-dataset", "--output out --input a.jsonl --hf-dataset b"),
        ("either --output or --output-prefix", "--input a.jsonl"),
        ("either --output or --output-prefix", "--input a.jsonl --output out --output-prefix p"),
        ("--slurm-partition needs --output:", "--input a.jsonl --output-prefix p --slurm-partition x"),
        ("--slurm-option team: give KEY=VALUE", "--input a.jsonl --output out --slurm-option team"),
        ("leave no document", "--input a.jsonl --output out --min-chars 5 --max-chars 4"),
        ("both name ArXiv", "--input a.jsonl --output out --domains ArXiv --not-domains ArXiv Books"),
        ("none.jsonl does not exist", "--input none.jsonl --output out"),
        ("a.jsonl is in the output directory", "--input a.jsonl --output ."),
        ("p.malformed.jsonl would be replaced", "--input p.malformed.jsonl --output-prefix p"),
        ("--skip-broken-shards needs --output:", "--input a.jsonl --output-prefix p --skip-broken-shards"),
        ("malformed.jsonl is not a directory", "--input a.jsonl --output p.malformed.jsonl"),
        ("malformed.jsonl is not a directory", "--input a.jsonl --output-prefix p.malformed.jsonl/x"),
        ("--output-prefix . is a directory; give DIR/NAME", "--input a.jsonl --output-prefix ."),
        (r"a b\.jsonl: a dataset's name cannot have a space", "--input a?b.jsonl --output out"),
        ("none.model does not exist", "--input a.jsonl --output out --tokenizer-model none.model"),
    ],
)
def test_wrong_flags(refused: Run, problem: str, flags: str) -> None:
    refused(problem, *flags.split())


def test_tokenizer_is_needed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(UserError, match="give --tokenizer-model"):
        prepare("--input", source, "--output", tmp_path / "out")


def test_tokenizer_without_bos_names_the_flag(
    tmp_path: Path, source_jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(train_tokenizer.SETTINGS, "bos_id", -1)
    monkeypatch.setitem(train_tokenizer.SETTINGS, "eos_id", 1)
    model = tmp_path / "t.model"
    model.write_bytes(train_tokenizer.train([source_jsonl], 500))
    command = ("--input", source_jsonl, "--tokenizer-model", model, "--output-prefix", tmp_path / "a")
    with pytest.raises(UserError, match=r"no BOS token.*--no-bos"):
        prepare(*command)
    prepare(*command, "--no-bos")
    assert len(documents(tmp_path / "a")) == 10


def test_a_model_that_the_cache_cannot_take_is_said(
    tmp_path: Path, source_jsonl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(train_tokenizer.SETTINGS, "remove_extra_whitespaces", True)
    model = tmp_path / "t.model"
    model.write_bytes(train_tokenizer.train([source_jsonl], 500))
    command = ("--input", source_jsonl, "--tokenizer-model", model, "--output-prefix", tmp_path / "a")
    output = output_of(capsys, lambda: prepare(*command))
    assert "t.model is used without the word cache, because it removes extra spaces" in output
    expected = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(source_texts())
    assert [ids[1:-1] for ids in documents(tmp_path / "a")] == expected
