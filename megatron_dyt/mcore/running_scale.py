"""alpha divided by a running average of the rms of DyT's input: `--dyt-running-scale`.

RMSNorm divides each token by its own rms; here a whole site divides by one number, `DyTNorm.input_rms`, an
exponential average over past steps. In a step it is a constant: the forward pass reduces nothing and waits
for no other rank, and kernels, export and evaluation see an alpha. What it takes away is that every change
of the residual stream's size changes the size of all that follows (docs/long-runs.md).

Each forward pass adds the sum of squares and the count of a sample of its tokens to `DyTNorm.seen`. Where
Megatron completes the gradients of a step, after the last backward pass, the sums of all sites are reduced
over the ranks that have the same layers, and all take the same average over. A step that Megatron runs once
more, to see whether its result is the same, finds the averages as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dyt import world
from megatron_dyt.errors import UserError
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.mcore.norm_sites import dyt_sites, unwrap
from megatron_dyt.patching import wrapper

if TYPE_CHECKING:
    from megatron.core.rerun_state_machine import RerunStateMachine
    from torch.distributed import ProcessGroup

# Of the average: what of it is left after a step. With 0.9 it lags behind the stream by ten steps.
DECAY = 0.9

# What each average was before its last update in this step.
_before: WeakKeyDictionary[DyTNorm, Tensor] = WeakKeyDictionary()
# Of each model that was asked for: a walk through all modules in every step would take a millisecond.
_sites: WeakKeyDictionary[nn.Module, list[DyTNorm]] = WeakKeyDictionary()


@wrapper
def wrap_allreduce(
    original: Callable[..., None], model: list[nn.Module], *args: object, **kwargs: object
) -> None:
    """`_allreduce_word_embedding_grads`, which every rank calls in each step, that updates the averages."""
    original(model, *args, **kwargs)
    update(model)


@wrapper
def wrap_reset(
    original: Callable[..., None], config: object, model: list[nn.Module], *args: object, **kwargs: object
) -> None:
    """`reset_model_temporary_tensors`, which Megatron calls after a step's update, where there is nothing
    left to forget, and after the capture of Transformer Engine's CUDA graphs, which runs layers on ones."""
    original(config, model, *args, **kwargs)
    seen = [_of(site.seen) for chunk in model for site in _sites_of(chunk)]
    if seen:
        with torch.no_grad():
            torch._foreach_zero_(seen)


@torch.no_grad()
def update(chunks: Iterable[nn.Module]) -> None:
    """Move each site's `input_rms` towards the rms of what it has seen since the last call.

    A site that has seen nothing, or a value that is not finite, keeps its average. Every rank that has these
    layers must call it, after the last backward pass of a step.

    chunks: the model's chunks on this rank.

    Raises:
        UserError: several ranks, and no groups that say which have the same layers.
    """
    chunks = list(chunks)
    sites = [site for chunk in chunks for site in _sites_of(chunk)]
    if not sites:
        return
    averages, seen = [_of(site.input_rms) for site in sites], [_of(site.seen) for site in sites]
    before, sums = torch.stack(averages), torch.stack(seen)
    for group in _same_layers(chunks[0]):
        dist.all_reduce(sums, group=group)
    rms = (sums[:, :1] / sums[:, 1:]).sqrt()
    after = torch.where(rms.isfinite() & (rms > 0), DECAY * before + (1 - DECAY) * rms, before)
    torch._foreach_copy_(averages, list(after))
    torch._foreach_zero_(seen)
    _before.update(zip(sites, before, strict=True))


@torch.no_grad()
def put_back() -> None:
    """Undo the last `update` of this step, which is run once more."""
    for site, average in _before.items():
        _of(site.input_rms).copy_(average)


@wrapper
def wrap_rerun(
    original: Callable[..., bool], self: RerunStateMachine, *args: object, **kwargs: object
) -> bool:
    """`RerunStateMachine.should_run_forward_backward` that undoes the step's update before another pass."""
    run = original(self, *args, **kwargs)
    if run and self.state.name == "INITIAL_RUN":
        _before.clear()
    elif run:
        put_back()
    return run


@wrapper
def wrap_exit(
    original: Callable[[RerunStateMachine], tuple[bool, bool, int]], self: RerunStateMachine
) -> tuple[bool, bool, int]:
    """`RerunStateMachine.should_checkpoint_and_exit` that undoes the update of a step which is not taken:
    the checkpoint is for running it again."""
    should_checkpoint, should_exit, code = original(self)
    if should_exit:
        put_back()
    return should_checkpoint, should_exit, code


def _sites_of(chunk: nn.Module) -> list[DyTNorm]:
    if chunk not in _sites:
        _sites[chunk] = [norm for _, norm in dyt_sites(chunk) if norm.input_rms is not None]
    return _sites[chunk]


def _same_layers(chunk: nn.Module) -> list[ProcessGroup]:
    """Groups that together are this rank's pipeline stage: its tensor, context and data parallel ranks."""
    if world.size() == 1:
        return []
    from megatron.core import parallel_state

    # A model may have groups of its own.
    own = getattr(unwrap(chunk), "pg_collection", None)
    for names in (("tp_dp_cp",), ("tp", "dp_cp")):
        groups = [group for name in names if (group := getattr(own, name, None)) is not None]
        if len(groups) == len(names):
            return groups
    if parallel_state.model_parallel_is_initialized():
        return [parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)]
    raise UserError(
        "a running scale is averaged over the ranks that have the same layers, and neither the model's "
        "pg_collection (tp_dp_cp, or tp and dp_cp) nor Megatron's parallel_state says which. Give the model "
        "its groups, or pass --dyt-running-scale none."
    )


def _of(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    return buffer
