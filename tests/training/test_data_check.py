"""Indexed datasets that are not whole, or have ids without a row in the model's embedding, are refused."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.training import data_check
from megatron_dyt.training.data_check import check_ids, vocabulary


def arguments(**given: Any) -> Namespace:
    flags = {"tokenizer_type": "NullTokenizer", "vocab_size": 63, "padded_vocab_size": 128}
    return Namespace(**flags | {"tokenizer_model": None, "vocab_file": None} | given)


def write(directory: Path, ids: Any, dtype: Any) -> dict[str, np.dtype[Any]]:
    np.asarray(ids, dtype).tofile(directory / "corpus.bin")
    return {str(directory / "corpus"): np.dtype(dtype)}


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_the_first_id_too_many(tmp_path: Path, dtype: Any) -> None:
    check_ids(write(tmp_path, [0, 127, 5], dtype), arguments())
    data = write(tmp_path, [0, 127, 5, 128, 1], dtype)
    with pytest.raises(UserError) as refusal:
        check_ids(data, arguments())
    for part in (
        "corpus has the id 128 (token 3 of its file; the largest of 5 looked at among 5)",
        "vocabulary is 128 entries: ids 0 to 127",
        "instead of NullTokenizer with --vocab-size 63",
    ):
        assert part in str(refusal.value)
    check_ids(data, arguments(padded_vocab_size=129))


@pytest.mark.parametrize("place", [0, 299_999])
def test_long_data_are_sampled_from_the_first_token_to_the_last(tmp_path: Path, place: int) -> None:
    ids = np.zeros(300_000, np.uint16)
    ids[place] = 60_000
    with pytest.raises(
        UserError, match=rf"token {place:,} of its file; the largest of 65,536 looked at among 300,000"
    ):
        check_ids(write(tmp_path, ids, np.uint16), arguments(tokenizer_model="t.model", tokenizer_type="X"))


def test_a_tokenizer_of_other_data_is_found_in_a_sample(tmp_path: Path) -> None:
    # As in text, where ids are spread: one in a thousand is too large here.
    ids = np.random.default_rng(0).integers(0, 1000, 300_000)
    with pytest.raises(UserError, match="has the id 999"):
        check_ids(write(tmp_path, ids, np.uint16), arguments(padded_vocab_size=999))


def test_padding_and_empty_data_pass(tmp_path: Path) -> None:
    check_ids(write(tmp_path, [-1, 5], np.int32), arguments())  # Megatron's id of padding that it masks.
    check_ids(write(tmp_path, [], np.int32), arguments())


def test_no_data_ask_for_no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_check, "vocabulary", None)
    check_ids({}, arguments())


def test_the_vocabulary_is_the_one_that_megatron_builds() -> None:
    sizes = {"make_vocab_size_divisible_by": 8, "tensor_model_parallel_size": 2, "pad_vocab_size": True}
    args = arguments(padded_vocab_size=None, rank=0, **sizes)
    assert vocabulary(args) == 64
    assert args.padded_vocab_size is None
    args.vocab_size = 65
    assert vocabulary(args) == 80
    args.use_checkpoint_args = True
    assert vocabulary(args) is None


# --- the two files --------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [-2, 2])
def test_data_of_another_length_than_the_index_says(dataset: str, change: int) -> None:
    os.truncate(f"{dataset}.bin", 10 + change)
    with pytest.raises(UserError, match=rf"has {10 + change} bytes, but .* describes 10"):
        data_check.check_files(dataset)


def test_damaged_indexes(dataset: str) -> None:
    index = Path(f"{dataset}.idx")
    whole = index.read_bytes()
    index.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"truncated \({len(whole) - 1} of {len(whole)} bytes"):
        data_check.check_files(dataset)
    index.write_bytes(whole[:9] + bytes(8) + b"\xff" + whole[18:])
    with pytest.raises(UserError, match="damaged or truncated"):
        data_check.check_files(dataset)
    index.write_bytes(b"something else entirely, but long enough")
    with pytest.raises(UserError, match="not the index of a Megatron dataset"):
        data_check.check_files(dataset)
    index.write_bytes(whole[:18] + bytes(16))
    with pytest.raises(UserError, match="without documents"):
        data_check.check_files(dataset)
