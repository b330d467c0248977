"""Whether the ids in an indexed dataset have rows in the model's embedding.

Those that have none stop a GPU with an assertion that names no file; with tensor parallelism they pass, as
each rank takes them for another's, and train the model on zeros.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dyt.errors import UserError

# What is looked at of a dataset: all of it where it is not longer than that many pieces together.
_PIECES, _PIECE_TOKENS = 16, 4096


def check(dtypes: Mapping[str, np.dtype[Any]], args: Namespace) -> None:
    """No id in a sample of each dataset, given with the type of its ids, is beyond the model's vocabulary.

    Raises:
        UserError: one is. The message says how much was looked at.
    """
    rows = vocabulary(args) if dtypes else None
    if rows is None:
        return
    for prefix, dtype in dtypes.items():
        highest, place, looked, total = _highest(Path(f"{prefix}.bin"), dtype)
        if highest >= rows:
            raise UserError(
                f"dataset {prefix} has the id {highest} (token {place:,} of its file; the largest of "
                f"{looked:,} looked at among {total:,}), but the model's vocabulary is {rows} entries: ids 0 "
                f"to {rows - 1}. Give the tokenizer that the data were made with instead of "
                f"{_tokenizer(args)}, or prepare them with this one"
            )


def vocabulary(args: Namespace) -> int | None:
    """Rows of the embedding that Megatron will build, padding included; None where only a checkpoint says it.

    Megatron builds the tokenizer for it, as it will once more: in seconds, by this process alone.
    """
    given: int | None = getattr(args, "padded_vocab_size", None)
    if given is not None:
        return given
    if getattr(args, "use_checkpoint_args", False):
        return None
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    probe = copy.copy(args)
    probe.tokenizer_type = args.tokenizer_type or "GPT2BPETokenizer"
    build_tokenizer(probe)
    padded: int | None = getattr(probe, "padded_vocab_size", None)  # None without --pad-vocab-size.
    return padded


def _tokenizer(args: Namespace) -> str:
    if args.tokenizer_type == "NullTokenizer":
        return f"NullTokenizer with --vocab-size {args.vocab_size}"
    return str(args.tokenizer_model or args.vocab_file or args.tokenizer_type)


def _highest(data: Path, dtype: np.dtype[Any]) -> tuple[int, int, int, int]:
    """(largest id in the sample, its place in the file from 0, tokens in the sample, tokens in the file)."""
    total = data.stat().st_size // dtype.itemsize
    if total == 0:
        return -1, 0, 0, 0
    tokens = np.memmap(data, dtype, "r", shape=(total,))
    pieces = [(0, total)]
    if total > _PIECES * _PIECE_TOKENS:
        # Evenly from the first tokens to the last.
        starts = np.linspace(0, total - _PIECE_TOKENS, _PIECES).astype(int).tolist()
        pieces = [(start, start + _PIECE_TOKENS) for start in starts]
    places = [start + int(tokens[start:end].argmax()) for start, end in pieces]
    place = max(places, key=lambda each: tokens[each])
    return int(tokens[place]), place, sum(end - start for start, end in pieces), total
