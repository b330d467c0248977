"""Everything that the CPU runtime replaces, as one table."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_dyt import compat
from megatron_dyt.cpu import async_save, collectives, flags, fsdp, latent_attention, torch_adam
from megatron_dyt.cpu import cuda_stand_ins as stand_in
from megatron_dyt.patching import Replacement


def rows() -> list[Replacement]:
    """The table for the installed packages: `megatron.training` may be absent."""
    training = _megatron_training_rows() if compat.has_training() else []
    return [*_torch_cuda_rows(), *_tensor_rows(), *collectives.rows(), *_megatron_core_rows(), *training]


def _always(value: Any) -> Callable[[Any], Any]:
    """A row's `make` for a replacement that does not need the original."""
    return lambda _original: value


# --- torch.cuda -----------------------------------------------------------------------------------

_TORCH_CUDA: dict[str, Any] = {
    # Already False, unless the machine has a GPU that this process must leave alone.
    "is_available": stand_in.no,
    "current_device": stand_in.current_device,
    "device_count": stand_in.device_count,
    "set_device": stand_in.nothing,
    "synchronize": stand_in.nothing,
    "empty_cache": stand_in.nothing,
    "reset_peak_memory_stats": stand_in.nothing,
    "set_stream": stand_in.nothing,
    "is_current_stream_capturing": stand_in.no,
    "current_stream": stand_in.current_stream,
    "default_stream": stand_in.current_stream,
    "Stream": stand_in.Stream,
    "Event": stand_in.Event,
    "stream": stand_in.context,
    "device": stand_in.context,
    "get_rng_state": stand_in.get_rng_state,
    "set_rng_state": stand_in.set_rng_state,
    "manual_seed": stand_in.manual_seed,
    "manual_seed_all": stand_in.manual_seed,
    "random.get_rng_state": stand_in.get_rng_state,
    "random.set_rng_state": stand_in.set_rng_state,
    "memory_allocated": stand_in.memory_now,
    "memory_reserved": stand_in.memory_now,
    "device_memory_used": stand_in.memory_now,
    "max_memory_allocated": stand_in.memory_peak,
    "max_memory_reserved": stand_in.memory_peak,
    "memory_stats": stand_in.memory_stats,
    "get_device_properties": stand_in.device_properties,
    "get_device_capability": stand_in.device_capability,
    "nvtx.range_push": stand_in.nothing,
    "nvtx.range_pop": stand_in.nothing,
}


def _torch_cuda_rows() -> list[Replacement]:
    return [Replacement("torch.cuda", name, _always(value)) for name, value in _TORCH_CUDA.items()]


# --- tensors --------------------------------------------------------------------------------------

