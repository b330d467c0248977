"""How many tensor-parallel ranks hold a model for evaluation; data parallelism takes the rest.

A torch_dist checkpoint loads at any layout, so the one of training does not matter. Pipeline stages
would leave all but one of them waiting, because an evaluation has no micro-batches to fill them.
"""

import os
from argparse import Namespace
from pathlib import Path

import torch

from megatron_dyt import cpu
from megatron_dyt.errors import UserError
from megatron_dyt.llama import query_groups

# Of a GPU's memory; the rest is for activations and logits.
_FOR_WEIGHTS = 0.7


def choose(saved: Namespace, directory: Path, tensor_parallel: int | None = None) -> int:
    """Tensor-parallel ranks for the model of `saved`, the arguments in the checkpoint `directory`.

    `tensor_parallel` is what the user asks for; None takes the fewest whose memory holds the weights.
    Raises `UserError` for what the model or the number of processes does not allow.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    allowed = [tp for tp in range(1, processes + 1) if processes % tp == 0 and _divides_model(saved, tp)]
    tp = tensor_parallel or _fewest(saved, directory, allowed, processes)
    listed = ", ".join(map(str, allowed))
    if processes % tp:
        raise UserError(
            f"--tensor-model-parallel-size {tp} does not divide the {processes} processes; allowed here: "
            f"{listed}. Start a multiple of it with torchrun --nproc-per-node"
        )
    if tp not in allowed:
        heads, groups = saved.num_attention_heads, query_groups(saved)
        in_groups = "" if groups == heads else f" in {groups} groups"
        raise UserError(
            f"--tensor-model-parallel-size {tp} does not divide the model ({heads} attention heads"
            f"{in_groups}, {saved.padded_vocab_size} vocabulary rows); allowed with {processes} processes: "
            f"{listed}"
        )
    return tp


def _fewest(saved: Namespace, directory: Path, allowed: list[int], processes: int) -> int:
    """Of `allowed` the smallest size whose GPUs hold the weights; 1 without GPUs."""
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


def _divides_model(saved: Namespace, tp: int) -> bool:
    groups = query_groups(saved)
    # As Megatron's TransformerConfig: fewer groups than ranks are on several ranks each.
    if groups % tp and tp % groups:
        return False
    return saved.num_attention_heads % tp == 0 and saved.padded_vocab_size % tp == 0
