"""Everything that the CPU runtime replaces, as one table; the functions in it say why."""

import functools
from collections.abc import Callable
from typing import Any

from megatron_dyt import compat
from megatron_dyt.cpu import checkpointing, cuda, distributed, flags, fused, layers
from megatron_dyt.patching import Replacement, wrapper


def rows() -> list[Replacement]:
    """The table for the installed packages: `megatron.training` may be absent."""
    training = _megatron_training_rows() if compat.has_training() else []
    return [*_torch_rows(), *_megatron_core_rows(), *latent_attention_rows(), *_fused_rows(), *training]


def _always(value: Any) -> Callable[[Any], Any]:
    """A row's `make` for a replacement that does not need the original."""
    return lambda _original: value


_TORCH_CUDA: dict[str, Any] = {
    # Already False, unless the machine has a GPU that this process must leave alone.
    "is_available": cuda.no,
    "current_device": cuda.current_device,
    "device_count": cuda.device_count,
    "set_device": cuda.nothing,
    "synchronize": cuda.nothing,
    "empty_cache": cuda.nothing,
    "reset_peak_memory_stats": cuda.nothing,
    "set_stream": cuda.nothing,
    "is_current_stream_capturing": cuda.no,
    "current_stream": cuda.current_stream,
    "default_stream": cuda.current_stream,
    "Stream": cuda.Stream,
    "Event": cuda.Event,
    "stream": cuda.context,
    "device": cuda.context,
    "get_rng_state": cuda.get_rng_state,
    "set_rng_state": cuda.set_rng_state,
    "manual_seed": cuda.manual_seed,
    "manual_seed_all": cuda.manual_seed,
    "random.get_rng_state": cuda.get_rng_state,
    "random.set_rng_state": cuda.set_rng_state,
    "memory_allocated": cuda.memory_now,
    "memory_reserved": cuda.memory_now,
    "device_memory_used": cuda.memory_now,
    "max_memory_allocated": cuda.memory_peak,
    "max_memory_reserved": cuda.memory_peak,
    "memory_stats": cuda.memory_stats,
    "get_device_properties": cuda.device_properties,
    "get_device_capability": cuda.device_capability,
    "nvtx.range_push": cuda.nothing,
    "nvtx.range_pop": cuda.nothing,
}

