"""Tokenizers are found, known by their hash, and encode as their own libraries do."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers as library
from megatron.core.datasets.indexed_dataset import DType

from megatron_dyt.data import tokenizers, train_tokenizer
from megatron_dyt.data.dataset_manifest import HUGGING_FACE, SENTENCEPIECE, Fields, Filters
from megatron_dyt.data.prepare import find_settings
from megatron_dyt.data.tokenizers import Tokenizer
from megatron_dyt.errors import UserError
from tests.data.samples import VOCAB_SIZE, source_texts

TEXTS = ["", "a text with </s> and <s> in it", "漢字 é 🙂", *source_texts()[:2]]


def split(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    ids, lengths = tokenizer.encoder()(texts)
    assert ids.dtype == tokenizer.dtype
    return [each.tolist() for each in np.split(ids, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("cached", [True, False])
def test_sentencepiece_with_and_without_the_cache(
    tokenizer_model: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    if not cached:
        monkeypatch.setattr(tokenizers, "obstacle", lambda model: "a reason")
    tokenizer = tokenizers.find(SENTENCEPIECE, str(tokenizer_model))
    assert tokenizer.obstacle == (None if cached else "a reason")
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model)).encode(TEXTS)
    assert split(tokenizer, TEXTS) == expected
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (1, 2, VOCAB_SIZE)
    assert tokenizer.sha256 == hashlib.sha256(tokenizer_model.read_bytes()).hexdigest()


def test_hugging_face_directory(hugging_face: Path) -> None:
    tokenizer = tokenizers.find(HUGGING_FACE, str(hugging_face))
    plain = library.Tokenizer.from_file(str(hugging_face / "tokenizer.json"))
    found = split(tokenizer, TEXTS)
    assert found[2:] == [plain.encode(text, add_special_tokens=False).ids for text in TEXTS[2:]]
    # Special tokens' names in a text are text: no document ends in its middle.
    assert not {tokenizer.bos, tokenizer.eos} & set(found[1])
    assert plain.decode(found[1]).replace("Ġ", "").replace(" ", "") == TEXTS[1].replace(" ", "")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (1, 2, plain.get_vocab_size())
    by_file = tokenizers.find(HUGGING_FACE, str(hugging_face / "tokenizer.json"))
    assert (by_file.sha256, by_file.bos) == (tokenizer.sha256, tokenizer.bos)


def test_hugging_face_special_tokens_in_a_file_of_their_own(hugging_face: Path) -> None:
    """As older versions of transformers wrote them."""
    config = hugging_face / "tokenizer_config.json"
    config.rename(hugging_face / "special_tokens_map.json")
    config.write_text('{"bos_token": null}')
    tokenizer = tokenizers.find(HUGGING_FACE, str(hugging_face))
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    (hugging_face / "special_tokens_map.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer_config\.json names no bos_token .* or give --no-bos"):
        find_settings(HUGGING_FACE, str(hugging_face), True, True, Fields(), Filters())


def test_hugging_face_truncation_and_padding_are_off(hugging_face: Path) -> None:
    plain = library.Tokenizer.from_file(str(hugging_face / "tokenizer.json"))
    plain.enable_truncation(3)
    plain.enable_padding(length=8)
    plain.save(str(hugging_face / "tokenizer.json"))
    found = split(tokenizers.find(HUGGING_FACE, str(hugging_face)), ["a", source_texts()[0]])
    assert len(found[0]) == 1
    assert len(found[1]) > 1000


def test_bad_tokenizers_are_named(
    hugging_face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"none\.model does not exist"):
        tokenizers.find(SENTENCEPIECE, str(tmp_path / "none.model"))
    (tmp_path / "cut.model").write_bytes(b"\x0a\x0f")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        tokenizers.find(SENTENCEPIECE, str(tmp_path / "cut.model"))
    (hugging_face / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer_config.json is missing"):
        tokenizers.find(HUGGING_FACE, str(hugging_face))
    (hugging_face / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a Hugging Face tokenizer"):
        tokenizers.find(HUGGING_FACE, str(hugging_face))
    with pytest.raises(UserError, match=r"tokenizer.json does not exist.*save_pretrained"):
        tokenizers.find(HUGGING_FACE, str(tmp_path))

    def no_network(*_args: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    with pytest.raises(UserError, match=r"neither a directory .* nor .*\(no network\)"):
        tokenizers.find(HUGGING_FACE, "some/name")


def test_a_model_without_bos_or_eos_says_so(
    source_jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(train_tokenizer.SETTINGS, "bos_id", -1)
    monkeypatch.setitem(train_tokenizer.SETTINGS, "eos_id", -1)
    model = tmp_path / "t.model"
    model.write_bytes(train_tokenizer.train([source_jsonl], 500))
    tokenizer = tokenizers.find(SENTENCEPIECE, str(model))
    assert (tokenizer.bos, tokenizer.eos) == (None, None)


@pytest.mark.parametrize("size", [300, 65_499, 65_500, 128_000])
def test_type_of_ids_is_the_one_that_megatron_chooses(tokenizer_model: Path, size: int) -> None:
    found = tokenizers.find(SENTENCEPIECE, str(tokenizer_model))
    tokenizer = Tokenizer(**{**vars(found), "vocab_size": size})
    assert tokenizer.dtype == DType.optimal_dtype(size)
