"""A checkpoint's identity: of its weights, wherever they are, and of nothing else."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from megatron_dyt.evaluation.identity import result_identity, weights_identity

from .conftest import Trained
from .toy import ToyTokenizer


def test_identity_is_of_the_weights(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    root = trained("DyT").directory
    first, last = root / "iter_0000002", root / "iter_0000004"
    copy = shutil.copytree(last, tmp_path / "elsewhere")
    assert weights_identity(last) == weights_identity(copy)
    assert weights_identity(first) != weights_identity(last)
    (copy / "common.pt").unlink(missing_ok=True)
    next(copy.glob("*.distcp")).write_bytes(b"")
    assert weights_identity(copy) != weights_identity(last)


def test_identity_is_of_the_tokenizer_too(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    kind = {"tokenizer_type": "SentencePieceTokenizer"}
    saved, directory = Namespace(bf16=False, **kind), trained("DyT").directory / "iter_0000004"
    one, same, other = tmp_path / "one", tmp_path / "same", tmp_path / "other"
    one.write_bytes(b"1")
    same.write_bytes(b"1")
    other.write_bytes(b"2")
    tokenizer = ToyTokenizer()
    identities = [result_identity(saved, directory, str(path), tokenizer) for path in (one, same, other)]
    assert identities[0] == identities[1] != identities[2]
    assert result_identity(Namespace(bf16=True, **kind), directory, str(one), tokenizer) != identities[0]
    assert result_identity(saved, directory, None, tokenizer)["tokenizer"] is None


def test_identity_is_of_what_the_tokenizer_s_file_does_not_say(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    """Where an answer ends and how large the vocabulary is, which may be in other files or have no hash."""
    saved, directory = Namespace(tokenizer_type="TikTokenizer"), trained("DyT").directory / "iter_0000004"
    tokenizer = ToyTokenizer()
    first = result_identity(saved, directory, "name", tokenizer)
    tokenizer.eod = 5
    second = result_identity(saved, directory, "name", tokenizer)
    tokenizer.vocab_size += 1
    assert first != second != result_identity(saved, directory, "name", tokenizer)
