"""Norms that a DyT model keeps on purpose, in one table; each tells about itself once.

They stand inside a mixer, not in front of a layer: replacing them would be another architecture or
another kernel, not DyT in the place of a norm.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn


class Kept(NamedTuple):
    """One norm that stays: attribute `slot` of Megatron's class `owner`."""

    owner: str
    slot: str
    what: str
    why: str

    @property
    def in_spec(self) -> tuple[str, str]:
        """The dataclass and the field that hold it in a layer spec, where a spec has it."""
        return f"{self.owner}Submodules", self.slot


KEPT = (
    Kept(
        "MambaMixer",
        "norm",
        "the gated RMSNorm inside Mamba mixers",
        "it is computed inside Mamba's fused scan kernel",
    ),
    Kept(
        "GatedDeltaNet",
        "out_norm",
        "the gated RMSNorm on the output of each Gated DeltaNet head",
        "the state that it normalizes grows with the sequence, so a fixed alpha would not fit it",
    ),
    Kept(
        "DSAIndexer",
        "k_norm",
        "the LayerNorm on the keys of the sparse-attention indexer",
        "it only ranks tokens for selection; Megatron makes it a LayerNorm whatever the model's norm is",
    ),
)

_said: set[str] = set()


def in_slot(spec_class: str, field: str) -> Kept | None:
    """What stays in a field of a spec's dataclass, or None."""
    return next((kept for kept in KEPT if kept.in_spec == (spec_class, field)), None)


def in_module(parent: nn.Module, attribute: str) -> Kept | None:
    """What stays in an attribute of a built module (of a subclass too), or None."""
    owners = {base.__name__ for base in type(parent).__mro__}
    return next((kept for kept in KEPT if kept.owner in owners and kept.slot == attribute), None)


def tell(kept: Kept) -> None:
    """Say that this norm stays, and why."""
    say_once(f"DyT: {kept.what} ({kept.owner}.{kept.slot}) stays as it is: {kept.why}.")


def say_once(line: str) -> None:
    """Print a line, once in a process and on one rank of each pipeline stage."""
    if line not in _said and _speaks():
        print(line, flush=True)
    _said.add(line)


def _speaks() -> bool:
    """Whether this rank is the first of its tensor and data parallel groups."""
    if not (dist.is_available() and dist.is_initialized()):
        return True
    from megatron.core import parallel_state as mpu

    if not mpu.model_parallel_is_initialized():
        return dist.get_rank() == 0
    first = mpu.get_tensor_model_parallel_rank() == 0
    return first and mpu.get_data_parallel_rank(with_context_parallel=True) == 0


class KeptRMSNorm:
    """A norm's builder in a spec that builds Megatron's RMSNorm in a DyT model.

    `params` of its ModuleSpec: `norm`, the class that the slot held.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, *, norm: Any) -> Any:
        """The norm, built for a copy of the config whose normalization is RMSNorm."""
        config = copy.copy(config)
        config.normalization = "RMSNorm"
        return norm(config=config, hidden_size=hidden_size, eps=eps)
