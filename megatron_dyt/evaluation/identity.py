"""What a model is, for results that are kept: its weights by their checksums, and its tokenizer."""

from __future__ import annotations

import hashlib
import zipfile
from argparse import Namespace
from pathlib import Path

import megatron_dyt
from megatron_dyt.checkpoints.crc import Item, checksums, stored_items
from megatron_dyt.data.tokenizer_check import tokenizer_hash
from megatron_dyt.evaluation.tokenizer import TextTokenizer


def weights_identity(directory: Path) -> str:
    """A hash over the checksums that the checkpoint stores of its model tensors.

    It reads the ends of the stored archives, not the weights. A copy of the checkpoint elsewhere has
    the same; one saved at another parallel layout has not.
    """
    digest = hashlib.sha256()
    for item in stored_items(directory):
        if "optimizer." not in item.name:
            digest.update(f"{item.name} {item.length} {_checksums(item)}\n".encode())
    return digest.hexdigest()


def _checksums(item: Item) -> str:
    try:
        return " ".join(map(str, checksums(item)))
    except (OSError, zipfile.BadZipFile) as error:
        # The load will say what is wrong with it.
        return type(error).__name__


def result_identity(
    saved: Namespace, directory: Path, path: str | None, tokenizer: TextTokenizer
) -> dict[str, object]:
    """All that the result of a request, which is tokens, depends on besides it; `path` is the tokenizer's."""
    return {
        "weights": weights_identity(directory),
        "tokenizer": tokenizer_hash(saved, path) or path,
        # Not in the hash of a tokenizer.json, and some kinds have no hash.
        "vocabulary": [tokenizer.vocab_size, tokenizer.eod],
        "tokenizer_type": getattr(saved, "tokenizer_type", None),
        "precision": [bool(getattr(saved, name, False)) for name in ("bf16", "fp16")],
        "megatron_dyt": megatron_dyt.__version__,
    }
