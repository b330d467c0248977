"""The tokenizer is exact, has LLaMA's settings, and is trained in bounded time."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece

from megatron_dyt.cli.data import train_tokenizer
from megatron_dyt.data.dataset_manifest import Fields
from megatron_dyt.data.sources import FORMATS, FileSource
from megatron_dyt.data.train_tokenizer import sample_texts, train
from megatron_dyt.errors import UserError
from tests.data.samples import VOCAB_SIZE, source_texts, write_jsonl
from tests.data.test_sources import write

AWKWARD = [
    "",
    " ",
    "  two, then tab\tand  trailing  ",
    "def f():\r\n\tif x:\r\n\t\treturn 1\r\n",
    "\n\n\n    indented\n\n",
    "naïve 漢字 🙂 \ufeff \x00 \x85\u2028",
    "<s></s><unk><0x0A> are text, not symbols",
    "0123456789 3.14e-10",
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))


@pytest.mark.parametrize("text", [*AWKWARD, *source_texts()], ids=lambda text: ascii(text[:20]))
def test_decoding_gives_the_text_back(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_settings_are_those_of_llama(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    assert tokenizer.vocab_size() == VOCAB_SIZE
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (0, 1, 2)
    assert tokenizer.id_to_piece(list(range(3, 259))) == [f"<0x{byte:02X}>" for byte in range(256)]
    assert len(tokenizer.encode("2025")) == 4
    pieces = [tokenizer.id_to_piece(index) for index in range(259, VOCAB_SIZE)]
    assert any(len(piece) > 1 and not piece.strip("▁") for piece in pieces), "no run of spaces"
    assert not any("\n" in piece for piece in pieces)


def test_special_pieces_never_come_from_text(
    tokenizer: sentencepiece.SentencePieceProcessor,
) -> None:
    assert not {0, 1, 2} & set(tokenizer.encode("<unk><s></s> \ud7ff\U0010ffff"))


def test_training_is_deterministic(source_jsonl: Path, tokenizer_model: Path) -> None:
    assert train([source_jsonl], VOCAB_SIZE) == tokenizer_model.read_bytes()


def command(*words: object) -> None:
    """`megatron-dyt train-tokenizer WORDS` in this process."""
    train_tokenizer.main([str(word) for word in words], standalone_mode=False)


def sample(paths: list[Path], max_bytes: int) -> list[str]:
    return list(sample_texts([FileSource(path) for path in paths], max_bytes, Fields()))


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_that_prepare_data_reads_gives_the_same_tokenizer(
    tmp_path: Path, source_jsonl: Path, tokenizer_model: Path, suffix: str
) -> None:
    records = [{"text": text} for text in source_texts()]
    corpus = write(tmp_path / f"corpus{suffix}", records).parent
    assert train([corpus], VOCAB_SIZE) == tokenizer_model.read_bytes()


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_samples_of_compressed_files_are_bounded_and_even(tmp_path: Path, suffix: str) -> None:
    # Words that do not compress to nothing, and more than a MiB of them.
    texts = [f"{index:05d} {hashlib.sha512(b'%d' % index).hexdigest()}" for index in range(20_000)]
    path = write(tmp_path / f"a{suffix}", [{"text": text} for text in texts])
    taken = sample([path], 100_000)
    assert 99_000 <= sum(map(len, taken)) <= 100_000
    numbers = [int(text[:5]) for text in taken]
    steps = [after - before for before, after in pairwise(numbers)]
    assert max(steps) < 4 * len(texts) / len(taken)
    assert numbers[0] == 0
    assert numbers[-1] > 19_800


def test_another_key_of_the_text(tmp_path: Path, tokenizer_model: Path) -> None:
    write(tmp_path / "a.parquet", [{"content": text} for text in source_texts()])
    assert train([tmp_path], VOCAB_SIZE, text_key="content") == tokenizer_model.read_bytes()
    with pytest.raises(UserError, match='has no column "text"; it has content: choose with --json-key'):
        train([tmp_path], VOCAB_SIZE)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz is truncated or damaged"):
        train([path], 400)


def test_sample_is_bounded_even_and_repeatable(tmp_path: Path) -> None:
    documents = [f"{index:04d} " * 20 for index in range(1000)]
    paths = [
        write_jsonl(tmp_path / "a.jsonl", documents[:300]),
        write_jsonl(tmp_path / "b.jsonl", documents[300:]),
    ]
    taken = sample(paths, 10_000)
    assert taken == sample(paths, 10_000)
    assert 8_000 <= sum(map(len, taken)) <= 10_000
    numbers = [int(text[:4]) for text in taken]
    steps = [after - before for before, after in pairwise(numbers)]
    assert max(steps) - min(steps) <= 1
    assert numbers[0] == 0
    assert numbers[-1] > 980


def test_sample_of_a_small_input_is_all_of_it(source_jsonl: Path) -> None:
    assert sample([source_jsonl], 10**9) == source_texts()


def test_one_huge_document_is_cut_to_the_limit(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 100_000])
    assert [len(text) for text in sample([path], 1000)] == [1000]


def test_command_writes_the_model_and_nothing_else(source_jsonl: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "t.model"
    command("--input", source_jsonl, "--vocab-size", 400, "--output", output)
    assert [path.name for path in output.parent.iterdir()] == ["t.model"]
    assert sentencepiece.SentencePieceProcessor(model_file=str(output)).vocab_size() == 400


def test_long_lines_are_not_lost(tmp_path: Path) -> None:
    """SentencePiece passes over a line of more bytes than its limit, of which a character may take four."""
    text = "漢字 仮名 " * 80_000
    assert len(text) < 1 << 20 < len(text.encode())
    model = train([write_jsonl(tmp_path / "in.jsonl", [text, "short"])], 270)
    found = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert "漢字" in [found.id_to_piece(index) for index in range(270)]


def test_an_output_that_is_a_directory_is_named_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory; give the name"):
        command("--input", tmp_path / "none.jsonl", "--vocab-size", 300, "--output", tmp_path)


@pytest.mark.parametrize(
    ("content", "vocab_size", "problem"),
    [
        ('{"text": "abc abd"}\n', "4096", "at most [0-9]+ pieces"),
        ('{"text": "abc abd"}\n', "100", "at least 26[0-9] are needed"),
        ('{"text": ""}\n', "300", "no text in"),
        ('{"text": "abc"}\n{"text"\n', "300", "in.jsonl, line 2: not valid JSON"),
        ("", "300", "no text in"),
        (None, "300", "in.jsonl does not exist"),
    ],
)
def test_bad_input_is_one_clear_error(
    tmp_path: Path, content: str | None, vocab_size: str, problem: str
) -> None:
    path = tmp_path / "in.jsonl"
    if content is not None:
        path.write_text(content)
    output = tmp_path / "t.model"
    with pytest.raises(UserError, match=problem):
        command("--input", path, "--vocab-size", vocab_size, "--output", output)
    assert [entry for entry in tmp_path.iterdir() if entry != path] == []


def test_the_stated_minimum_vocabulary_works(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"text": "abc abd"}) + "\n")
    with pytest.raises(UserError) as failure:
        train([path], 100)
    needed = int(str(failure.value).split("at least ")[1].split()[0])
    assert train([path], needed)
    with pytest.raises(UserError, match=f"at least {needed} are needed"):
        train([path], needed - 1)
