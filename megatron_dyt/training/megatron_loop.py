"""The steps of a GPT run with the training loop of the installed Megatron: 0.17, 0.18 or 0.19.

From 0.19 the training loop builds the model from a configuration. Before, the caller gives it a
model provider, which Megatron-LM keeps in scripts that the wheel lacks; 0.17 also parses the
arguments itself. Which one is installed is asked of `mcore.compat`.
"""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from megatron_dyt import compat
from megatron_dyt.errors import UserError

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_log = logging.getLogger(__name__)

# What these entry points do with the training loop of 0.19 only: name in args -> flag.
_NEWER_ONLY = {
    "sft": "--sft",
    "hybrid_context_parallel": "--hybrid-context-parallel",
    "heterogeneous_layers_config_path": "--heterogeneous-layers-config-path",
    "heterogeneous_layers_config_encoded_json": "--heterogeneous-layers-config-encoded-json",
    "experimental_attention_variant": "--experimental-attention-variant",
    "yaml_cfg": "--yaml-cfg",
    "use_legacy_models": "--use-legacy-models",
}

# Where packed sequences begin and end: `check` refuses what packs them.
_PACKED = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")


def check(args: Namespace) -> None:
    """Raise `UserError` for a flag that our entry points do not carry to an older training loop."""
    if compat.has("model_builders"):
        return
    for name, flag in _NEWER_ONLY.items():
        if getattr(args, name, None):
            raise UserError(
                f"{flag} was given with megatron-core {compat.megatron_version()}; python -m "
                f"megatron_dyt.pretrain knows it from {compat.SINCE['model_builders']} on. Install "
                f"'megatron-core[training]=={compat.TESTED[-1]}', or run Megatron-LM's own script with "
                "python -m megatron_dyt.run."
            )


def evaluation_defaults(args: Namespace) -> dict[str, Any]:
    """Megatron's defaults for what the parsed `args` leave open about evaluation.

    Without --eval-interval there is none during training, says Megatron's ValidationConfig, but its
    training loop divides by the interval. One longer than any run means the same and can be divided by.
    """
    if getattr(args, "eval_interval", None) is not None:
        return {}
    _log.info("without --eval-interval, evaluation (--eval-iters) comes after the last step only")
    return {"eval_interval": sys.maxsize}


def pretrain(
    run: Callable[..., Any],
    datasets: Callable[..., Any],
    model_type: Any,
    forward_step: Callable[..., Any],
    args_defaults: dict[str, Any],
    **options: Any,
) -> None:
    """Call `run` (Megatron's `pretrain`, wrapped or not) on its arguments, as its version wants it."""
    if not compat.has("config_container"):
        run(datasets, build_gpt, model_type, forward_step, args_defaults=args_defaults, **options)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(args_defaults=args_defaults)
    if not compat.has("model_builders"):
        container = pretrain_cfg_container_from_args(args)
        run(container, datasets, build_gpt, model_type, forward_step, **options)
        return
    from megatron.training.argument_utils import gpt_config_from_args

    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    run(container, datasets, model_type, forward_step, **options)


def start(with_flags: Callable[[ArgumentParser], ArgumentParser]) -> Namespace:
    """Parse the arguments in `sys.argv` and set up Megatron in this process, without a model."""
    from megatron.training import arguments, get_args, initialize

    if not compat.has("config_container"):
        initialize.initialize_megatron(extra_args_provider=with_flags)
        return get_args()
    args: Namespace = arguments.parse_and_validate_args(extra_args_provider=with_flags)
    initialize.initialize_megatron()
    return args


def build_whole_gpt(args: Namespace) -> torch.nn.Module:
    """The GPT model of `args` in this process alone, not wrapped for data parallelism."""
    if not compat.has("model_builders"):
        from megatron.training import get_model

        (model,) = get_model(build_gpt, wrap_with_ddp=False)
        return model
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args

    config = gpt_config_from_args(args)
    (model,) = config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )
    return model


def build_gpt(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    """The model provider for 0.17 and 0.18: the GPT model of Megatron's arguments, for one stage.

    Raises `UserError` for a flag that `check` refuses.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    check(args)
    config = config or core_transformer_config_from_args(args)
    layers, mtp = _specs(args, config, vp_stage)
    return GPTModel(
        config=config,
        transformer_layer_spec=layers,
        mtp_block_spec=mtp,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def _specs(args: Namespace, config: Any, vp_stage: int | None) -> tuple[Any, Any]:
    """(spec of the decoder's layers, spec of the multi-token prediction block or None)."""
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.transformer.spec_utils import import_module

    use_te = args.transformer_impl == "transformer_engine"
    norms = {"normalization": args.normalization, "qk_l2_norm": args.qk_l2_norm}
    # All layers of the model, on every stage: the last one is what multi-token prediction repeats.
    last = specs.get_gpt_decoder_layer_specs(config, use_te, **norms)[-1]
    if args.spec is not None:
        layers = import_module(args.spec)
    elif args.num_experts:
        layers = specs.get_gpt_decoder_block_spec(config, use_te, **norms, vp_stage=vp_stage)
    else:
        layers = last
    if args.mtp_num_layers is None:
        return layers, None
    return layers, specs.get_gpt_mtp_block_spec(config, last, use_te, vp_stage=vp_stage)


def get_unpacked_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None, has_mtp: bool
) -> dict[str, Any]:
    """In 0.17 and 0.18 this rank's part of the next micro-batch, on a rank that needs its tokens.

    tokens, labels and position_ids are int64 [sequences of the micro-batch, tokens of a sequence on this
    rank], loss_mask is fp32 of that shape; None is what this stage does not need.
    """
    if compat.has("batch_in_core"):
        return _get_batch_by_core(data_iterator, has_mtp)
    from megatron.core.utils import get_batch_on_this_cp_rank
    from megatron.training.utils import get_batch_on_this_tp_rank

    batch = get_batch_on_this_tp_rank(data_iterator, mtp_on_this_rank=has_mtp)
    for name in _PACKED:
        batch.pop(name, None)
    return {**get_batch_on_this_cp_rank(batch), **dict.fromkeys(_PACKED)}


def _get_batch_by_core(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None, has_mtp: bool
) -> dict[str, Any]:
    from megatron.core import mpu
    from megatron.core import utils as core

    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        read = next(data_iterator)
        names = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
        batch = {name: None if read.get(name) is None else read[name].cuda() for name in names}
        batch |= dict.fromkeys(_PACKED)
    batch = core.get_batch_on_this_tp_rank(
        batch,
        is_sft=False,
        is_hybrid_cp=False,
        **place_of_batch(has_mtp),
    )
    group = mpu.get_context_parallel_group()
    return dict(core.get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group))


def place_of_batch(has_mtp: bool) -> dict[str, Any]:
    """What `get_batch_on_this_tp_rank` of megatron.core, from 0.18, wants to know of batch and rank."""
    from megatron.core import mpu
    from megatron.training import get_args

    args = get_args()
    return {
        "create_attention_mask_in_dataloader": args.create_attention_mask_in_dataloader,
        "broadcast_src_rank": mpu.get_tensor_model_parallel_src_rank(),
        "broadcast_group": mpu.get_tensor_model_parallel_group(),
        "cp_size": args.context_parallel_size,
        "tp_rank": mpu.get_tensor_model_parallel_rank(),
        "micro_batch_size": args.micro_batch_size,
        "seq_length": args.seq_length,
        "mtp_on_this_rank": has_mtp,
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
        "is_pipeline_first_stage": mpu.is_pipeline_first_stage(),
        "is_pipeline_last_stage": mpu.is_pipeline_last_stage(),
    }
