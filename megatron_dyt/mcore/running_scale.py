"""DyT with a running scale: alpha in units of 1/rms of what the site saw over the last steps.

    alpha = a / sigma        sigma <- decay * sigma + (1 - decay) * rms of the step's inputs

The residual stream of a young model grows tenfold within its first steps, faster than alpha can follow
1/std by gradient: tanh saturates for a while, and later runs in its straight part. RMSNorm divides by what
is there; a running scale divides by what was there a moment ago. `a` is the parameter, and learns as
before; sigma is one number per site, without a gradient, and constant outside of training: there DyT is as
it always was, and an export has no sigma.

Sigma is the same on all ranks that have the site, whatever the layout: after a step the sums of squares of
all its micro-batches are added over the data, context and tensor parallel ranks of the pipeline stage, all
sites of the stage in one all-reduce of fp64. The forward pass has no collective; each step uses the sigma
of the steps before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dyt.mcore import ranks
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.mcore.norm_sites import find_sites

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Of sigma, where a site's input is 0 for many steps: alpha / sigma stays finite.
SMALLEST = 1e-6


def running_norms(chunks: Sequence[nn.Module]) -> list[DyTNorm]:
    """The DyT sites of a model's chunks that have a running scale, in the order of the model."""
    return [site.module for site in find_sites(list(chunks)) if site.module.sigma is not None]


@torch.no_grad()
def update(norms: Sequence[DyTNorm], group: ProcessGroup | None = None) -> None:
    """Take what the sites have seen since the last call into their sigma. A collective over `group`.

    A site that saw nothing, or what is not finite, keeps its sigma.

    Args:
        norms: the sites, the same in the same order on all ranks of the group.
        group: the ranks that have these sites (None: all).
    """
    device = norms[0].alpha.device
    seen = torch.stack([_taken(norm, device) for norm in norms])  # (sites, 2)
    if ranks.world_size(group) > 1:
        dist.all_reduce(seen, group=group)
    rms = (seen[:, 0] / seen[:, 1]).sqrt().float()
    sigmas: list[Any] = [norm.sigma for norm in norms]
    sigma = torch.cat(sigmas)
    decay = torch.tensor([norm.decay for norm in norms], device=device)
    new = torch.where(rms.isfinite(), decay * sigma + (1 - decay) * rms, sigma).clamp(min=SMALLEST)
    for old, value in zip(sigmas, new, strict=True):
        old.copy_(value)


def _taken(norm: DyTNorm, device: torch.device) -> Tensor:
    """What a site has seen, (2,) of fp64, which then begins at 0 again."""
    if norm.seen is None:
        return torch.zeros(2, dtype=torch.float64, device=device)
    seen = norm.seen.clone()
    norm.seen.zero_()
    return seen


def wrap_setup[**P](
    original: Callable[P, tuple[list[nn.Module], Any, object]],
) -> Callable[P, tuple[list[nn.Module], Any, object]]:
    """`training.setup_model_and_optimizer` with an optimizer whose step updates the running scales."""

    @functools.wraps(original)
    def setup_model_and_optimizer(*args: P.args, **kwargs: P.kwargs) -> tuple[list[nn.Module], Any, object]:
        result = original(*args, **kwargs)
        chunks, optimizer = result[:2]
        if optimizer is not None:
            install(chunks, optimizer)
        return result

    return setup_model_and_optimizer


def install(chunks: Sequence[nn.Module], optimizer: Any) -> None:
    """Have each step of a `MegatronOptimizer` update the running scales of the model, if it has any."""
    norms = running_norms(chunks)
    if not norms:
        return
    from megatron.core import parallel_state as mpu

    # Of the pipeline stage: without sequence parallelism its tensor parallel ranks count the same twice,
    # which leaves the average as it is.
    group = mpu.get_tensor_and_data_parallel_group(with_context_parallel=True)
    step: Callable[[], Any] = optimizer.step

    @functools.wraps(step)
    def step_and_update() -> Any:
        result = step()
        update(norms, group)
        return result

    optimizer.step = step_and_update
