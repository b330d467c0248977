"""Checkpoints: those that hold another model are refused, and the optimizer's state is saved in its place.

Megatron's loader ignores checkpoint entries that the model lacks, so a DyT checkpoint would load into
an RMSNorm model with its alphas dropped, silently. Here the keys are compared first, on all ranks, with
one verdict.
"""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

from megatron_dyt import world
from megatron_dyt.checkpoints import damage, metadata
from megatron_dyt.checkpoints.iterations import OTHER_CHECKPOINT, TRACKER
from megatron_dyt.errors import UserError, some
from megatron_dyt.parsed_args import parsed_args
from megatron_dyt.patching import wrapper

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from torch.distributed import ProcessGroup

type Directory = str | os.PathLike[str]

# Megatron's `StrictHandling` when --dist-ckpt-strictness is not given.
DEFAULT_STRICTNESS = "assume_ok_unexpected"


@wrapper
def wrap_load[R](
    original: Callable[..., R],
    sharded_state_dict: ShardedStateDict,
    checkpoint_dir: Directory,
    *args: object,
    **kwargs: Any,
) -> R:
    """`dist_checkpointing.load` that first compares the model's keys with the checkpoint's."""
    group = kwargs.get("process_group")
    model_keys = gather(model_tensor_keys(sharded_state_dict), group)
    if model_keys:
        wanted = gather(_stored_keys(sharded_state_dict), group)
        damage.verify(checkpoint_dir, wanted, damage.checks_data(parsed_args()), group)
        strictness = kwargs.get("strict", DEFAULT_STRICTNESS)
        default = getattr(strictness, "value", strictness) == DEFAULT_STRICTNESS
        compare(model_keys, checkpoint_tensor_keys(checkpoint_dir), checkpoint_dir, not default)
        if not default:
            refuse_strictness(str(getattr(strictness, "value", strictness)))
    try:
        state = original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
    except CheckpointException as error:
        raise _unreadable(checkpoint_dir, error) from error
    if model_keys and isinstance(state, dict):
        compare_function(parsed_args(), state.get("args"), checkpoint_dir)
    return state


@wrapper
def wrap_load_checkpoint[R](
    original: Callable[..., R], ddp_model: Sequence[nn.Module], *args: Any, **kwargs: Any
) -> R:
    """`training.load_checkpoint` that refuses other norms' parameters in Megatron's older `torch` format too.

    There Megatron meets every parameter that does not fit by loading again without looking at their names.
    """
    flags = parsed_args()
    directory = getattr(flags, "load", None)
    if directory is None or not (Path(directory) / TRACKER).is_file():
        directory = getattr(flags, "pretrained_checkpoint", None) or directory or "of --load"
    with _other_norms_refused(ddp_model, directory):
        return original(ddp_model, *args, **kwargs)


