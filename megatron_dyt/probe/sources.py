"""The model and the tokens of `megatron-dyt probe`: of a Megatron checkpoint or a Hugging Face model."""

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from megatron_dyt.atomic import read_text
from megatron_dyt.errors import UserError, describe

# Megatron's flags that name data sets; validation data first, which the model has not seen.
_DATA = ("valid_data_path", "train_data_path", "data_path")


@dataclass(frozen=True)
class Source:
    """A language model and what belongs to it.

    Attributes:
        rows: of its embedding: ids are smaller.
        positions: longest sequence that it takes.
        iteration: of the checkpoint; None for a Hugging Face model.
        saved: arguments of the run, with the tokenizer that is used; None for a Hugging Face model.
        call: ids (sequences, length) -> what the model is called with.
        tokenize: text -> ids, without BOS or EOS.
        load_iteration: gives the model the weights of another iteration; None for a Hugging Face model.
    """

    model: nn.Module
    rows: int
    positions: int
    iteration: int | None
    saved: Namespace | None
    call: Callable[[Tensor], dict[str, Any]]
    tokenize: Callable[[str], list[int]]
    load_iteration: Callable[[int], None] | None


def open_source(
    load: Path, *, ckpt_step: int | None = None, tokenizer_model: str | None = None, device: str | None = None
) -> Source:
    """The model in `load`: a Hugging Face model's directory has a config.json.

    Raises:
        UserError: there is none, it cannot be read, or an option does not fit its kind.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("megatron-dyt probe runs in one process; start it without torchrun")
    if (load / "config.json").is_file():
        if ckpt_step is not None:
            raise UserError(
                f"--ckpt-step {ckpt_step} was given, and --load {load} is a Hugging Face model, which has no "
                "iterations; leave it out"
            )
        return _hugging_face(load, tokenizer_model, device)
    return _megatron(load, ckpt_step, tokenizer_model, device)


def _megatron(load: Path, ckpt_step: int | None, tokenizer_model: str | None, device: str | None) -> Source:
    from megatron_dyt.checkpoints.saved_args import saved_args
    from megatron_dyt.cpu import device as choice
    from megatron_dyt.evaluation import checkpoint_model

    choice.activate(["--device", device] if device else [])
    loaded = checkpoint_model.load_model(
        str(load), ckpt_step=ckpt_step, tokenizer_model=tokenizer_model, local=True
    )

    saved = saved_args(loaded.checkpoint)
    saved.tokenizer_model = loaded.args.tokenizer_model

    def call(ids: Tensor) -> dict[str, Any]:
        return {
            "input_ids": ids,
            "position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids),
            "attention_mask": None,  # Causal attention needs none.
        }

    return Source(
        loaded.model,
        rows=loaded.args.padded_vocab_size,
        positions=loaded.args.max_position_embeddings,
        iteration=loaded.checkpoint.iteration,
        saved=saved,
        call=call,
        tokenize=loaded.tokenizer.tokenize,
        load_iteration=lambda step: checkpoint_model.load_iteration(loaded, step),
    )


def _hugging_face(load: Path, tokenizer_model: str | None, device: str | None) -> Source:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_dyt.hf import register_auto_classes

    register_auto_classes()
    has_cuda = torch.cuda.is_available()
    if device not in (None, "auto", "cpu", "cuda") or (device == "cuda" and not has_cuda):
        raise UserError(f"--device {device}: allowed are auto, cpu, and cuda where there is a CUDA device")
    try:
        model = AutoModelForCausalLM.from_pretrained(str(load), dtype="auto")
    except Exception as error:
        raise UserError(
            f"--load {load} cannot be loaded as a causal language model ({describe(error)}). Copy it again, "
            "or use megatron_dyt.probe.measure in Python for another kind of model"
        ) from error
    model.to("cuda" if has_cuda and device != "cpu" else "cpu")

    def tokenize(text: str) -> list[int]:
        where = tokenizer_model or str(load)
        try:
            tokenizer = AutoTokenizer.from_pretrained(where)
        except Exception as error:
            raise UserError(
                f"no tokenizer can be loaded from {where} ({describe(error)}); give its directory with "
                "--tokenizer-model, or a data set with --data-path"
            ) from error
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return Source(
        model,
        rows=model.get_input_embeddings().weight.shape[0],
        positions=getattr(model.config, "max_position_embeddings", None) or 2**20,
        iteration=None,
        saved=None,
        call=lambda ids: {"input_ids": ids, "use_cache": False},
        tokenize=tokenize,
        load_iteration=None,
    )


# --- tokens -----------------------------------------------------------------------------------------


def tokens(
    source: Source, data_path: str | None, text: Path | None, sequences: int, length: int | None
) -> Tensor:
    """int64 (sequences, length + 1) on the model's device; each token is the target of the one before it.

    Args:
        data_path: prefix of an indexed data set; None takes `text`, or else the run's own.
        length: None takes the model's, up to 1,024.

    Raises:
        UserError: there are no data, too few, or those of another vocabulary.
    """
    length = min(source.positions, 1024) if length is None else length
    if length > source.positions:
        raise UserError(f"--length {length} was given; the model has {source.positions} positions")
    if text is not None:
        ids, where = _of_text(source, text, sequences * (length + 1)), f"--text {text}"
    else:
        prefix = data_path or _own_data(source.saved)
        ids, where = _of_dataset(source, prefix, sequences, length + 1), f"the data set {prefix}"
    if ids.max() >= source.rows:
        raise UserError(
            f"{where} holds the id {ids.max()}, and the model's vocabulary has {source.rows} entries: the "
            "data are of another tokenizer. Give data of the model's own with --data-path, or a --text"
        )
    device = next(source.model.parameters()).device
    return torch.from_numpy(ids.astype(np.int64).reshape(sequences, length + 1)).to(device)


def _of_text(source: Source, path: Path, needed: int) -> npt.NDArray[Any]:
    ids = source.tokenize(read_text(path))
    if len(ids) < needed:
        raise UserError(
            f"--text {path} has {len(ids)} tokens, and {needed} are needed; give more text, or fewer "
            "--sequences or a smaller --length"
        )
    return np.array(ids[:needed])


def _own_data(saved: Namespace | None) -> str:
    """The prefix of a data set that the run names and that is here."""
    named = [str(word) for flag in _DATA for word in getattr(saved, flag, None) or []]
    prefix = next((word for word in named if Path(word + ".idx").is_file()), None)
    if prefix is None:
        those = [word for word in named if "/" in word or not word.replace(".", "").isdigit()]
        what = f"the run's data ({', '.join(those)}) are not here" if those else "no batch was given"
        where = "start where training was started, or " if those else ""
        raise UserError(f"{what}; {where}give a data set's prefix with --data-path, or --text FILE")
    return prefix


def _of_dataset(source: Source, prefix: str, sequences: int, length: int) -> npt.NDArray[Any]:
    """`sequences` times `length` tokens, from places evenly over the data set, document after document."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron_dyt.data.tokenizer_check import check_data

    missing = [prefix + suffix for suffix in (".idx", ".bin") if not Path(prefix + suffix).is_file()]
    if missing:
        raise UserError(
            f"--data-path {prefix}: there is no {missing[0]}. Give the prefix of an indexed data set, as "
            "megatron-dyt prepare-data writes it, without .bin or .idx"
        )
    if source.saved is not None:
        check_data([prefix], source.saved)
    try:
        dataset = IndexedDataset(prefix)
    except Exception as error:
        raise UserError(
            f"--data-path {prefix} cannot be read ({describe(error)}). Prepare it again"
        ) from error
    ends = np.cumsum(dataset.sequence_lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    if total < sequences * length:
        raise UserError(
            f"the data set {prefix} has {total} tokens, and {sequences * length} are needed; give fewer "
            "--sequences, or a smaller --length"
        )
    rows = [_from(dataset, ends, row * total // sequences, length) for row in range(sequences)]
    return np.concatenate(rows)


def _from(
    dataset: Sequence[npt.NDArray[Any]], ends: npt.NDArray[np.int64], start: int, length: int
) -> npt.NDArray[Any]:
    """The tokens `start` to `start + length` of a data set whose documents have these `ends`."""
    first, last = np.searchsorted(ends, [start, start + length - 1], side="right")
    documents = [dataset[index] for index in range(first, last + 1)]
    skipped = start - int(ends[first - 1] if first else 0)
    return np.concatenate(documents)[skipped : skipped + length]
