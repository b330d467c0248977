"""How many tensor-parallel ranks hold a model for evaluation; data parallelism takes the rest.

A torch_dist checkpoint loads at any layout, so the one of training does not matter. Pipeline stages
would leave all but one of them waiting, because an evaluation has no micro-batches to fill them.
"""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

import torch

from megatron_dyt import cpu
from megatron_dyt.errors import UserError
from megatron_dyt.llama import query_groups

# Of a GPU's memory; the rest is for activations and logits.
_FOR_WEIGHTS = 0.7


def choose(
    saved: Namespace, directory: Path, tensor_parallel: int | None = None, pipeline_parallel: int = 1
) -> int:
    """Tensor-parallel ranks for the model of `saved`, the arguments in the checkpoint `directory`.

    `tensor_parallel` is what the user asks for; None takes the fewest whose memory holds the weights.
    Raises `UserError` for what the model or the number of processes does not allow.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if pipeline_parallel != 1:
        tp = tensor_parallel or _fewest(saved, directory, processes)
        raise UserError(
            f"pipeline parallelism of {pipeline_parallel} was asked for; an evaluation has one pipeline "
            f"stage, whatever training had. Give --tensor-model-parallel-size {tp} instead"
        )
    if tensor_parallel is None:
        return _fewest(saved, directory, processes)
    if processes % tensor_parallel:
        raise UserError(
            f"--tensor-model-parallel-size {tensor_parallel} does not divide the {processes} processes; "
            f"allowed here: {_listed(saved, processes)}. Start a multiple of it with torchrun "
            f"--nproc-per-node"
        )
    if not _divides_model(saved, tensor_parallel):
        raise UserError(
            f"--tensor-model-parallel-size {tensor_parallel} does not divide the model "
            f"({saved.num_attention_heads} attention heads{_in_groups(saved)}, {saved.padded_vocab_size} "
            f"vocabulary rows); "
            f"allowed with {processes} processes: {_listed(saved, processes)}"
        )
    return tensor_parallel


def _fewest(saved: Namespace, directory: Path, processes: int) -> int:
    allowed = _allowed(saved, processes)
    if cpu.is_enabled() or not torch.cuda.is_available():
        return 1
    memory = torch.cuda.get_device_properties(0).total_memory
    weights = weight_bytes(saved, directory)
    for tp in allowed:
        if weights / tp <= _FOR_WEIGHTS * memory:
            return tp
    raise UserError(
        f"the model's weights are {weights / 1e9:.1f} GB, too much for {processes} processes with "
        f"{memory / 1e9:.0f} GB each (tensor parallelism of {allowed[-1]} at most). Start more processes "
        f"with torchrun --nproc-per-node"
    )


def weight_bytes(saved: Namespace, directory: Path) -> int:
    """Bytes of the model's weights in the precision that the run computes in."""
    from megatron_dyt.checkpoints.torch_dist import TorchDistReader

    shapes = [shape for shape, _dtype in TorchDistReader(directory).tensors.values()]
    halved = getattr(saved, "bf16", False) or getattr(saved, "fp16", False)
    return sum(shape.numel() for shape in shapes) * (2 if halved else 4)


def _allowed(saved: Namespace, processes: int) -> list[int]:
    return [tp for tp in range(1, processes + 1) if processes % tp == 0 and _divides_model(saved, tp)]


def _listed(saved: Namespace, processes: int) -> str:
    return ", ".join(map(str, _allowed(saved, processes)))


def _divides_model(saved: Namespace, tp: int) -> bool:
    groups = query_groups(saved)
    # As Megatron's TransformerConfig: fewer groups than ranks are on several ranks each.
    if groups % tp and tp % groups:
        return False
    return saved.num_attention_heads % tp == 0 and saved.padded_vocab_size % tp == 0


def _in_groups(saved: Namespace) -> str:
    groups = query_groups(saved)
    return "" if groups == saved.num_attention_heads else f" in {groups} groups"