@contextlib.contextmanager
def _other_norms_refused(chunks: Sequence[nn.Module], directory: Directory) -> Iterator[None]:
    """While it lasts, `load_state_dict` of the chunks raises UserError for parameters of other norms.

    Once it has, it raises at every further call: only a strict one collects names, and Megatron's second try
    is none.
    """
    from megatron.core.utils import unwrap_model

    found: list[UserError] = []

    def look(_: nn.Module, names: Any) -> None:
        # Those of Transformer Engine's state are what the second try is there for.
        missing, unexpected = (
            {key for key in keys if not key.endswith("_extra_state")}
            for keys in (names.missing_keys, names.unexpected_keys)
        )
        try:
            compare(missing, unexpected, directory, norms_only=True)
        except UserError as error:
            found.append(error)
        if found:
            raise found[0]

    hooks = [chunk.register_load_state_dict_post_hook(look) for chunk in unwrap_model(list(chunks))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def refuse_strictness(strictness: str) -> None:
    """Raise UserError where Megatron cannot list a checkpoint's tensors, as every other strictness needs.

    It hands all that a tensor's metadata say to torch.empty. From torch 2.15 on they say `strides`, which
    that function does not take (`strategies/torch.py`, `load_tensors_metadata`, up to 0.19.2).
    """
    if hasattr(TensorProperties, "strides"):
        raise UserError(
            f"--dist-ckpt-strictness {strictness} was given, and with torch {torch.__version__} Megatron "
            "fails at it (torch.empty takes no strides). Leave the flag out: the names of the model's "
            "parameters are checked all the same. Or install torch<2.15"
        )


def compare_function(given: Namespace | None, saved: Namespace | None, checkpoint_dir: Directory) -> None:
    """Raise UserError when DyT's function changed: it is the one setting that leaves no key behind.

    Args:
        given, saved: Megatron's args of this run and of the checkpoint; None where there are none.
        checkpoint_dir: for the message.
    """
    now, then = getattr(given, "dyt_function", None), getattr(saved, "dyt_function", None)
    if now != then and None not in (now, then):
        raise UserError(
            f"the checkpoint {checkpoint_dir} was trained with --dyt-function {then}, and this run has "
            f"{now}. Give --dyt-function {then}, or --use-checkpoint-args."
        )


def model_tensor_keys(sharded_state_dict: object) -> Iterator[str]:
    """Checkpoint keys of this rank's model parameters (not of optimizer, RNG or extra state)."""
    if not isinstance(sharded_state_dict, dict):
        return
    for name, part in sharded_state_dict.items():
        # "model", or "model0", "model1" … with virtual pipeline stages.
        if isinstance(name, str) and name.startswith("model"):
            yield from _tensor_keys(part)


def _tensor_keys(node: object) -> Iterator[str]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return (item.key for item in _sharded(node) if isinstance(item, ShardedTensor))


def _stored_keys(node: object) -> Iterator[str]:
    """The keys under which a checkpoint stores all that `node` asks for, objects too."""
    return (getattr(item, "unique_key", item.key) for item in _sharded(node))


def _sharded(node: object) -> Iterator[ShardedBase]:
    """All sharded tensors and objects of a state dict."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _sharded(item)
    elif isinstance(node, ShardedTensorFactory):
        yield from _sharded(node.build())
    elif isinstance(node, (ShardedObject, ShardedTensor)):
        yield node


def checkpoint_tensor_keys(checkpoint_dir: Directory) -> set[str]:
    """Keys of the model tensors in a checkpoint directory.

    Raises:
        UserError: the directory's metadata cannot be read.
    """
    # Not by Megatron's `load_tensors_metadata`: see `refuse_strictness`.
    try:
        entries = metadata.read_metadata(Path(checkpoint_dir)).state_dict_metadata
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(checkpoint_dir, error) from error
    return {
        key
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and not metadata.is_optimizer(key)
    }


def _unreadable(checkpoint_dir: Directory, error: BaseException) -> UserError:
    """An error of one rank, so no `DamagedCheckpoint`, on which all ranks agree."""
    cause = metadata.cause(error)
    text = " ".join(str(cause).split()) or "no message"
    what = f"the checkpoint {checkpoint_dir} cannot be read ({type(cause).__name__}: {text})."
    if "shape mismatch" in text.lower():
        return UserError(
            f"{what} It was saved with another architecture, or the optimizer's state with another layout "
            "(docs/checkpoints.md); --no-load-optim leaves that out."
        )
    if "missing key" in text.lower() and "_extra_state" in text:
        return UserError(
            f"{what} That is state of Transformer Engine's layers, empty without FP8, which a checkpoint of "
            "local layers lacks: --dist-ckpt-strictness log_all loads the rest."
        )
    return UserError(f"{what} It may be incomplete or damaged: {OTHER_CHECKPOINT}.")


def gather(keys: Iterable[str], group: ProcessGroup | None = None) -> set[str]:
    """Union over all ranks of `group` (None: all): a pipeline stage has only its own layers."""
    return set().union(*world.gather(set(keys), group))


def compare(
    model: set[str], checkpoint: set[str], checkpoint_dir: Directory, norms_only: bool = False
) -> None:
    """Raise UserError unless the model and the checkpoint have the same parameters.

    Args:
        model, checkpoint: parameter keys.
        checkpoint_dir: for the message.
        norms_only: compare only norm parameters and the embedding scale: for users who chose another
            --dist-ckpt-strictness, which says what to do with the rest.
    """
    missing, unexpected = model - checkpoint, checkpoint - model
    if norms_only:
        missing, unexpected = set(filter(_is_norm, missing)), set(filter(_is_norm, unexpected))
    if missing or unexpected:
        raise UserError(
            f"the checkpoint {checkpoint_dir} does not fit this model. {_diagnosis(missing, unexpected)}"
            f" Missing in the checkpoint: {_some(missing)}. Not in the model: {_some(unexpected)}."
        )


def _is_norm(key: str) -> bool:
    # ln_pre, ln_post: of vision transformers.
    return "norm" in key.lower() or "ln_p" in key or _is_dyt(key)


def _is_dyt(key: str) -> bool:
    return key.endswith(("alpha", "shift", "input_rms", "alpha_floor", "embedding_scale.scale"))


def _diagnosis(missing: set[str], unexpected: set[str]) -> str:
    lacks, has = (any(key.endswith("alpha") for key in keys) for keys in (missing, unexpected))
    if lacks and not has:
        return (
            "It holds a LayerNorm or RMSNorm model and this one is DyT; give the --normalization it was "
            "trained with, or start DyT from scratch in an empty --save/--load directory."
        )
    if has and not lacks:
        return (
            "It holds a DyT model and this one is not; give --normalization DyT (or "
            "--use-checkpoint-args, which restores every DyT setting)."
        )
    if any(_is_dyt(key) or _is_norm(key) for key in missing | unexpected):
        return (
            "The DyT settings differ (bias, function, embedding scale, log alpha, running scale); "
            "--use-checkpoint-args restores those it was saved with."
        )
    return "Check the architecture flags against those it was saved with (--use-checkpoint-args)."


def _some(keys: set[str]) -> str:
    return some(sorted(keys, key=lambda key: (not _is_dyt(key), key))) or "nothing"


# --- the distributed optimizer's state ------------------------------------------------------------------


@wrapper
def wrap_sharded_state[R](
    original: Callable[..., R], self: DistributedOptimizer, *args: object, **kwargs: object
) -> R:
    """`DistributedOptimizer.sharded_param_state_fully_reshardable` with places that leave padding out.

    For `--dist-ckpt-optim-fully-reshardable` Megatron joins the buckets of its gradient buffer without the
    padding at their ends, and then cuts the parameters out at their places in the buffer with the padding
    (`get_parameter_state_dp_zero`, `sharded_param_state_fully_reshardable`; a note there says that something
    is wrong). After the first padded bucket every parameter gets its neighbour's values. Hidden sizes are
    mostly multiples of the padding, so that RMSNorm models have none; an alpha of one element makes it the
    rule.
    """
    with _places_without_padding(self.buffers):
        return original(self, *args, **kwargs)


@contextlib.contextmanager
def _places_without_padding(buffers: list[_ParamAndGradBuffer]) -> Iterator[None]:
    maps = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer in buffers:
            buffer.param_index_map = unpadded_places(buffer)
        yield
    finally:
        for buffer, places in zip(buffers, maps, strict=True):
            buffer.param_index_map = places


def unpadded_places(buffer: _ParamAndGradBuffer) -> dict[nn.Parameter, tuple[int, int, int]]:
    """`buffer.param_index_map`, parameter -> (start, end, bucket), as if no bucket were padded at its end."""
    shifts, unpadded = [], 0
    for bucket in buffer.buckets:
        shifts.append(bucket.offset - unpadded)
        unpadded += bucket.numel_unpadded
    return {
        parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }
