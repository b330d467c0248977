"""A Megatron model and tokenizer from a checkpoint alone.

Every flag that describes the model comes from the arguments stored in the checkpoint; every flag
that describes the run (parallelism, fusions, recomputation, device) from the machine at hand.
"""

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
from typing import Any, Protocol

import torch

import megatron_dyt
from megatron_dyt import compat
from megatron_dyt.checkpoints import iterations
from megatron_dyt.checkpoints.crc import weights_hash
from megatron_dyt.checkpoints.metadata import READ_ERRORS, damaged
from megatron_dyt.checkpoints.saved_args import Checkpoint, find_checkpoint, saved_args
from megatron_dyt.data.tokenizer_check import (
    check_against_data,
    check_tokenizer,
    check_vocabulary,
    documents_begin_with_bos,
    tokenizer_hash,
)
from megatron_dyt.errors import UserError
from megatron_dyt.evaluation import layout
from megatron_dyt.evaluation.ranks import from_first
from megatron_dyt.training import dataset_helpers, launch, megatron_loop

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


class TextTokenizer(Protocol):
    """What is used of Megatron's tokenizers."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eod(self) -> int: ...
    def tokenize(self, text: str) -> list[int]: ...
    def detokenize(self, ids: list[int]) -> str: ...


def prefix_token(tokenizer: TextTokenizer, bos: bool = True) -> int:
    """What contexts begin with: the tokenizer's BOS; its end-of-document token without one or `bos`."""
    try:
        begin = tokenizer.bos if bos else None
    except (AttributeError, NotImplementedError):
        begin = None
    return tokenizer.eod if begin is None or begin < 0 else begin


@dataclass(frozen=True)
class LoadedModel:
    """The model in eval mode on its device, its tokenizer, and where they come from.

    `prefix_token` is what documents began with in training, as far as that is known.
    """

    model: torch.nn.Module
    tokenizer: TextTokenizer
    args: Namespace
    checkpoint: Checkpoint
    prefix_token: int

    def __str__(self) -> str:
        layout = f"{self.args.tensor_model_parallel_size} x {self.args.data_parallel_size} processes"
        begin = "an end of document" if self.prefix_token == self.tokenizer.eod else "BOS"
        return (
            f"{self.checkpoint.directory}: {self.args.normalization} model, {layout} (tensor x data "
            f"parallel), sequences of {self.args.seq_length}, tokenizer {self.args.tokenizer_model}, "
            f"contexts begin with {begin}"
        )

    def identity(self) -> dict[str, object]:
        """All that the result of a request, which is tokens, depends on besides it, for results on disk."""
        path = self.args.tokenizer_model
        return {
            "weights": weights_hash(self.checkpoint.directory),
            "tokenizer": tokenizer_hash(self.args, path) or path,
            # Not in the hash of a tokenizer.json, and some kinds have no hash.
            "vocabulary": [self.tokenizer.vocab_size, self.tokenizer.eod],
            "tokenizer_type": getattr(self.args, "tokenizer_type", None),
            "precision": [bool(getattr(self.args, name, False)) for name in ("bf16", "fp16")],
            "megatron_dyt": megatron_dyt.__version__,
        }


def load_model(
    load: str,
    *,
    ckpt_step: int | None = None,
    tokenizer_model: str | None = None,
    tensor_parallel: int | None = None,
    bos: bool | None = None,
    local: bool = False,
) -> LoadedModel:
    """The model of a checkpoint, with its tokenizer.

    Sets up Megatron in this process (which torchrun may have started): choose the device first, with
    `cpu.device.activate`.

    Args:
        load: directory of the checkpoint, what training had as --save.
        ckpt_step: iteration; None takes the latest.
        tokenizer_model: replaces the tokenizer's path that is stored in the checkpoint.
        tensor_parallel: see `layout.choose`.
        bos: whether contexts begin with BOS, or else with an end of document; None asks the manifests of
            the training data, and takes BOS where they are not in reach.
        local: build it of Megatron's own layers, where each norm is a module, also where Transformer Engine
            is, which computes norms in its linear layers.

    Raises:
        UserError: a checkpoint that is missing, damaged or not of the model it states, another tokenizer
            than its own, or a layout that does not fit.
    """
    checkpoint = find_checkpoint(load, ckpt_step)
    if iterations.iteration_to_load(load, checkpoint.iteration) == iterations.RELEASE:
        raise UserError(
            f"{checkpoint.root / iterations.TRACKER} names a release, which Megatron loads whatever "
            f"--ckpt-step says. Write {checkpoint.iteration} into it to evaluate that iteration"
        )
    launch.prepare_process()
    megatron_dyt.register()
    compat.check_training_version()
    dataset_helpers.prepare()
    with _quiet_megatron():
        saved = saved_args(checkpoint)
        tp = layout.choose(saved, checkpoint.directory, tensor_parallel)
        flags = model_flags(saved) | _run_flags(checkpoint, tokenizer_model, tp)
        flags |= {"transformer_impl": "local"} if local else {}
        check_tokenizer(flags)
        check_against_data(saved, flags.get("tokenizer_model"))
        args, tokenizer = _start_megatron(flags)
        check_vocabulary(tokenizer.vocab_size, saved, args.tokenizer_model, checkpoint.directory)
        model = build(args)
        _load_weights(model, checkpoint)
    if bos is None:
        # The data's manifests may lie on one node alone.
        bos = from_first(documents_begin_with_bos(saved))
    return LoadedModel(model.eval(), tokenizer, args, checkpoint, prefix_token(tokenizer, bos is not False))


def load_iteration(loaded: LoadedModel, step: int) -> None:
    """Give the model of `loaded` the weights of another iteration of the same run.

    Raises:
        UserError: it is not there, or damaged.
    """
    checkpoint = find_checkpoint(str(loaded.checkpoint.root), step)
    loaded.args.ckpt_step = step
    with _quiet_megatron():
        _load_weights(loaded.model, checkpoint)
    loaded.model.eval()


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
        sys.stdout.write(report.getvalue())
        raise


# --- flags ----------------------------------------------------------------------------------------


def model_flags(saved: Namespace) -> dict[str, Any]:
    """Those of the stored arguments that say what the model and its tokenizer are."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megatron_dyt.config import MODEL_ARGS

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
        # Megatron's default needs an extension of apex when the model is built, and is for gradients.
        "gradient_accumulation_fusion": False,
    }
    return flags | ({"tokenizer_model": tokenizer_model} if tokenizer_model else {})


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
        args = megatron_loop.start(with_flags)
    finally:
        sys.argv = own
    return args, get_tokenizer()


def build(args: Namespace) -> torch.nn.Module:
    """The GPT model of Megatron's `args`, with fresh weights; `UserError` for another kind of model."""
    if args.hybrid_layer_pattern is not None:
        raise UserError(
            f"the checkpoint holds a hybrid model (--hybrid-layer-pattern "
            f"{args.hybrid_layer_pattern}); only GPT models can be evaluated"
        )
    return megatron_loop.build_whole_gpt(args)


def _load_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    from megatron.training import checkpointing

    try:
        checkpointing.load_checkpoint([model], None, None)
    except UserError:
        raise
    except READ_ERRORS as error:
        raise damaged(checkpoint.directory, error) from error
