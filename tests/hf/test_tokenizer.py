"""AutoTokenizer on an export gives the ids of the run's own tokenizer, with BOS in front."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sentencepiece

from megatron_dyt.data.train_tokenizer import SETTINGS
from megatron_dyt.errors import UserError
from megatron_dyt.hf import tokenizer as module
from megatron_dyt.hf.tokenizer import TokenizerFacts, write_tokenizer
from tests.data.samples import manifest
from tests.license_tokenizer import TEXT

CODE = Path(module.__file__).read_text()


def train(path: Path, **settings: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_writer=model, **(SETTINGS | settings)
    )
    path.write_bytes(model.getvalue())
    return path


# One is the beginning of another; letters that pieces have too; spaces; what regular expressions mean.
SYMBOLS = ["<tab>", "[x]", "<a>", "<a><b>", "ab", "▁▁▁", "\n\n", "|", "7"]


def mixed_texts() -> list[str]:
    """Symbols, parts of them, spaces and words in every order."""
    random, parts = Random(5), [*SYMBOLS, *"ab<>[]x▁ 日\n", "   ", "the", " license", "tab"]
    return ["".join(random.choices(parts, k=random.randrange(20))) for _ in range(500)]


def run_args(model: Path, kind: str = "SentencePieceTokenizer") -> Namespace:
    return Namespace(tokenizer_type=kind, tokenizer_model=str(model), max_position_embeddings=64)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_dummy_prefix": True},  # LLaMA 2's own.
        {"user_defined_symbols": SYMBOLS, "pad_id": 3},
        {"user_defined_symbols": SYMBOLS, "add_dummy_prefix": True},
    ],
)
def test_sentencepiece(tmp_path: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    model = train(tmp_path / "t.model", vocab_size=350, **settings)
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text(json.dumps({"model_type": "llama"}))
    facts = write_tokenizer(run_args(model), output)
    # Padding that can be nothing else: with bytes for all characters no text has an unknown one.
    assert facts == TokenizerFacts(350, 1, 2, settings.get("pad_id", 0))
    original = sentencepiece.SentencePieceProcessor(model_file=str(model))
    loaded = AutoTokenizer.from_pretrained(str(output))
    assert loaded.bos_token_id == 1
    assert loaded.model_max_length == 64
    assert (loaded.pad_token_id, loaded.padding_side) == (facts.pad, "left")
    for text in (CODE, TEXT, " two  leading", "ends with spaces  ", "日本 🙂\x00", *mixed_texts()):
        ids = original.encode(text)
        assert loaded(text)["input_ids"] == [1, *ids]
        assert loaded.decode(ids) == original.decode(ids)


@pytest.mark.parametrize(
    ("stated", "given", "with_bos"),
    [(False, None, False), (True, None, True), (False, True, True), (None, False, False), (None, None, True)],
)
def test_a_text_begins_as_the_training_documents_do(
    tmp_path: Path, stated: bool | None, given: bool | None, with_bos: bool
) -> None:
    from transformers import AutoTokenizer

    model, output = train(tmp_path / "t.model", vocab_size=350), tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text(json.dumps({"model_type": "llama"}))
    args = run_args(model)
    args.data_path = [str(tmp_path / "data")]
    if stated is not None:
        manifest(bos=stated).write(tmp_path / "data")
    facts = write_tokenizer(args, output, given)
    loaded = AutoTokenizer.from_pretrained(str(output))
    assert facts.bos == loaded.bos_token_id == (1 if with_bos else 2)
    assert loaded.eos_token_id == 2
    ids = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode("a b")
    assert loaded("a b")["input_ids"] == ([1, *ids] if with_bos else ids)
    assert json.loads((output / "tokenizer_config.json").read_text())["add_bos_token"] is with_bos
    # As lm-eval asks for it, with what ends the document before where there is no BOS.
    asked = AutoTokenizer.from_pretrained(str(output), add_bos_token=True)
    assert asked("a b")["input_ids"] == [facts.bos, *ids]


def test_eos_is_called_bos_where_the_vocabulary_has_none(tmp_path: Path) -> None:
    model = train(tmp_path / "t.model", vocab_size=350, bos_id=-1, eos_id=1)
    assert write_tokenizer(run_args(model), tmp_path).bos == 1
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"] is False


def test_other_sentencepiece_models(tmp_path: Path) -> None:
    unigram = train(tmp_path / "u.model", vocab_size=400, model_type="unigram")
    with pytest.raises(UserError, match=r"is no BPE model; exported are .*--no-tokenizer"):
        write_tokenizer(run_args(unigram), tmp_path)
    normal = train(tmp_path / "n.model", vocab_size=350, normalization_rule_name="nmt_nfkc")
    with pytest.raises(UserError, match="normalizes characters"):
        write_tokenizer(run_args(normal), tmp_path)


def test_conversion_that_differs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = train(tmp_path / "t.model", vocab_size=350)
    right = module._merges
    monkeypatch.setattr(module, "_merges", lambda scores: right(scores)[1:])
    with pytest.raises(UserError, match="cannot reproduce the tokenizer"):
        write_tokenizer(run_args(model), tmp_path)


def test_hugging_face_tokenizer_is_copied(tmp_path: Path, tokenizer_model: Path) -> None:
    from transformers import AutoTokenizer

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    facts = write_tokenizer(run_args(tokenizer_model), first)
    again = write_tokenizer(run_args(first, "HuggingFaceTokenizer"), second)
    assert again == facts
    with pytest.raises(UserError, match=r"--no-bos was given, but .* is a Hugging Face one"):
        write_tokenizer(run_args(first, "HuggingFaceTokenizer"), second, bos=False)
    text = "Permission is granted, 12 times."
    ours, theirs = (AutoTokenizer.from_pretrained(str(path))(text)["input_ids"] for path in (second, first))
    assert ours == theirs


def test_ids_that_a_hugging_face_tokenizer_leaves_out_have_rows(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 5, "[UNK]": 9}, unk_token="[UNK]"))
    original = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    original.save_pretrained(str(tmp_path / "first"))
    assert len(original) == 3
    facts = write_tokenizer(run_args(tmp_path / "first", "HuggingFaceTokenizer"), tmp_path)
    assert facts.vocab_size == 10


def test_tokenizers_that_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a TikTokenizer; exported are"):
        write_tokenizer(run_args(tmp_path, "TikTokenizer"), tmp_path)
    with pytest.raises(UserError, match=r"nowhere.model.*is not there"):
        write_tokenizer(run_args(tmp_path / "nowhere.model"), tmp_path)
    with pytest.raises(UserError, match=r"nowhere .*is not there"):
        write_tokenizer(run_args(tmp_path / "nowhere", "HuggingFaceTokenizer"), tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        write_tokenizer(run_args(tmp_path, "HuggingFaceTokenizer"), tmp_path)
