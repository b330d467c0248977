"""A tokenizer that is not the checkpoint's: told by its size, and by the data it was trained on."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_dyt.atomic import sha256
from megatron_dyt.data.tokenizer_check import (
    check_against_data,
    check_vocabulary,
    documents_begin_with_bos,
)
from megatron_dyt.errors import UserError

SAVED = Namespace(
    padded_vocab_size=512,
    make_vocab_size_divisible_by=128,
    tensor_model_parallel_size=1,
    tokenizer_model="its.model",
)
HERE = Path("checkpoint")
KIND = "SentencePieceTokenizer"


def test_sizes_that_padding_explains() -> None:
    for size in (385, 400, 512):
        check_vocabulary(size, SAVED, "other.model", HERE)
    check_vocabulary(129, Namespace(**vars(SAVED) | {"tensor_model_parallel_size": 4}), "other.model", HERE)


def test_too_many_tokens() -> None:
    with pytest.raises(UserError, match=r"other.model has 513 tokens.*checkpoint knows at most 512"):
        check_vocabulary(513, SAVED, "other.model", HERE)


def test_too_few_tokens() -> None:
    with pytest.raises(UserError, match=r"384 tokens, too few for the 512.*multiple of 128"):
        check_vocabulary(384, SAVED, "other.model", HERE)
    # The checkpoint's own may be padded by hand.
    check_vocabulary(384, SAVED, "its.model", HERE)


def test_data_of_another_tokenizer(tmp_path: Path) -> None:
    own, other = tmp_path / "own.model", tmp_path / "other.model"
    own.write_bytes(b"one")
    other.write_bytes(b"another")
    made_from = {"made_from": {"tokenizer": {"type": KIND, "sha256": sha256(own)}}}
    (tmp_path / "train.manifest.json").write_text(json.dumps(made_from))
    for flag in ("data_path", "train_data_path"):
        saved = Namespace(
            tokenizer_type=KIND, **{flag: ["0.7", str(tmp_path / "train"), "0.3", str(tmp_path / "gone")]}
        )
        check_against_data(saved, str(own))
        with pytest.raises(UserError, match=r"other.model .*says .*train.manifest.json"):
            check_against_data(saved, str(other))


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"made_from": {"tokenizer": {}}}', '{"made_from": 3}'])
def test_nothing_is_known(tmp_path: Path, manifest: str) -> None:
    model = tmp_path / "own.model"
    model.write_bytes(b"one")
    (tmp_path / "train.manifest.json").write_text(manifest)
    check_against_data(Namespace(tokenizer_type=KIND, data_path=[str(tmp_path / "train")]), str(model))
    check_against_data(Namespace(tokenizer_type=KIND, data_path=None), str(model))
    check_against_data(Namespace(tokenizer_type="NullTokenizer"), str(model))
    check_against_data(Namespace(), None)


def test_whether_documents_begin_with_bos(tmp_path: Path) -> None:
    for name, made_from in {"with": {"bos": True}, "without": {"bos": False}, "other": {}}.items():
        (tmp_path / f"{name}.manifest.json").write_text(json.dumps({"made_from": made_from}))

    def answer(*names: str) -> bool | None:
        words = [word for name in names for word in ("1", str(tmp_path / name))]
        return documents_begin_with_bos(Namespace(data_path=words, valid_data_path=None))

    assert answer("with", "other") is True
    assert answer("without", "gone") is False
    # With BOS in some of the documents the model knows it.
    assert answer("without", "with") is True
    assert answer("other") is answer("gone") is answer() is None
