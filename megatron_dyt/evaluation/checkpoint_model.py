"""A Megatron model and tokenizer from a checkpoint alone.

Every flag that describes the model comes from the arguments stored in the checkpoint; every flag
that describes the run (parallelism, fusions, recomputation, device) from the machine at hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import re
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dyt.errors import UserError, describe
from megatron_dyt.evaluation import layout
from megatron_dyt.evaluation.tokenizer_check import check_against_data, check_vocabulary
from megatron_dyt.mcore import compat
from megatron_dyt.runtime import dataset_helpers, launch, training_api

if TYPE_CHECKING:
    from megatron_dyt.evaluation.lm import TextTokenizer

TRACKER = "latest_checkpointed_iteration.txt"

# Flags of the model that are no fields of Megatron's TransformerConfig (megatron/training/
# argument_utils.py reads them); its fields and those of TokenizerConfig are taken as they are.
_MODEL_FLAGS = {
    *("bf16", "fp16", "num_experts", "group_query_attention", "norm_epsilon", "apply_layernorm_1p"),
    *("swiglu", "squared_relu", "quick_geglu", "openai_gelu"),
    *("seq_length", "max_position_embeddings", "position_embedding_type", "add_position_embedding"),
    *("use_rotary_position_embeddings", "rope_type", "rotary_base", "rotary_percent"),
    *("rotary_seq_len_interpolation_factor", "use_rope_scaling", "rope_scaling_factor"),
    *("yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow"),
    *("yarn_correction_range_round_to_int", "untie_embeddings_and_output_weights"),
    *("make_vocab_size_divisible_by", "spec", "hybrid_layer_pattern"),
    *("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
}
# The tokenizer's flags where Megatron has no TokenizerConfig.
_TOKENIZER_FLAGS = {
    *("vocab_size", "padded_vocab_size", "vocab_file", "merge_file", "vocab_extra_ids"),
    *("tokenizer_type", "tokenizer_model", "tokenizer_metadata", "tokenizer_special_tokens"),
    *("tiktoken_pattern", "tiktoken_num_special_tokens", "tiktoken_special_tokens"),
    *("tokenizer_sentencepiece_legacy", "tokenizer_hf_no_use_fast", "trust_remote_code"),
}
# Fields of TransformerConfig that say how a run computes, not what the model is.
_RUN_FLAGS = re.compile(
    "fusion|overlap|offload|recompute|cuda_graph|pipeline|inference|deepep|hybridep|paged_stash"
    "|distribute_saved|^fp[48]|^cp_comm|^attention_backend$|^init_model_with_meta_device$"
    "|^config_logger_dir$|^flash_decode$|^symmetric_ar_type$|^batch_invariant_mode$"
)
# What reading a damaged file may raise is anything; torch's own is no Exception.
_READ_ERRORS = (Exception, CheckpointException)


@dataclass(frozen=True)
class Checkpoint:
    """One iteration of a Megatron torch_dist checkpoint: `root` is what --save was given."""

    root: Path
    iteration: int
    directory: Path


@dataclass(frozen=True)
class LoadedModel:
    """The model in eval mode on its device, its tokenizer, and where they come from."""

    model: torch.nn.Module
    tokenizer: TextTokenizer
    args: Namespace
    checkpoint: Checkpoint

    def __str__(self) -> str:
        layout = f"{self.args.tensor_model_parallel_size} x {self.args.data_parallel_size} processes"
        return (
            f"{self.checkpoint.directory}: {self.args.normalization} model, {layout} (tensor x data "
            f"parallel), sequences of {self.args.seq_length}, tokenizer {self.args.tokenizer_model}"
        )


def load_model(
    load: str,
    *,
    ckpt_step: int | None = None,
    tokenizer_model: str | None = None,
    tensor_parallel: int | None = None,
    pipeline_parallel: int = 1,
) -> LoadedModel:
    """The model of checkpoint directory `load`, at `ckpt_step` or the latest iteration.

    `tokenizer_model` replaces the tokenizer's path stored in the checkpoint; the parallel sizes are those
    of `layout.choose`. Sets up Megatron in this process (which torchrun may have started): choose the
    device first, with `runtime.device`. Raises `UserError` for a checkpoint that is missing, damaged or
    not of the model it states, for another tokenizer than its own, and for a layout that does not fit.
    """
    import megatron_dyt

    checkpoint = find_checkpoint(load, ckpt_step)
    launch.prepare_process()
    megatron_dyt.register()
    compat.check_training_version()
    dataset_helpers.prepare()
    with _quiet_megatron():
        saved = saved_args(checkpoint)
        tp = layout.choose(saved, checkpoint.directory, tensor_parallel, pipeline_parallel)
        flags = model_flags(saved) | _run_flags(checkpoint, tokenizer_model, tp)
        check_tokenizer(flags)
        check_against_data(saved, flags.get("tokenizer_model"))
        args, tokenizer = _start_megatron(flags)
        check_vocabulary(tokenizer.vocab_size, saved, args.tokenizer_model, checkpoint.directory)
        model = build(args)
        _load_weights(model, checkpoint)
    return LoadedModel(model.eval(), tokenizer, args, checkpoint)


@contextlib.contextmanager
def _quiet_megatron() -> Iterator[None]:
    """Keep Megatron's start-up report (a thousand lines of flags) back, unless something fails."""
    report = io.StringIO()
    try:
        with contextlib.redirect_stdout(report), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
            yield
    except UserError:
        raise
    except BaseException:
        print(report.getvalue())
        raise


