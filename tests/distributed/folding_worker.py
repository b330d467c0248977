"""`fold_` on a rank of two: prints the loss before and after, without and with sequence parallelism.

Started by `plain.launch`.
"""

from __future__ import annotations

import json
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_dyt import cpu
from megatron_dyt.mcore.folding import fold_
from megatron_dyt.mcore.norm import dyt_sites
from tests import families


def main() -> None:
    warnings.filterwarnings("ignore")
    cpu.enable()

    import megatron_dyt

    megatron_dyt.register()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    parallel_state.initialize_model_parallel(2)
    model_parallel_cuda_manual_seed(1)
    for sequence_parallel in (False, True):
        for biases in (False, True):
            result = compare(sequence_parallel, biases)
            print("RESULT", json.dumps(result), flush=True)
    dist.destroy_process_group()


@torch.no_grad()
def compare(sequence_parallel: bool, biases: bool) -> dict[str, float]:
    """The losses of a GPT with all DyT parameters different, and how many norms were folded."""
    config = families.config_for(
        "gpt", tensor_model_parallel_size=2, sequence_parallel=sequence_parallel, add_bias_linear=biases
    )
    model = families.build("gpt", config).eval()
    generator = torch.Generator().manual_seed(5)  # the same on both ranks
    for _, norm in dyt_sites(model):
        for parameter in (norm.weight, norm.bias):
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    plain = families.loss_of("gpt", model).item()
    folded = len(fold_(model).folded)
    return {"plain": plain, "folded": families.loss_of("gpt", model).item(), "norms": folded}


if __name__ == "__main__":
    main()
