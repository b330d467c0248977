"""The only writer into Megatron: one table of seams, applied once.

Every wrapper passes straight through unless the model's `normalization` is "DyT" (or an embedding
scale was asked for), so Megatron with the plugin registered and RMSNorm is Megatron unchanged.
"""

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
    running_scale,
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
_CONFIG = "megatron.core.transformer.transformer_config"
_RERUN = "megatron.core.rerun_state_machine"
_TRAINING = "megatron.training.training"
_ARGUMENTS = "megatron.training.arguments"
_CHECKPOINTING = "megatron.training.checkpointing"
_GLOBALS = "megatron.training.global_vars"


CORE = (
    Replacement(_BLOCK, "_get_block_submodules", spec.wrap_block_submodules),
    Replacement(_BLOCK, "TransformerBlock.__init__", norm_sites.wrap_block_init),
    Replacement(
        "megatron.core.transformer.transformer_layer", "TransformerLayer.__init__", spec.wrap_layer_init
    ),
    Replacement("megatron.core.ssm.mamba_layer", "MambaLayer.__init__", spec.wrap_mamba_layer_init),
    Replacement(
        "megatron.core.transformer.multi_token_prediction",
        "MultiTokenPredictionLayer.__init__",
        spec.wrap_mtp_layer_init,
    ),
    Replacement(_CONFIG, "TransformerConfig.__post_init__", model_config.wrap_post_init),
    Replacement(_CONFIG, "TransformerConfig.__post_init__", recipe_flags.wrap_post_init),
    Replacement(
        "megatron.core.optimizer_param_scheduler", "OptimizerParamScheduler.get_lr", recipe_flags.wrap_get_lr
    ),
    Replacement(
        "megatron.core.datasets.blended_megatron_dataset_config",
        "BlendedMegatronDatasetConfig.__post_init__",
        recipe_flags.wrap_dataset_post_init,
    ),
    Replacement(_EMBEDDING, "LanguageModelEmbedding.__init__", embedding.wrap_init),
    Replacement(_EMBEDDING, "LanguageModelEmbedding.forward", embedding.wrap_forward),
    Replacement(_LANGUAGE_MODULE, "LanguageModule.setup_embeddings_and_output_layer", embedding.wrap_setup),
    Replacement(
        "megatron.core.distributed.finalize_model_grads",
        "_allreduce_word_embedding_grads",
        embedding.wrap_allreduce,
    ),
    Replacement(
        "megatron.core.distributed.finalize_model_grads",
        "_allreduce_word_embedding_grads",
        running_scale.wrap_allreduce,
    ),
    Replacement(
        "megatron.core.distributed.finalize_model_grads",
        "reset_model_temporary_tensors",
        running_scale.wrap_reset,
    ),
    Replacement("megatron.core.transformer.torch_norm", "WrappedTorchNorm.__new__", norm_sites.wrap_norm_new),
    Replacement(
        "megatron.core.fusions.fused_layer_norm", "FusedLayerNorm.__init__", norm_sites.wrap_norm_init
    ),
    Replacement(_RANDOM, "CheckpointWithoutOutput.checkpoint", norm.wrap_checkpoint),
    Replacement(_RANDOM, "CheckpointWithoutOutput.discard_output_and_register_recompute", norm.wrap_discard),
    Replacement("megatron.core.dist_checkpointing", "load", checkpoint.wrap_load),
    Replacement(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.sharded_param_state_fully_reshardable",
        checkpoint.wrap_sharded_state,
    ),
    Replacement(_RERUN, "RerunStateMachine.should_run_forward_backward", guard.wrap_rerun),
    Replacement(_RERUN, "RerunStateMachine.should_run_forward_backward", running_scale.wrap_rerun),
    Replacement(_RERUN, "RerunStateMachine.should_checkpoint_and_exit", running_scale.wrap_exit),
)

