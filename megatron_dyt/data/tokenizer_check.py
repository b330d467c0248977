"""Whether tokenizer, prepared data and checkpoint belong together, as far as files tell.

`check_data` is for a training run; the others ask about the tokenizer that a checkpoint is used with. A
dataset without a manifest, of another tool, is taken as it is.
"""

import contextlib
import os
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_dyt.data.dataset_manifest import (
    HUGGING_FACE,
    SENTENCEPIECE,
    DatasetManifest,
    MadeFrom,
    manifest_path,
)
from megatron_dyt.data.tokenizers import TOKENIZER_KINDS, tokenizer_sha256
from megatron_dyt.errors import UserError

# Megatron's flags that name data sets, with weights among them.
_DATA = ("data_path", "train_data_path", "valid_data_path")


def check_data(prefixes: Iterable[str], args: Namespace) -> None:
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
        _check_sizes(prefix, manifest)
        theirs = manifest.made_from.tokenizer
        if ours is not None and ours != theirs.sha256:
            raise UserError(
                f"dataset {prefix} was made with the {theirs.type} {manifest.tokenizer} (SHA-256 "
                f"{theirs.sha256[:12]}...), but --tokenizer-model {args.tokenizer_model} is another "
                f"one ({ours[:12]}...), in which its ids mean other text. Give the tokenizer that the data "
                "were made with, or prepare them with this one"
            )
        if ours is not None and kind == HUGGING_FACE:
            _check_ends(prefix, manifest.made_from, args)
        _check_size_of_vocabulary(prefix, manifest.vocab_size, args)


def _read(prefix: str) -> DatasetManifest | None:
    """The manifest beside a dataset; None where there is none."""
    path = manifest_path(Path(prefix))
    if not path.is_file():
        return None
    if manifest := DatasetManifest.read(Path(prefix)):
        return manifest
    raise UserError(
        f"dataset {prefix}: {path} is damaged, or of another version of prepare-data. Prepare the data "
        "again, or remove the manifest to train on them unchecked"
    )


def _check_sizes(prefix: str, manifest: DatasetManifest) -> None:
    for name, expected in manifest.outputs.items():
        # By suffix: a dataset may have been renamed.
        path = prefix + os.path.splitext(name)[1]
        present = os.path.getsize(path)
        if present != expected.bytes:
            raise UserError(
                f"dataset {prefix}: {path} has {present} bytes, but its manifest says {expected.bytes}. "
                "It is truncated or belongs to another dataset: copy it again or prepare it again"
            )


def _check_ends(prefix: str, made_from: MadeFrom, args: Namespace) -> None:
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
    for name, written, theirs, ours in (
        ("BOS", made_from.bos, made_from.tokenizer.bos, tokenizer.bos_token_id),
        ("EOS", made_from.append_eod, made_from.tokenizer.eos, tokenizer.eos_token_id),
    ):
        if written and theirs != ours:
            raise UserError(
                f"dataset {prefix} has {name} {theirs}, but that of --tokenizer-model "
                f"{args.tokenizer_model} is {ours}. Give the tokenizer_config.json that the data were made "
                "with, or prepare them with this one"
            )


def _check_size_of_vocabulary(prefix: str, needed: int, args: Namespace) -> None:
    sizes = {"padded_vocab_size": getattr(args, "padded_vocab_size", None)}
    if args.tokenizer_type == "NullTokenizer":
        sizes["vocab_size"] = args.vocab_size
    for name, given in sizes.items():
        if given is not None and given < needed:
            raise UserError(
                f"dataset {prefix} has a vocabulary of {needed} tokens, but --{name.replace('_', '-')} "
                f"{given} makes the model's smaller; give at least {needed}"
            )


# --- the tokenizer of a checkpoint ------------------------------------------------------------------------


def check_tokenizer(flags: dict[str, Any]) -> None:
    """`UserError` when the tokenizer is a file or directory that is not there."""
    path, kind = flags.get("tokenizer_model"), flags.get("tokenizer_type")
    if TOKENIZER_KINDS.get(kind or "") == SENTENCEPIECE:  # One file.
        is_there = path is not None and Path(path).is_file()
    elif kind == HUGGING_FACE and not str(path).startswith(("/", ".", "~")):
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
        moved = "; if this is it, put it at the path that the run had" if saved.tokenizer_model else ""
        raise UserError(
            f"the tokenizer {path} has {size} tokens, too few for the {rows} of the model in {directory} "
            f"(Megatron pads to a multiple of {multiple}). Give the tokenizer of its training data with "
            f"--tokenizer-model{moved}"
        )


def check_against_data(saved: Namespace, path: str | None) -> None:
    """`UserError` when a data set of the training run is here and was made with another tokenizer.

    Data sets from `megatron-dyt prepare-data` have their tokenizer's SHA-256 in the manifest.
    """
    own = tokenizer_hash(saved, path)
    if own is None:
        return
    for prefix, manifest in _manifests(saved).items():
        trained = manifest.made_from.tokenizer.sha256
        if trained != own:
            raise UserError(
                f"the tokenizer {path} (SHA-256 {own[:12]}…) is not the one that the training data was "
                f"made with ({trained[:12]}…, says {manifest_path(prefix)}). Give that one with "
                "--tokenizer-model"
            )


def tokenizer_hash(saved: Namespace, path: str | None) -> str | None:
    """SHA-256 of the file of the tokenizer `path`, of the kind in `saved`; None where it has no file here."""
    kind = TOKENIZER_KINDS.get(getattr(saved, "tokenizer_type", None) or "")
    return tokenizer_sha256(kind, path) if kind and path else None


def documents_begin_with_bos(saved: Namespace) -> bool | None:
    """Whether the training data have BOS, by the manifests that are in reach; None where none says."""
    known = [manifest.made_from.bos for manifest in _manifests(saved).values()]
    return any(known) if known else None


def _manifests(saved: Namespace) -> dict[Path, DatasetManifest]:
    """The manifests of the training data by prefix, where they are in reach."""
    found = {}
    for word in [Path(str(word)) for name in _DATA for word in getattr(saved, name, None) or []]:
        # Of another user, on another machine: a directory that may not be read, or is not there any more.
        with contextlib.suppress(OSError):
            if (manifest := DatasetManifest.read(word)) is not None:
                found[word] = manifest
    return found
