"""First-step gradients of models that the wheel has no training script for, with megatron.core alone.

Started like `worker.py`, with a job of the cases of `family_cases.py`. A case without tensor parallelism
runs on every rank with the same data: each rank then has what one process has.
"""

import importlib
import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dyt.cpu import device
from megatron_dyt.patching import replaced
from tests import families
from tests.distributed import record
from tests.distributed.worker import unmarking


def main(job_file: str) -> None:
    """Run every case of a job."""
    warnings.filterwarnings("ignore")
    device.activate([])

    import megatron_dyt

    megatron_dyt.register()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=300))
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    output = Path(job["output"])
    for case in job["cases"]:
        print(f"case {case['name']}", flush=True)
        weights = record.load(output, case["like"]).full("initial") if case["like"] else None
        with replaced(*unmarking(case["unmarked"])):
            result = run(case, weights, output)
        record.save(result, output, case["name"], dist.get_rank())
        dist.barrier()  # The next case may read this one's files.
    dist.destroy_process_group()


def run(case: dict[str, Any], weights: Any, output: Path) -> dict[str, Any]:
    """One forward and backward pass, a checkpoint where asked; returns what this rank has seen."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    # The package has a function of this name, which hides the module.
    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    family, settings = case["family"], case["config"]
    pipeline = settings.get("pipeline_model_parallel_size", 1)
    parallel_state.initialize_model_parallel(settings.get("tensor_model_parallel_size", 1), pipeline)
    model_parallel_cuda_manual_seed(1)
    try:
        config = families.config_for(family, pipeline_dtype=torch.float32, **settings)
        stage = {} if pipeline == 1 else _stage()
        plain = families.build(family, config, **stage).to(torch.cuda.current_device())
        model = DistributedDataParallel(config, DistributedDataParallelConfig(), plain)
        record.set_weights([model], weights)
        if case["load"]:
            state = {"model": plain.sharded_state_dict()}
            plain.load_state_dict(dist_checkpointing.load(state, str(output / case["load"]))["model"])
        if case["save"]:
            directory = output / case["save"]
            directory.mkdir(exist_ok=True)
            dist_checkpointing.save({"model": plain.sharded_state_dict()}, str(directory))
        result: dict[str, Any] = {"initial": record.shards([model])}
        losses = step(family, model)
        finalize.finalize_model_grads([model])
        return result | {"losses": losses, "gradient": record.gradient_shards([model])}
    finally:
        parallel_state.destroy_model_parallel()


def _stage() -> dict[str, bool]:
    from megatron.core import parallel_state

    return {
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
    }


def step(family: str, model: Any) -> list[float]:
    """Forward and backward through all pipeline stages; the loss, on the last one."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward(_data: Any, chunk: Any) -> tuple[Any, Any]:
        return families.forward(family, chunk), loss

    def loss(output: Any) -> tuple[torch.Tensor, dict[str, float]]:
        value = families.loss(family, output)
        return value, {"loss": float(value)}

    found = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=model,
        num_microbatches=1,
        seq_length=families.LENGTH,
        micro_batch_size=families.BATCH,
        forward_only=False,
    )
    return [each["loss"] for each in found]


if __name__ == "__main__":
    main(sys.argv[1])
