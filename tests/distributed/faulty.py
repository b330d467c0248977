"""A training run in which one pipeline stage meets a bad gradient, and later the other a bad alpha."""

import math
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_dyt import cpu, pretrain
from megatron_dyt.errors import run_main
from megatron_dyt.patching import Patches, Replacement


def harmful(finalize: Callable[..., Any]) -> Callable[..., Any]:
    """`finalize_model_grads`, after which rank 1 has a NaN in step 2, and rank 0 a dying alpha in step 3."""
    rank, step = int(os.environ["RANK"]), 0

    def finish(model: Any, *args: Any, **options: Any) -> Any:
        nonlocal step
        step += 1
        answer = finalize(model, *args, **options)
        site = model[0].module.decoder.layers[0].input_layernorm
        if (step, rank) == (2, 1):
            site.weight.main_grad[0] = math.nan
        if (step, rank) == (3, 0):
            site.alpha.data.fill_(1e-5)
            site.alpha.main_grad.fill_(1.0)
        return answer

    return finish


def main() -> None:
    cpu.enable()
    Patches().apply([Replacement("megatron.training.training", "finalize_model_grads", harmful)])
    pretrain.main(["--device", "cpu", *sys.argv[1:]])


if __name__ == "__main__":
    run_main(main)
