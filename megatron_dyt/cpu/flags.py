"""Megatron's flags as the CPU needs them: changed before validation, and reported in one line."""

import logging
import os
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dyt.errors import UserError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Flag:
    """`args.name` becomes `value`, unless it has a value in `fine`; `shown` is how to write it.

    With `only_with`, the name of another flag, it matters when that one is given only.
    """

    name: str
    value: Any
    shown: str
    fine: tuple[Any, ...] = ()
    only_with: str = ""

    def works(self, args: Namespace) -> bool:
        if self.only_with and not getattr(args, self.only_with, None):
            return True
        given = getattr(args, self.name)
        return given == self.value or given in self.fine


CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"

# A flag that the installed Megatron does not have is skipped: there is nothing to switch off.
FLAGS = (
    Flag("distributed_backend", "gloo", "--distributed-backend gloo"),
    Flag("transformer_impl", "local", "--transformer-impl local"),
    Flag("use_cpu_initialization", True, "--use-cpu-initialization"),
    Flag("gradient_accumulation_fusion", False, "--no-gradient-accumulation-fusion"),
    Flag("masked_softmax_fusion", False, "--no-masked-softmax-fusion"),
    Flag("apply_rope_fusion", False, "--no-rope-fusion"),
    Flag("no_persist_layer_norm", True, "--no-persist-layer-norm"),
    Flag("cross_entropy_fusion_impl", "native", "--cross-entropy-fusion-impl native"),
    Flag("cuda_graph_impl", "none", "--cuda-graph-impl none", fine=(None,)),
    Flag("tp_comm_overlap", False, "no --tp-comm-overlap"),
    Flag("async_strategy", "mcore", "--async-strategy mcore", only_with="async_save"),
    Flag("moe_grouped_gemm", False, "no --moe-grouped-gemm"),
    Flag("moe_permute_fusion", False, "no --moe-permute-fusion"),
    Flag(
        "gradient_reduce_div_fusion",
        False,
        "--no-gradient-reduce-div-fusion",
        only_with="use_megatron_fsdp",
    ),
)

# Features that change the numbers, so they are refused and not switched off.
_UNAVAILABLE = {
    "fp8": "--fp8-format",
    "fp4": "--fp4-format",
    "use_torch_fsdp2": "--use-torch-fsdp2",
}


def adjust(args: Namespace) -> list[str]:
    """Change in `args` what cannot work on CPU, print it on rank 0, and return how it is written.

    Raises `UserError` for a flag that asks for something which the CPU cannot do at all.
    """
    for name, shown in _UNAVAILABLE.items():
        if getattr(args, name, None):
            raise UserError(f"{shown} was given, but it needs a GPU; on CPU use --bf16 or fp32 (no flag)")
    if getattr(args, "context_parallel_size", 1) > 1:
        raise UserError(
            f"--context-parallel-size {args.context_parallel_size} needs Transformer Engine's "
            "attention, which needs a GPU; on CPU leave it at 1 and use tensor, pipeline or data "
            "parallelism"
        )
    fsdp = getattr(args, "use_megatron_fsdp", False)
    if fsdp and getattr(args, "save", None):
        raise UserError(
            "--save was given with --use-megatron-fsdp, whose checkpoints cannot be written on CPU: a rank "
            "waits for optimizer state that others do not have with PyTorch's Adam. Leave out one of them"
        )
    changed = []
    for flag in FLAGS:
        if hasattr(args, flag.name) and not flag.works(args):
            setattr(args, flag.name, flag.value)
            changed.append(flag.shown)
    # Tensor parallelism wants 1, Megatron-FSDP anything else (8 is CUDA's default); here it has no meaning.
    os.environ[CONNECTIONS] = "8" if fsdp else "1"
    threads = torch.get_num_threads()
    _log.info(f"CPU runtime ({threads} threads per process) set {' '.join(changed) or 'no flags'}")
    return changed
