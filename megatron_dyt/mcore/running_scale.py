"""alpha divided by a running average of the rms of DyT's input: `--dyt-running-scale`.

RMSNorm divides each token by its own rms; here a whole site divides by one number, `DyTNorm.input_rms`, an
exponential average over past steps. In a step it is a constant: the forward pass reduces nothing and waits
for no other rank, and kernels, export and evaluation see an alpha. What it takes away is that every change
of the residual stream's size changes the size of all that follows (docs/results.md).

Each forward pass adds the sum of squares and the count of a sample of its tokens to `DyTNorm.seen`. Where
Megatron completes the gradients of a step, after the last backward pass, the sums of all sites are reduced
over the ranks that have the same layers, and all take the same average over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dyt.mcore import ranks
from megatron_dyt.mcore.norm_sites import dyt_sites
from megatron_dyt.patching import wrapper

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.distributed import ProcessGroup

# Of the average: what of it is left after a step. With 0.9 it lags behind the stream by ten steps.
DECAY = 0.9


@wrapper
def wrap_allreduce(
    original: Callable[..., None],
    model: list[nn.Module],
    config: TransformerConfig,
    embd_group: ProcessGroup | None = None,
    pp_group: ProcessGroup | None = None,
) -> None:
    """`_allreduce_word_embedding_grads`, which every rank calls in each step, that updates the averages."""
    original(model, config, embd_group, pp_group)
    update(model)


@torch.no_grad()
def update(chunks: Iterable[nn.Module]) -> None:
    """Move each site's `input_rms` towards the rms of what it has seen since the last call.

    A site that has seen nothing, or a value that is not finite, keeps its average. Every rank that has these
    layers must call it, after the last backward pass of a step.

    chunks: the model's chunks on this rank.
    """
    sites = [norm for chunk in chunks for _, norm in dyt_sites(chunk) if norm.input_rms is not None]
    if not sites:
        return
    seen = torch.stack([_of(site.seen) for site in sites])
    if (group := _same_layers()) is not None:
        dist.all_reduce(seen, group=group)
    rms = (seen[:, 0] / seen[:, 1]).sqrt()
    for site, now in zip(sites, rms, strict=True):
        average = _of(site.input_rms)
        moved = DECAY * average + (1 - DECAY) * now
        average.copy_(torch.where(now.isfinite() & (now > 0), moved, average))
        _of(site.seen).zero_()


def _same_layers() -> ProcessGroup | None:
    """The ranks of this one's pipeline stage: all of its tensor, context and data parallel ranks."""
    if ranks.world_size() == 1:
        return None
    from megatron.core import parallel_state

    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def _of(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    return buffer
