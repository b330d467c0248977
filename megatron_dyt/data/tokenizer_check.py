"""Whether a tokenizer is the one that a checkpoint was trained with, as far as files tell."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_dyt.atomic import read_json
from megatron_dyt.data.dataset_manifest import TOKENIZER_KINDS, manifest_path, tokenizer_sha256
from megatron_dyt.errors import UserError

# Megatron's flags that name data sets, with weights among them.
_DATA = ("data_path", "train_data_path", "valid_data_path")
# Kinds whose tokenizer is one file.
_BY_FILE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")


def check_tokenizer(flags: dict[str, Any]) -> None:
    """`UserError` when the tokenizer is a file or directory that is not there."""
    path, kind = flags.get("tokenizer_model"), flags.get("tokenizer_type")
    if kind in _BY_FILE:
        is_there = path is not None and Path(path).is_file()
    elif kind == "HuggingFaceTokenizer" and not str(path).startswith(("/", ".", "~")):
        is_there = True  # It may be a name on the Hub, where Megatron looks.
    else:
        is_there = not path or Path(path).exists()
    if not is_there:
        raise UserError(
            f"the tokenizer {path} (a {kind}) is not there. Give its place on this machine with "
            f"--tokenizer-model"
        )


def check_vocabulary(size: int, saved: Namespace, path: str | None, directory: Path) -> None:
    """`UserError` unless `size` tokens fill the model's vocabulary but for Megatron's padding."""
    rows = saved.padded_vocab_size
    multiple = getattr(saved, "make_vocab_size_divisible_by", None) or 1
    multiple *= getattr(saved, "tensor_model_parallel_size", None) or 1
    if size > rows:
        raise UserError(
            f"the tokenizer {path} has {size} tokens, but the model in {directory} knows at most {rows}. "
            f"Give the tokenizer of its training data with --tokenizer-model"
        )
    if rows - size >= multiple and path != saved.tokenizer_model:
        raise UserError(
            f"the tokenizer {path} has {size} tokens, too few for the {rows} of the model in {directory} "
            f"(Megatron pads to a multiple of {multiple}). Give the tokenizer of its training data with "
            f"--tokenizer-model"
        )


def check_against_data(saved: Namespace, path: str | None) -> None:
    """`UserError` when a data set of the training run is here and was made with another tokenizer.

    Data sets from `megatron-dyt prepare-data` have their tokenizer's SHA-256 in the manifest.
    """
    own = tokenizer_hash(saved, path)
    if own is None:
        return
    for prefix in _data_prefixes(saved):
        manifest = manifest_path(Path(prefix))
        trained = _stated(read_json(manifest), "made_from", "tokenizer", "sha256")
        if isinstance(trained, str) and trained != own:
            raise UserError(
                f"the tokenizer {path} (SHA-256 {own[:12]}…) is not the one that the training data was "
                f"made with ({trained[:12]}…, says {manifest}). Give that one with --tokenizer-model"
            )


def tokenizer_hash(saved: Namespace, path: str | None) -> str | None:
    """SHA-256 of the file of the tokenizer `path`, of the kind in `saved`; None where it has no file here."""
    kind = TOKENIZER_KINDS.get(getattr(saved, "tokenizer_type", None) or "")
    return tokenizer_sha256(kind, path) if kind and path else None


def documents_begin_with_bos(saved: Namespace) -> bool | None:
    """Whether the training data have BOS, by the manifests that are in reach; None where none says."""
    manifests = [read_json(manifest_path(Path(prefix))) for prefix in _data_prefixes(saved)]
    stated = [_stated(manifest, "made_from", "bos") for manifest in manifests]
    known = [value for value in stated if isinstance(value, bool)]
    return any(known) if known else None


def _data_prefixes(saved: Namespace) -> list[str]:
    words = [word for name in _DATA for word in getattr(saved, name, None) or []]
    return [str(word) for word in words]


def _stated(manifest: Any, *names: str) -> Any:
    """What is under `names` in a data set's manifest; None where there is none, or another tool's."""
    for name in names:
        manifest = manifest.get(name) if isinstance(manifest, dict) else None
    return manifest
