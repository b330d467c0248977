"""Counts what a training step hands to its collectives, for a list of cases (`counting.py JOB.json`).

Each rank writes DIRECTORY/NAME.RANK.json: `calls` of step 2, as [operation, bytes, ranks in the group],
without groups of one rank, and the lengths of its `parameters`.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dyt import pretrain
from megatron_dyt.cpu import device
from megatron_dyt.patching import Replacement, replaced, wrapper
from tests.distributed.worker import forget, start_groups

COUNTED = 2


class Calls(TorchDispatchMode):
    """Every operation of PyTorch's collectives, below all wrappers, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            group = next(
                dist.ProcessGroup.unbox(each) for each in args if isinstance(each, torch.ScriptObject)
            )
            # A gather or a scatter has a whole and a part; what is moved is the whole.
            payload = max(_bytes(each) for each in args)
            if group.size() > 1:
                self.seen.append((function._schema.name, payload, group.size()))
        return function(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def run(case: dict[str, Any], store: Any, rank: int, world_size: int) -> dict[str, Any]:
    """Train one case and count."""
    result: dict[str, Any] = {"calls": [], "parameters": []}
    step = 0

    @wrapper
    def around_step(
        train: Callable[..., Any], forward: Any, data: Any, model: Any, *rest: Any, **options: Any
    ) -> Any:
        nonlocal step
        step += 1
        result["parameters"] = [p.numel() for chunk in model for p in chunk.parameters()]
        if step != COUNTED:
            return train(forward, data, model, *rest, **options)
        with Calls() as calls:
            answer = train(forward, data, model, *rest, **options)
        result["calls"] = calls.seen
        return answer

    start_groups(store, rank, world_size)
    try:
        with replaced(Replacement("megatron.training.training", "train_step", around_step)):
            pretrain.main(case["argv"])
    finally:
        forget()
    return result


def main(job_file: str) -> None:
    warnings.filterwarnings("ignore")
    device.activate([])
    store, rank, world_size = next(iter(dist.rendezvous("env://")))
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    for case in job["cases"]:
        print(f"case {case['name']}", flush=True)
        result = run(case, dist.PrefixStore(case["name"], store), rank, world_size)
        path = Path(job["output"]) / f"{case['name']}.{rank}.json"
        path.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("RANK", "0")
    main(sys.argv[1])