# Functions of torch that take a device by name.
_FACTORIES = (
    *("empty", "zeros", "ones", "full", "tensor", "as_tensor", "scalar_tensor", "empty_strided"),
    *("arange", "linspace", "eye", "rand", "randn", "randint", "randperm"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("Tensor.new_empty", "Tensor.new_zeros", "Tensor.new_ones", "Tensor.new_full"),
    "Tensor.new_tensor",
)


def _torch_rows() -> list[Replacement]:
    return [
        *(Replacement("torch.cuda", name, _always(value)) for name, value in _TORCH_CUDA.items()),
        *(Replacement("torch", name, cuda.device_argument_to_cpu) for name in _FACTORIES),
        Replacement("torch", "Tensor.to", cuda.first_argument_to_cpu),
        Replacement("torch", "Tensor.cuda", _always(cuda.itself)),
        Replacement("torch", "Tensor.pin_memory", _always(cuda.itself)),
        Replacement("torch", "Tensor.record_stream", _always(cuda.nothing)),
        Replacement("torch", "Tensor.type", cuda.type_named_as_on_cuda),
        Replacement("torch.nn", "Module.cuda", _always(cuda.itself)),
        Replacement("torch.utils.data.dataloader", "_BaseDataLoaderIter.__init__", cuda.keeping_rng),
        Replacement("torch.distributed", "barrier", distributed.without_device_ids),
        Replacement("torch.distributed", "all_gather", distributed.one_by_one_where_uneven),
        Replacement("torch.distributed", "reduce_scatter", distributed.reduced_one_by_one_where_uneven),
    ]


def _megatron_core_rows() -> list[Replacement]:
    random = "megatron.core.tensor_parallel.random"
    writer = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    caller = "megatron.core.dist_checkpointing.strategies.async_utils"
    dispatcher = "megatron.core.transformer.moe.token_dispatcher"
    norm = "megatron.core.transformer.torch_norm"
    optimizer = "megatron.core.optimizer.distrib_optimizer"
    p2p = "megatron.core.pipeline_parallel.p2p_communication"
    fsdp = "megatron.core.distributed.fsdp.mcore_fsdp_adapter"
    # Both bind the name at their import.
    coalescing = (
        "megatron.core.distributed.param_and_grad_buffer",
        "megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer",
    )
    public = compat.has("public_results_queue")
    queue_getter = "get_write_results_queue" if public else "_get_write_results_queue"
    return [
        Replacement(random, "_set_cuda_rng_state", _always(cuda.set_rng_state)),
        Replacement(random, "CheckpointWithoutOutput.__init__", layers.without_fp8),
        Replacement(dispatcher, "maybe_move_tensor_to_cpu", layers.as_numpy_on_cpu),
        Replacement(norm, "WrappedTorchNorm.__new__", layers.for_sequence_parallel),
        Replacement(p2p, "_p2p_ops", distributed.sending_its_own_view),
        *(
            Replacement(module, "_coalescing_manager", distributed.waiting_at_its_end)
            for module in coalescing
        ),
        Replacement(fsdp, "DeviceMesh", distributed.meshes_on_cpu),
        Replacement(fsdp, "FullyShardedDataParallel.__init__", distributed.with_a_numbered_device),
        Replacement(writer, queue_getter, checkpointing.results_queue),
        Replacement(caller, "AsyncCallsQueue._get_async_caller", checkpointing.forking_caller),
        Replacement(caller, "TemporalAsyncCaller.schedule_async_call", checkpointing.ending_with_its_rank),
        Replacement(optimizer, "DistributedOptimizer.state_dict", checkpointing.with_state),
        Replacement(optimizer, "DistributedOptimizer.load_state_dict", checkpointing.with_own_steps),
        Replacement(
            optimizer,
            "DistributedOptimizer._set_main_param_and_optimizer_states",
            checkpointing.into_torch_state,
        ),
    ]


def latent_attention_rows() -> list[Replacement]:
    """Of use on any device, without Transformer Engine; they do nothing to other kinds of attention."""
    attention = "megatron.core.transformer.dot_product_attention"
    latent = "megatron.core.transformer.multi_latent_attention"
    return [
        Replacement(attention, "DotProductAttention.__init__", layers.with_widths),
        Replacement(latent, "MLASelfAttention.get_query_key_value_tensors", layers.announcing_gathers),
        Replacement(latent, "gather_from_tensor_model_parallel_region", layers.summing_positions),
    ]


def _fused_rows() -> list[Replacement]:
    attention = "megatron.core.transformer.dot_product_attention"
    cross_entropy = "megatron.core.tensor_parallel.cross_entropy"
    activation = "megatron.core.fusions.fused_bias_swiglu"
    rotary = "megatron.core.models.common.embeddings.rope_utils"
    return [
        Replacement(attention, "DotProductAttention.forward", fused.without_scores),
        Replacement(cross_entropy, "_VocabParallelCrossEntropy", fused.in_one_pass),
        Replacement(activation, "swiglu", fused.swiglu),
        Replacement(activation, "swiglu_back", fused.swiglu_back),
        Replacement(rotary, "_apply_rotary_pos_emb_bshd", fused.rotated_at_once),
        Replacement("torch.nn", "RMSNorm.forward", fused.rms_norm),
    ]


def _megatron_training_rows() -> list[Replacement]:
    # `training` binds these two names at its import, scripts take them from `initialize`.
    initialize, training = "megatron.training.initialize", "megatron.training.training"
    # 0.17 parses the arguments in `initialize`, which binds this name too. That module's row is first:
    # its import must find the original in `arguments`.
    validating = ["megatron.training.arguments"]
    if not compat.has("config_container"):
        validating.insert(0, initialize)
    return [
        Replacement(initialize, "initialize_megatron", _without_cuda_check),
        Replacement(training, "initialize_megatron", _without_cuda_check),
        # The warm-up only draws random numbers here, which would make the initial weights depend on
        # flags such as --seq-length: on CPU they come from the same generator.
        Replacement(initialize, "set_jit_fusion_options", _always(cuda.nothing)),
        Replacement(training, "set_jit_fusion_options", _always(cuda.nothing)),
        # The persistent writer process, started with the run, is not used: see `checkpointing`.
        Replacement(initialize, "init_persistent_async_worker", _always(cuda.nothing)),
        *(Replacement(module, "validate_args", _after_adjusting_flags) for module in validating),
    ]


def _without_cuda_check(initialize: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(initialize, allow_no_cuda=True)


@wrapper
def _after_adjusting_flags(validate: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any) -> Any:
    flags.adjust(args)
    return validate(args, *rest, **kwargs)
