"""The only writer into Megatron: one table of seams, applied once.

Every wrapper passes straight through unless the model's `normalization` is "DyT" (or an embedding
scale was asked for), so Megatron with the plugin registered and RMSNorm is Megatron unchanged.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_dyt import compat, log
from megatron_dyt.checkpoints import damage
from megatron_dyt.errors import UserError
from megatron_dyt.mcore import (
    args,
    checkpoint,
    embedding,
    guard,
    metrics_writer,
    model_config,
    monitor,
    norm,
    norm_sites,
    recipe_flags,
    spec,
    trackers,
)
from megatron_dyt.patching import Patches, Replacement

_EMBEDDING = "megatron.core.models.common.embeddings.language_model_embedding"
_LANGUAGE_MODULE = "megatron.core.models.common.language_module.language_module"
_BLOCK = "megatron.core.transformer.transformer_block"
_MODELS = "megatron.core.models"
_RANDOM = "megatron.core.tensor_parallel.random"
_TE = "megatron.core.extensions.transformer_engine"


class Seam(NamedTuple):
    """One attribute of Megatron and the function that makes its replacement from the original."""

    module: str
    attribute: str
    wrap: Callable[[Any], Any]


CORE = (
    Seam(_BLOCK, "_get_block_submodules", spec.wrap_block_submodules),
    Seam(_BLOCK, "TransformerBlock.__init__", norm_sites.wrap_block_init),
    Seam("megatron.core.transformer.transformer_layer", "TransformerLayer.__init__", spec.wrap_layer_init),
    Seam("megatron.core.ssm.mamba_layer", "MambaLayer.__init__", spec.wrap_mamba_layer_init),
    Seam(
        "megatron.core.transformer.multi_token_prediction",
        "MultiTokenPredictionLayer.__init__",
        spec.wrap_mtp_layer_init,
    ),
    Seam(
        "megatron.core.transformer.transformer_config",
        "TransformerConfig.__post_init__",
        model_config.wrap_post_init,
    ),
    Seam(
        "megatron.core.transformer.transformer_config",
        "TransformerConfig.__post_init__",
        recipe_flags.wrap_post_init,
    ),
    Seam(
        "megatron.core.optimizer_param_scheduler", "OptimizerParamScheduler.get_lr", recipe_flags.wrap_get_lr
    ),
    Seam(
        "megatron.core.datasets.blended_megatron_dataset_config",
        "BlendedMegatronDatasetConfig.__post_init__",
        recipe_flags.wrap_dataset_post_init,
    ),
    Seam(_EMBEDDING, "LanguageModelEmbedding.__init__", embedding.wrap_init),
    Seam(_EMBEDDING, "LanguageModelEmbedding.forward", embedding.wrap_forward),
    Seam(_LANGUAGE_MODULE, "LanguageModule.setup_embeddings_and_output_layer", embedding.wrap_setup),
    Seam(
        "megatron.core.distributed.finalize_model_grads",
        "_allreduce_word_embedding_grads",
        embedding.wrap_allreduce,
    ),
    Seam("megatron.core.transformer.torch_norm", "WrappedTorchNorm.__new__", norm_sites.wrap_norm_new),
    Seam("megatron.core.fusions.fused_layer_norm", "FusedLayerNorm.__init__", norm_sites.wrap_norm_init),
    Seam(_RANDOM, "CheckpointWithoutOutput.checkpoint", norm.wrap_checkpoint),
    Seam(_RANDOM, "CheckpointWithoutOutput.discard_output_and_register_recompute", norm.wrap_discard),
    Seam("megatron.core.dist_checkpointing", "load", checkpoint.wrap_load),
    Seam(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.sharded_param_state_fully_reshardable",
        checkpoint.wrap_sharded_state,
    ),
    Seam(
        "megatron.core.rerun_state_machine", "RerunStateMachine.should_run_forward_backward", guard.wrap_rerun
    ),
)

# Norms that model classes build themselves.
FAMILIES = (
    Seam(f"{_MODELS}.bert.bert_lm_head", "LNImpl", norm_sites.wrap_norm_class),
    Seam(f"{_MODELS}.T5.t5_model", "T5Model.__init__", norm_sites.wrap_t5_init),
    Seam(f"{_MODELS}.vision.clip_vit_model", "CLIPViTModel.__init__", norm_sites.wrap_vision_init),
    Seam(f"{_MODELS}.vision.radio", "RADIOViTModel.__init__", norm_sites.wrap_vision_init),
    Seam(f"{_MODELS}.multimodal.llava_model", "LLaVAModel.__init__", norm_sites.wrap_multimodal_init),
)

# Without Transformer Engine these names are mocks.
TRANSFORMER_ENGINE = (
    Seam(_TE, "TENorm.__new__", norm_sites.wrap_norm_new),
    Seam(_TE, "TELayerNormColumnParallelLinear.__init__", norm_sites.wrap_norm_init),
)

TRAINING = (
    Seam("megatron.training.arguments", "add_megatron_arguments", args.wrap_add_arguments),
    Seam("megatron.training.arguments", "add_megatron_arguments", metrics_writer.wrap_add_arguments),
    Seam("megatron.training.arguments", "validate_args", args.wrap_validate),
    Seam("megatron.training.global_vars", "_set_tensorboard_writer", trackers.wrap_tensorboard_writer),
    Seam("megatron.training.global_vars", "_set_wandb_writer", trackers.wrap_wandb_writer),
    Seam("megatron.training.checkpointing", "load_args_from_checkpoint", args.wrap_load_args),
    Seam("megatron.training.checkpointing", "load_args_from_checkpoint", damage.wrap_load_args),
    Seam(
        "megatron.training.checkpointing",
        "check_checkpoint_args",
        recipe_flags.wrap_check_checkpoint_args,
    ),
    Seam("megatron.training.training", "load_checkpoint", damage.wrap_load_checkpoint),
    Seam("megatron.training.training", "get_standard_config_overrides", recipe_flags.wrap_config_overrides),
    Seam("megatron.training.training", "setup_model_and_optimizer", monitor.wrap_setup),
    Seam("megatron.training.training", "training_log", monitor.wrap_training_log),
    Seam("megatron.training.training", "setup_model_and_optimizer", guard.wrap_setup),
    Seam("megatron.training.training", "train_step", guard.wrap_train_step),
    Seam("megatron.training.training", "setup_model_and_optimizer", metrics_writer.wrap_setup),
    Seam("megatron.training.training", "training_log", metrics_writer.wrap_training_log),
    Seam("megatron.core.timers", "Timer.elapsed", metrics_writer.wrap_elapsed),
    Seam("megatron.training.training", "evaluate", metrics_writer.wrap_evaluate),
    Seam("megatron.training.training", "evaluate_and_print_results", metrics_writer.wrap_print_evaluation),
)

# 0.17 parses the arguments in `initialize`, which binds these names too. They come before the rows above:
# the import of that module must find the originals.
INITIALIZE_0_17 = (
    Seam("megatron.training.initialize", "validate_args", args.wrap_validate),
    Seam("megatron.training.initialize", "load_args_from_checkpoint", args.wrap_load_args),
)

# 0.16 deletes by a function inside `save_checkpoint`; `args.validate` refuses what needs this row.
DELETION = (Seam("megatron.training.checkpointing", "_async_delete_checkpoint_impl", damage.wrap_delete),)

_patches: Patches | None = None


def seams() -> tuple[Seam, ...]:
    """The seams of what is installed: the training loop and Transformer Engine may be absent."""
    training: tuple[Seam, ...] = ()
    if compat.has_training():
        training = TRAINING if compat.has("config_container") else INITIALIZE_0_17 + TRAINING
        training += DELETION if compat.has("deletion_by_name") else ()
    module, stack = compat.hybrid_stack()
    hybrids = (
        Seam(module, f"{stack}.__init__", norm_sites.wrap_block_init),
        Seam(module, "TENorm", norm_sites.wrap_norm_class),
    )
    te = TRANSFORMER_ENGINE if compat.has_transformer_engine() else ()
    return CORE + hybrids + FAMILIES + training + te


def register() -> None:
    """Add `--normalization DyT` to the installed Megatron-Core. Calling it again does nothing.

    Call it before Megatron parses its arguments or builds a model.

    Raises:
        UserError: megatron-core is missing, of an unsupported version, or lacks a seam.
    """
    global _patches
    if _patches is not None:
        return
    log.show()
    version = compat.check_version()
    patches = Patches()
    try:
        patches.apply(Replacement(*seam) for seam in seams())
    except RuntimeError as error:
        raise UserError(
            f"megatron-core {version} lacks a place that megatron_dyt needs: {error}. "
            "Install one that the README lists as tested."
        ) from error
    _patches = patches


def unregister() -> None:
    """Put Megatron back as it was (models built with DyT keep working)."""
    global _patches
    if _patches is not None:
        _patches.undo()
        _patches = None


def is_registered() -> bool:
    """Whether `register` is in force."""
    return _patches is not None
