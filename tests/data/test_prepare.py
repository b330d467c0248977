"""The dataset that Megatron reads is the text, document for document."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dyt.data import prepare as prepare_module
from megatron_dyt.data import train_tokenizer
from megatron_dyt.data.prepare import Settings, main, prepare
from megatron_dyt.errors import UserError
from tests.data.samples import source_texts, write_jsonl

BOS, EOS = 1, 2


def run(inputs: list[Path], model: Path, prefix: Path, *flags: str) -> None:
    sources = [str(path) for path in inputs]
    args = ["--input", *sources, "--tokenizer-model", str(model), "--output-prefix", str(prefix)]
    assert main([*args, *flags]) == 0


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [dataset[index].tolist() for index in range(len(dataset))]


@pytest.mark.parametrize("workers", ["1", "3"])
def test_dataset_reads_back_as_the_text(
    tmp_path: Path, source_jsonl: Path, tokenizer_model: Path, workers: str
) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", ["tab\tand\r\n", "", "漢字"])
    prefix = tmp_path / "out" / "train"
    run([source_jsonl, more], tokenizer_model, prefix, "--workers", workers)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    found = documents(prefix)
    assert all(ids[0] == BOS and ids[-1] == EOS for ids in found)
    texts = [tokenizer.decode(ids[1:-1]) for ids in found]
    assert texts == [*source_texts(), "tab\tand\r\n", "漢字"]


def test_manifest_counts_what_was_written(tmp_path: Path, source_jsonl: Path, tokenizer_model: Path) -> None:
    blank = write_jsonl(tmp_path / "blank.jsonl", ["", "é"])
    prefix = tmp_path / "train"
    run([source_jsonl, blank], tokenizer_model, prefix)
    manifest = json.loads((tmp_path / "train.manifest.json").read_text())
    assert (manifest["documents"], manifest["empty_documents"]) == (11, 1)
    assert manifest["tokens"] == sum(map(len, documents(prefix)))
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in [*source_texts(), "é"])
    assert manifest["dtype"] == "uint16"
    assert manifest["outputs"]["train.bin"] == 2 * manifest["tokens"]
    assert sorted(path.name for path in tmp_path.glob("train*")) == [
        "train.bin",
        "train.idx",
        "train.manifest.json",
    ]


@pytest.mark.parametrize(
    ("flags", "ends"), [(["--no-bos"], (False, True)), (["--no-append-eod"], (True, False))]
)
def test_begin_and_end_of_document_are_optional(
    tmp_path: Path, tokenizer_model: Path, flags: list[str], ends: tuple[bool, bool]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["some text"])
    run([source], tokenizer_model, tmp_path / "a", *flags)
    (ids,) = documents(tmp_path / "a")
    assert (ids[0] == BOS, ids[-1] == EOS) == ends


def test_batches_do_not_show_in_the_dataset(
    tmp_path: Path, source_jsonl: Path, tokenizer_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings((source_jsonl,), tokenizer_model)
    prepare(settings, tmp_path / "one")
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 1)
    prepare(settings, tmp_path / "many")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"many{suffix}").read_bytes()


def test_large_vocabulary_takes_32_bits(
    tmp_path: Path, source_jsonl: Path, tokenizer_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module.Encoder, "vocab_size", 70_000)
    manifest = prepare(Settings((source_jsonl,), tokenizer_model), tmp_path / "a")
    assert manifest["dtype"] == "int32"
    assert IndexedDataset(str(tmp_path / "a"))[0].dtype == np.int32


def test_second_run_does_nothing(
    tmp_path: Path,
    source_jsonl: Path,
    tokenizer_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prefix = tmp_path / "train"
    run([source_jsonl], tokenizer_model, prefix)
    os.utime(tmp_path / "train.bin", (1, 1))
    capsys.readouterr()
    run([source_jsonl], tokenizer_model, prefix)
    assert "up to date" in capsys.readouterr().out
    assert (tmp_path / "train.bin").stat().st_mtime == 1


@pytest.mark.parametrize("change", ["source", "flag", "tokenizer", "truncated", "unfinished"])
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
    run([source], model, prefix)
    flags = []
    match change:
        case "source":
            write_jsonl(source, ["one", "two", "three"])
        case "flag":
            flags = ["--no-bos"]
        case "tokenizer":
            model.write_bytes(train_tokenizer.train([source_jsonl], 500))
        case "truncated":
            (tmp_path / "train.bin").write_bytes(b"12")
        case "unfinished":
            (tmp_path / "train.manifest.json").unlink()
    capsys.readouterr()
    run([source], model, prefix, *flags)
    output = capsys.readouterr().out
    assert "up to date" not in output
    assert "cached" in output
    assert len(documents(prefix)) == (3 if change == "source" else 2)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"text": "a"}\n{"text": "b', "in.jsonl, line 2: is not valid JSON"),
        ('{"text": ""}\n', "no text in"),
        ("", "in.jsonl is empty"),
        (None, "in.jsonl does not exist"),
    ],
)
def test_bad_source_leaves_the_old_dataset_whole(
    tmp_path: Path, tokenizer_model: Path, content: str | None, problem: str
) -> None:
    prefix = tmp_path / "train"
    run([write_jsonl(tmp_path / "good.jsonl", ["good"])], tokenizer_model, prefix)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if content is not None:
        (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(UserError, match=problem):
        run([tmp_path / "in.jsonl"], tokenizer_model, prefix)
    (tmp_path / "in.jsonl").unlink(missing_ok=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_tokenizer_and_workers(tmp_path: Path, source_jsonl: Path, tokenizer_model: Path) -> None:
    cut = tmp_path / "cut.model"
    cut.write_bytes(tokenizer_model.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a SentencePiece model"):
        run([source_jsonl], cut, tmp_path / "a")
    with pytest.raises(UserError, match="does not exist"):
        run([source_jsonl], tmp_path / "none.model", tmp_path / "a")
    with pytest.raises(UserError, match="--workers must be at least 1"):
        run([source_jsonl], tokenizer_model, tmp_path / "a", "--workers", "0")


def test_tokenizer_without_bos_names_the_flag(
    tmp_path: Path, source_jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(train_tokenizer.SETTINGS, "bos_id", -1)
    monkeypatch.setitem(train_tokenizer.SETTINGS, "eos_id", 1)
    model = tmp_path / "t.model"
    model.write_bytes(train_tokenizer.train([source_jsonl], 500))
    with pytest.raises(UserError, match=r"no BOS piece.*--no-bos"):
        run([source_jsonl], model, tmp_path / "a")
    run([source_jsonl], model, tmp_path / "a", "--no-bos")
    assert len(documents(tmp_path / "a")) == 10
