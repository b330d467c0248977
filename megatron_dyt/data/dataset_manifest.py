"""What the manifest beside an indexed dataset says, and whether it fits a training run.

`megatron-dyt prepare-data` writes PREFIX.manifest.json beside PREFIX.bin and PREFIX.idx. A dataset without
one, of another tool, is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_dyt.errors import UserError

# Of the manifests that this version writes and reads.
FORMAT = 3

SENTENCEPIECE = "SentencePieceTokenizer"
HUGGING_FACE = "HuggingFaceTokenizer"
# Megatron's names for --tokenizer-type, and which of ours they are.
TOKENIZER_KINDS = {
    SENTENCEPIECE: SENTENCEPIECE,
    "GPTSentencePieceTokenizer": SENTENCEPIECE,
    "Llama2Tokenizer": SENTENCEPIECE,
    HUGGING_FACE: HUGGING_FACE,
}


def manifest_path(prefix: Path) -> Path:
    """Where the manifest of the dataset at `prefix` is."""
    return prefix.with_name(prefix.name + ".manifest.json")


def check(prefixes: Iterable[str], args: Namespace) -> None:
    """The datasets are as their manifests say, and made with the tokenizer of Megatron's parsed `args`.

    Raises:
        UserError: files have other sizes, tokenizer, BOS or EOS are others, or the vocabulary is too small.
    """
    manifests = {prefix: _read(prefix) for prefix in prefixes}
    kind = TOKENIZER_KINDS.get(args.tokenizer_type or "")
    ours = tokenizer_sha256(kind, args.tokenizer_model) if kind and args.tokenizer_model else None
    for prefix, manifest in manifests.items():
        if manifest is None:
            continue
        _check_sizes(prefix, manifest["outputs"])
        theirs = manifest["made_from"]["tokenizer"]
        if ours is not None and ours != theirs["sha256"]:
            raise UserError(
                f"dataset {prefix} was made with the {theirs['type']} {manifest['tokenizer']} (SHA-256 "
                f"{theirs['sha256'][:12]}...), but --tokenizer-model {args.tokenizer_model} is another "
                f"one ({ours[:12]}...), in which its ids mean other text. Give the tokenizer that the data "
                "were made with, or prepare them with this one"
            )
        if ours is not None and kind == HUGGING_FACE:
            _check_ends(prefix, manifest["made_from"], args)
        _check_vocabulary(prefix, manifest["vocab_size"], args)


def _read(prefix: str) -> dict[str, Any] | None:
    """The manifest beside a dataset; None where there is none."""
    path = manifest_path(Path(prefix))
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        if manifest["format"] == FORMAT:
            return manifest
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"dataset {prefix}: {path} is damaged, or of another version of prepare-data. Prepare the data "
        "again, or remove the manifest to train on them unchecked"
    )


def _check_sizes(prefix: str, outputs: dict[str, Any]) -> None:
    for name, expected in outputs.items():
        # By suffix: a dataset may have been renamed.
        path = prefix + os.path.splitext(name)[1]
        present = os.path.getsize(path)
        if present != expected["bytes"]:
            raise UserError(
                f"dataset {prefix}: {path} has {present} bytes, but its manifest says {expected['bytes']}. "
                "It is truncated or belongs to another dataset: copy it again or prepare it again"
            )


def _check_ends(prefix: str, made_from: dict[str, Any], args: Namespace) -> None:
    """BOS and EOS in the data are those of the Hugging Face tokenizer, which its hash does not cover."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            args.tokenizer_model,
            local_files_only=True,
            use_fast=not getattr(args, "tokenizer_hf_no_use_fast", False),
            trust_remote_code=getattr(args, "trust_remote_code", False),
        )
    except (OSError, ValueError):
        return  # Not all of it is on this machine yet, or Megatron will say what is wrong with it.
    for name, written, id_ in (
        ("bos", made_from["bos"], tokenizer.bos_token_id),
        ("eos", made_from["append_eod"], tokenizer.eos_token_id),
    ):
        if written and made_from["tokenizer"][name] != id_:
            raise UserError(
                f"dataset {prefix} has {name.upper()} {made_from['tokenizer'][name]}, but that of "
                f"--tokenizer-model {args.tokenizer_model} is {id_}. Give the tokenizer_config.json that the "
                "data were made with, or prepare them with this one"
            )


def _check_vocabulary(prefix: str, needed: int, args: Namespace) -> None:
    sizes = {"padded_vocab_size": getattr(args, "padded_vocab_size", None)}
    if args.tokenizer_type == "NullTokenizer":
        sizes["vocab_size"] = args.vocab_size
    for name, given in sizes.items():
        if given is not None and given < needed:
            raise UserError(
                f"dataset {prefix} has a vocabulary of {needed} tokens, but --{name.replace('_', '-')} "
                f"{given} makes the model's smaller; give at least {needed}"
            )


def tokenizer_sha256(kind: str, name: str) -> str | None:
    """The hash by which a tokenizer is known; None when its file is not on this machine."""
    path = tokenizer_file(kind, name)
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_file(kind: str, name: str) -> Path | None:
    """The file that makes a tokenizer: the SentencePiece model, or tokenizer.json.

    A name on the Hugging Face Hub is looked up in the local cache alone.
    """
    path = Path(name)
    if kind == SENTENCEPIECE:
        return path
    if path.is_dir():
        return path / "tokenizer.json"
    if path.name == "tokenizer.json":
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None