_FACTORIES = (
    *("empty", "zeros", "ones", "full", "tensor", "as_tensor", "scalar_tensor", "empty_strided"),
    *("arange", "linspace", "eye", "rand", "randn", "randint", "randperm"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("Tensor.new_empty", "Tensor.new_zeros", "Tensor.new_ones", "Tensor.new_full"),
    "Tensor.new_tensor",
)


def _tensor_rows() -> list[Replacement]:
    return [
        *(Replacement("torch", name, _device_argument_to_cpu) for name in _FACTORIES),
        Replacement("torch", "Tensor.to", _first_argument_to_cpu),
        Replacement("torch", "Tensor.cuda", _always(_itself)),
        Replacement("torch", "Tensor.pin_memory", _always(_itself)),
        Replacement("torch", "Tensor.record_stream", _always(stand_in.nothing)),
        Replacement("torch", "Tensor.type", _type_named_as_on_cuda),
        Replacement("torch.nn", "Module.cuda", _always(_itself)),
        Replacement("torch.distributed", "barrier", _without_device_ids),
        Replacement("torch.utils.data.dataloader", "_BaseDataLoaderIter.__init__", _keeping_rng),
    ]


def _cpu_for_cuda(device: Any) -> Any:
    """The CPU when `device` names a CUDA device (by string, device or index), else `device`."""
    if isinstance(device, torch.device):
        names_cuda = device.type == "cuda"
    elif isinstance(device, str):
        names_cuda = device.startswith("cuda")
    else:
        names_cuda = isinstance(device, int) and not isinstance(device, bool)
    return torch.device("cpu") if names_cuda else device


def _device_argument_to_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        return factory(*args, **kwargs)

    return make


def _first_argument_to_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    convert = _device_argument_to_cpu(to)

    @functools.wraps(to)
    def move(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (_cpu_for_cuda(args[0]), *args[1:])
        return convert(tensor, *args, **kwargs)

    return move


def _keeping_rng(start: Callable[..., None]) -> Callable[..., None]:
    """A data loader that starts reading draws a seed from the CPU generator.

    On a GPU that does not touch the generator of dropout. Here it is the same one, and a resumed
    run, which starts to read at another step, would get other dropout masks.
    """

    @functools.wraps(start)
    def start_reading(*args: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            start(*args, **kwargs)

    return start_reading


def _itself(thing: Any, *_args: Any, **_kwargs: Any) -> Any:
    return thing


def _type_named_as_on_cuda(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's optimizers compare `tensor.type()` with "torch.cuda.FloatTensor" and the like."""

    @functools.wraps(type_of)
    def named(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_of(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return named


def _without_device_ids(barrier: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(barrier)
    def wait(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)
        return barrier(*args, **kwargs)

    return wait


# --- Megatron -------------------------------------------------------------------------------------


def _megatron_core_rows() -> list[Replacement]:
    random = "megatron.core.tensor_parallel.random"
    writer = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    caller = "megatron.core.dist_checkpointing.strategies.async_utils"
    dispatcher = "megatron.core.transformer.moe.token_dispatcher"
    norm = "megatron.core.transformer.torch_norm"
    optimizer = "megatron.core.optimizer.distrib_optimizer"
    p2p = "megatron.core.pipeline_parallel.p2p_communication"
    public = compat.has("public_results_queue")
    queue_getter = "get_write_results_queue" if public else "_get_write_results_queue"
    return [
        *latent_attention.rows(),
        *fsdp.rows(),
        Replacement(random, "_set_cuda_rng_state", _always(stand_in.set_rng_state)),
        Replacement(writer, queue_getter, async_save.results_queue),
        Replacement(caller, "AsyncCallsQueue._get_async_caller", async_save.forking_caller),
        Replacement(caller, "TemporalAsyncCaller.schedule_async_call", async_save.ending_with_its_rank),
        Replacement(random, "CheckpointWithoutOutput.__init__", _without_fp8),
        Replacement(dispatcher, "maybe_move_tensor_to_cpu", _as_numpy_on_cpu),
        Replacement(norm, "WrappedTorchNorm.__new__", _for_sequence_parallel),
        Replacement(p2p, "_p2p_ops", _sending_its_own_view),
        Replacement(optimizer, "DistributedOptimizer.state_dict", torch_adam.with_state),
        Replacement(optimizer, "DistributedOptimizer.load_state_dict", torch_adam.with_own_steps),
        Replacement(
            optimizer,
            "DistributedOptimizer._set_main_param_and_optimizer_states",
            torch_adam.into_torch_state,
        ),
    ]


def _sending_its_own_view(start: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor on its way to another stage keeps its memory until it has arrived.

    Up to 0.17 the schedule of virtual stages frees an output (`output.data = ...`) while it is being
    sent, and the next stage receives garbage. A view holds the memory and the send holds the view.
    """

    @functools.wraps(start)
    def start_with_views(*, tensor_send_prev: Any, tensor_send_next: Any, **rest: Any) -> Any:
        views = [None if sent is None else sent.detach() for sent in (tensor_send_prev, tensor_send_next)]
        return start(tensor_send_prev=views[0], tensor_send_next=views[1], **rest)

    return start_with_views


def _without_fp8(init: Callable[..., None]) -> Callable[..., None]:
    """Megatron 0.19 takes the default, False, for fp8, which needs Transformer Engine."""
    return lambda self, fp8=None: init(self, fp8 or None)


def _as_numpy_on_cpu(move: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron makes split sizes lists on the way off a GPU only, and all_to_all takes nothing else."""

    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return move(tensor, as_numpy, record_stream)

    return moved


def _for_sequence_parallel(new: Callable[..., Any]) -> Any:
    """PyTorch's norms under sequence parallelism, which Megatron allows for TE and apex norms only.

    All that they lack is the mark by which Megatron sums their gradients over the tensor-parallel
    ranks, each of which has seen its part of the sequence.
    """

    @functools.wraps(new)
    def __new__(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return new(cls, config, *args, **kwargs)
        unsplit = copy.copy(config)
        unsplit.sequence_parallel = False
        norm = new(cls, unsplit, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    return staticmethod(__new__)


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
        Replacement(initialize, "set_jit_fusion_options", _always(stand_in.nothing)),
        Replacement(training, "set_jit_fusion_options", _always(stand_in.nothing)),
        # The persistent writer process, started with the run, is not used: see async_save.
        Replacement(initialize, "init_persistent_async_worker", _always(stand_in.nothing)),
        *(Replacement(module, "validate_args", _after_adjusting_flags) for module in validating),
    ]


def _without_cuda_check(initialize: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(initialize, allow_no_cuda=True)


def _after_adjusting_flags(validate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(validate)
    def adjust_and_validate(args: Any, *rest: Any, **kwargs: Any) -> Any:
        flags.adjust(args)
        return validate(args, *rest, **kwargs)

    return adjust_and_validate