# --- the checkpoint -------------------------------------------------------------------------------


def find_checkpoint(load: str, step: int | None = None) -> Checkpoint:
    """The iteration `step` (default: the latest) of `load`; `UserError` when there is none."""
    root = Path(load)
    if not root.is_dir():
        raise UserError(
            f"--load {load}: no such directory. Give the directory that training saved to (--save)"
        )
    directories = _iterations(root)
    if step is None:
        step = _latest(root, directories)
    if step not in directories:
        raise UserError(
            f"--load {load}: iteration {step} is not there; found: {_listed(directories)}. "
            f"Choose one of them with --ckpt-step"
        )
    return Checkpoint(root, step, directories[step])


def _iterations(root: Path) -> dict[int, Path]:
    found = {
        int(path.name.removeprefix("iter_")): path
        for path in root.glob("iter_*")
        if path.name.removeprefix("iter_").isdigit()
    }
    return dict(sorted(found.items()))


def _latest(root: Path, directories: dict[int, Path]) -> int:
    tracker = root / TRACKER
    if not tracker.is_file():
        hint = "Give the directory that training saved to (--save)"
        if re.fullmatch(r"iter_\d+", root.name):
            hint = f"Give --load {root.parent} --ckpt-step {int(root.name[5:])}"
        elif directories:
            hint = f"Choose one of its iterations with --ckpt-step: {_listed(directories)}"
        raise UserError(f"--load {root}: no checkpoint there: {TRACKER} is missing. {hint}")
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise UserError(
            f"{tracker} says {text!r}, not an iteration number. Choose an iteration with "
            f"--ckpt-step; found: {_listed(directories)}"
        )
    return int(text)


def _listed(directories: dict[int, Path]) -> str:
    return ", ".join(map(str, directories)) or "none"


def saved_args(checkpoint: Checkpoint) -> Namespace:
    """The Megatron arguments that the training run stored in the checkpoint."""
    from megatron.core import dist_checkpointing

    where = checkpoint.directory
    if not dist_checkpointing.check_is_distributed_checkpoint(str(where)):
        raise UserError(
            f"{where} is not a torch_dist checkpoint (Megatron's --ckpt-format torch_dist, with a "
            f"metadata.json): it is incomplete or of another format. Choose another iteration with "
            f"--ckpt-step, or save with --ckpt-format torch_dist"
        )
    try:
        common = dist_checkpointing.load_common_state_dict(str(where))
    except _READ_ERRORS as error:
        raise _damaged(checkpoint, error) from error
    if common.get("args") is None:
        raise UserError(
            f"{where} holds no arguments of the run that saved it, so its model is unknown. Save "
            f"it with Megatron's training loop, which stores them"
        )
    return common["args"]