# Norms that model classes build themselves.
FAMILIES = (
    Replacement(f"{_MODELS}.bert.bert_lm_head", "LNImpl", norm_sites.wrap_norm_class),
    Replacement(f"{_MODELS}.T5.t5_model", "T5Model.__init__", norm_sites.wrap_t5_init),
    Replacement(f"{_MODELS}.vision.clip_vit_model", "CLIPViTModel.__init__", norm_sites.wrap_vision_init),
    Replacement(f"{_MODELS}.vision.radio", "RADIOViTModel.__init__", norm_sites.wrap_vision_init),
    Replacement(f"{_MODELS}.multimodal.llava_model", "LLaVAModel.__init__", norm_sites.wrap_multimodal_init),
)

# Without Transformer Engine these names are mocks.
TRANSFORMER_ENGINE = (
    Replacement(_TE, "TENorm.__new__", norm_sites.wrap_norm_new),
    Replacement(_TE, "TELayerNormColumnParallelLinear.__init__", norm_sites.wrap_norm_init),
)

TRAINING = (
    Replacement(_ARGUMENTS, "add_megatron_arguments", args.wrap_add_arguments),
    Replacement(_ARGUMENTS, "validate_args", args.wrap_validate),
    Replacement(_GLOBALS, "_set_tensorboard_writer", trackers.wrap_tensorboard_writer),
    Replacement(_GLOBALS, "_set_wandb_writer", trackers.wrap_wandb_writer),
    Replacement(_CHECKPOINTING, "load_args_from_checkpoint", args.wrap_load_args),
    Replacement(_CHECKPOINTING, "load_args_from_checkpoint", damage.wrap_load_args),
    Replacement(_CHECKPOINTING, "check_checkpoint_args", recipe_flags.wrap_check_checkpoint_args),
    Replacement(_TRAINING, "load_checkpoint", checkpoint.wrap_load_checkpoint),
    Replacement(_TRAINING, "load_checkpoint", damage.wrap_load_checkpoint),
    Replacement(_TRAINING, "get_standard_config_overrides", recipe_flags.wrap_config_overrides),
    Replacement(_TRAINING, "setup_model_and_optimizer", monitor.wrap_setup),
    Replacement(_TRAINING, "training_log", monitor.wrap_training_log),
    Replacement(_TRAINING, "setup_model_and_optimizer", guard.wrap_setup),
    Replacement(_TRAINING, "train_step", guard.wrap_train_step),
    Replacement(_TRAINING, "save_checkpoint_and_time", guard.wrap_save),
    Replacement(_TRAINING, "setup_model_and_optimizer", metrics_writer.wrap_setup),
    Replacement(_TRAINING, "training_log", metrics_writer.wrap_training_log),
    Replacement("megatron.core.timers", "Timer.elapsed", metrics_writer.wrap_elapsed),
    Replacement(_TRAINING, "evaluate", metrics_writer.wrap_evaluate),
    Replacement(_TRAINING, "evaluate_and_print_results", metrics_writer.wrap_print_evaluation),
)

# 0.17 parses the arguments in `initialize`, which binds these names too. They come before the rows above:
# the import of that module must find the originals.
INITIALIZE_0_17 = (
    Replacement("megatron.training.initialize", "validate_args", args.wrap_validate),
    Replacement("megatron.training.initialize", "load_args_from_checkpoint", args.wrap_load_args),
)

# 0.16 deletes by a function inside `save_checkpoint`; `args.validate` refuses what needs this row.
DELETION = (Replacement(_CHECKPOINTING, "_async_delete_checkpoint_impl", damage.wrap_delete),)

_patches: Patches | None = None


def seams() -> tuple[Replacement, ...]:
    """The seams of what is installed: the training loop and Transformer Engine may be absent."""
    training: tuple[Replacement, ...] = ()
    if compat.has_training():
        training = TRAINING if compat.has("config_container") else INITIALIZE_0_17 + TRAINING
        training += DELETION if compat.has("deletion_by_name") else ()
    module, stack = compat.hybrid_stack()
    hybrids = (
        Replacement(module, f"{stack}.__init__", norm_sites.wrap_block_init),
        Replacement(module, "TENorm", norm_sites.wrap_norm_class),
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
        patches.apply(seams())
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
