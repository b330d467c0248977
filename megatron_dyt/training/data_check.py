"""Indexed datasets before training: whole, and with ids that have rows in the model's embedding.

An id that has none stops a GPU with an assertion that names no file; with tensor parallelism it passes, as
each rank takes it for another's, and trains the model on zeros.
"""

import copy
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dyt.data.indexed_dataset import HEADER, MAGIC
from megatron_dyt.errors import UserError

# By the index's dtype code (megatron.core.datasets.indexed_dataset.DType).
_DTYPES = {
    **{1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64},
    **{6: np.float64, 7: np.float32, 8: np.uint16},
}
# What is looked at of a dataset: all of it where it is not longer than that many pieces together. 65,536 ids
# find a tokenizer of other data (one id too large in a thousand) and take no time.
_PIECES, _PIECE_TOKENS = 16, 4096


# --- the two files --------------------------------------------------------------------------------


def check_files(prefix: str) -> np.dtype[Any]:
    """PREFIX.idx is a whole index and PREFIX.bin holds as many bytes as it says. Returns the ids' type."""
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, data):
        if not path.is_file():
            raise UserError(
                f"dataset {prefix}: {path} does not exist. Give the prefix of a .bin and .idx pair "
                "(megatron-dyt prepare-data writes one); for a directory that it wrote, give what "
                "megatron-dyt prepare-data --print-blend DIR prints"
            )
    tokens, dtype = _read_index(index)
    expected = tokens * dtype.itemsize
    present = data.stat().st_size
    if present != expected:
        raise UserError(
            f"dataset {prefix}: {data} has {present} bytes, but {index} describes {expected}. "
            "One of them is truncated or belongs to another dataset: prepare the data again"
        )
    return dtype


def _read_index(index: Path) -> tuple[int, np.dtype[Any]]:
    """(tokens that the .bin of this index must have, their type); `UserError` when it is damaged."""
    with index.open("rb") as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise UserError(f"{index} is not the index of a Megatron dataset: prepare it again")
        _magic, _version, code, sequences, documents = HEADER.unpack(header)
        # Lengths (int32) and offsets (int64) of the sequences, then the document boundaries (int64).
        needed = HEADER.size + sequences * (4 + 8) + documents * 8
        if code not in _DTYPES or index.stat().st_size < needed:
            raise UserError(
                f"{index} is damaged or truncated ({index.stat().st_size} of {needed} bytes): "
                "prepare the data again"
            )
    if sequences == 0:
        raise UserError(f"{index} describes a dataset without documents: prepare it again")
    # int32 [sequences]: the ids of each.
    lengths: Any = np.memmap(index, np.int32, "r", offset=HEADER.size, shape=(sequences,))
    return int(lengths.sum(dtype=np.int64)), np.dtype(_DTYPES[code])


# --- the split ------------------------------------------------------------------------------------

# Megatron's where --split is not given.
_DEFAULT_SPLIT = "969, 30, 1"


def check_split(prefixes: Sequence[str], args: Namespace) -> None:
    """Each part of --split has a document of each dataset: Megatron goes through none for ever.

    A part of which nothing is asked (--eval-iters 0) is built too, from one token at least. A part with
    the share 0 is not built, and --full-validation goes through the validation data once.

    Raises:
        UserError: a part has none. The message names a split that works.
    """
    from megatron.core.datasets import blended_megatron_dataset_config as megatron

    split = args.split or _DEFAULT_SPLIT
    ends = megatron.convert_split_vector_to_split_matrix(megatron.parse_and_normalize_split(split))
    asked = {
        name: part
        for name, part in zip(("training", "validation", "test"), ends, strict=True)
        if part is not None and not (name == "validation" and args.full_validation)
    }
    # The smallest first, so that the split that is named serves all.
    for documents, prefix in sorted((_documents(prefix), prefix) for prefix in prefixes):
        for name, (begin, end) in asked.items():
            if round(end * documents) > round(begin * documents):
                continue
            others = [int(part is not None) for part in ends[1:]]
            works = ",".join(map(str, (documents - sum(others), *others)))
            advice = f"--split {works}, " if documents > sum(others) else ""
            raise UserError(
                f"--split {split}{'' if args.split else ' (the default)'} gives {name} none of the "
                f"{documents} documents of {prefix}, and Megatron would look for some for ever. Give each "
                f"part one document at least: {advice}--split 1,0,0 for training (with --eval-iters 0), or "
                "files of their own by --train-data-path and --valid-data-path"
            )


def _documents(prefix: str) -> int:
    """What Megatron splits: the sequences of an index, one per document where prepare-data wrote it."""
    with Path(f"{prefix}.idx").open("rb") as file:
        return int(HEADER.unpack(file.read(HEADER.size))[3])


# --- the ids --------------------------------------------------------------------------------------


def check_ids(dtypes: Mapping[str, np.dtype[Any]], args: Namespace) -> None:
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
    tokens = np.memmap(data, dtype, "r", shape=(total,))  # [total]
    pieces = [(0, total)]
    if total > _PIECES * _PIECE_TOKENS:
        # Evenly from the first tokens to the last.
        starts = np.linspace(0, total - _PIECE_TOKENS, _PIECES).astype(int).tolist()
        pieces = [(start, start + _PIECE_TOKENS) for start in starts]
    places = [start + int(tokens[start:end].argmax()) for start, end in pieces]
    place = max(places, key=lambda each: tokens[each])
    return int(tokens[place]), place, sum(end - start for start, end in pieces), total