def _damaged(checkpoint: Checkpoint, error: BaseException) -> UserError:
    if isinstance(error, CheckpointException):
        # Its own message is a traceback; each rank's failure is an (exception, stack) pair.
        error = next((failure[0] for failure in error.failures.values()), error)
    return UserError(
        f"{checkpoint.directory} cannot be read ({describe(error)}). It is incomplete or damaged: "
        f"choose another iteration with --ckpt-step, or copy it again"
    )


# --- flags ----------------------------------------------------------------------------------------


def model_flags(saved: Namespace) -> dict[str, Any]:
    """Those of the stored arguments that say what the model and its tokenizer are."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megatron_dyt.mcore.args import MODEL_ARGS

    shape = _field_names(MLATransformerConfig) - _field_names(ModelParallelConfig)
    names = {name for name in shape if not _RUN_FLAGS.search(name)}
    names |= _MODEL_FLAGS | _tokenizer_flags() | set(MODEL_ARGS)
    flags = {name: value for name, value in vars(saved).items() if name in names}
    if importlib.util.find_spec("transformer_engine") is None:
        flags["transformer_impl"] = "local"
    return flags


def _tokenizer_flags() -> set[str]:
    if not compat.has("tokenizer_config"):
        return _TOKENIZER_FLAGS
    from megatron.training.config import TokenizerConfig

    return _field_names(TokenizerConfig)


def _field_names(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def _run_flags(checkpoint: Checkpoint, tokenizer_model: str | None, tp: int) -> dict[str, Any]:
    flags: dict[str, Any] = {
        "load": str(checkpoint.root),
        "ckpt_step": checkpoint.iteration,
        "ckpt_format": "torch_dist",
        # The weights alone: neither optimizer nor random state, and no check of training flags.
        "finetune": True,
        "no_load_optim": True,
        "no_load_rng": True,
        "micro_batch_size": 1,
        "tensor_model_parallel_size": tp,
        # Hugging Face's tokenizers put BOS, or EOS, around every text; lm-eval's parts of a text want none.
        "tokenizer_hf_no_include_special_tokens": True,
    }
    return flags | ({"tokenizer_model": tokenizer_model} if tokenizer_model else {})


def check_tokenizer(flags: dict[str, Any]) -> None:
    """`UserError` when the tokenizer is a file or directory that is not there."""
    path, kind = flags.get("tokenizer_model"), flags.get("tokenizer_type")
    by_file = {"SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer"}
    is_missing = kind in by_file and not (path and Path(path).is_file())
    # What may be a name on the Hub is looked up there.
    if kind == "HuggingFaceTokenizer" and path and path.startswith(("/", ".", "~")):
        is_missing = not Path(path).exists()
    if is_missing:
        raise UserError(
            f"the tokenizer {path} (a {kind}) is not there. Give its place on this machine with "
            f"--tokenizer-model"
        )


# --- the model ------------------------------------------------------------------------------------


def _start_megatron(flags: dict[str, Any]) -> tuple[Namespace, TextTokenizer]:
    """Set up Megatron in this process; its arguments (`flags` and its defaults) and tokenizer."""
    from megatron.training import get_tokenizer

    def with_flags(parser: ArgumentParser) -> ArgumentParser:
        parser.set_defaults(**flags)
        return parser

    # Megatron parses sys.argv, which holds this program's own flags.
    own, sys.argv = sys.argv, sys.argv[:1]
    try:
        args = training_api.start(with_flags)
    finally:
        sys.argv = own
    return args, get_tokenizer()


def build(args: Namespace) -> torch.nn.Module:
    if args.hybrid_layer_pattern is not None:
        raise UserError(
            f"the checkpoint holds a hybrid model (--hybrid-layer-pattern "
            f"{args.hybrid_layer_pattern}); only GPT models can be evaluated"
        )
    return training_api.build_whole_gpt(args)


def _load_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    from megatron.training import checkpointing

    try:
        checkpointing.load_checkpoint([model], None, None)
    except UserError:
        raise
    except _READ_ERRORS as error:
        raise _damaged(checkpoint, error) from error
