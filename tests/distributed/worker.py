"""Trains a list of cases with Megatron's own loop and records what every rank has.

The tests start it on CPU processes over gloo. On GPUs, with NCCL, run the same by hand:

    MEGATRON_DYT_DEVICE=cuda torchrun --nproc-per-node 2 tests/distributed/worker.py JOB.json

or let the tests do it: `MEGATRON_DYT_DEVICE=cuda pytest tests/distributed` (with `auto`, the default
outside the tests, CUDA devices are used where there are any). A launch of N processes needs N GPUs.
TF32 is switched off, and the flags of the cases ask for Megatron's local layers: no Transformer
Engine is needed. Not yet run on GPUs: the tolerances are those of fp32 on CPU.

JOB.json is {"output": DIRECTORY, "cases": [...]}, a case as in `cases.py`. One process imports Megatron
once and runs all cases; between two, process groups and Megatron's global state are thrown away. Each
rank writes DIRECTORY/NAME.RANK.pt for a case (see `record.py`).
"""

import gc
import json
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dyt import cpu, pretrain
from megatron_dyt.cpu import device, replacements
from megatron_dyt.errors import UserError
from megatron_dyt.patching import Replacement, replaced, wrapper
from megatron_dyt.training import launch
from tests.distributed import context_parallel, record

TRAINING = "megatron.training.training"
FSDP = "megatron.core.distributed.fsdp.mcore_fsdp_adapter"
MOCK_DATA = "megatron.core.datasets.gpt_dataset"


def main(job_file: str) -> None:
    """Run every case of a job."""
    warnings.filterwarnings("ignore")
    device.activate([])
    # What is imported by now is here to stay: the collection after each case does not look at it.
    gc.freeze()
    torch.backends.cuda.matmul.allow_tf32 = False
    launch.prepare_process()
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    store, rank, world_size = next(iter(dist.rendezvous("env://")))
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    output = Path(job["output"])
    for case in job["cases"]:
        print(f"case {case['name']}", flush=True)
        # A prefix of its own for each case: the groups of the next one have the same names.
        groups = dist.PrefixStore(case["name"], store)
        try:
            result = run(case, output, groups, rank, world_size)
        except UserError as error:
            if not case["may_fail"]:
                raise
            result = {"error": str(error)}
        record.save(result, output, case["name"], rank)


def run(case: dict[str, Any], output: Path, store: Any, rank: int, world_size: int) -> dict[str, Any]:
    """Train one case; returns what this rank has seen."""
    weights = None
    if case["like"] is not None and not case["load"]:
        weights = record.load(output, case["like"]).full("initial")
    # Megatron checks it: 1 with tensor parallelism, anything else with FSDP.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8" if "--use-megatron-fsdp" in case["argv"] else "1"
    start_groups(store, rank, world_size)
    result: dict[str, Any] = {"losses": [], "grad_norms": []}
    rows = [
        *observers(result, case, weights),
        *unmarking(case["unmarked"]),
        *(ABSENCES[name] for name in case["without"]),
        # The CPU runtime has these; on GPUs the local layers need them as well.
        *([] if cpu.is_enabled() else replacements.latent_attention_rows()),
        *(context_parallel.rows() if "--context-parallel-size" in case["argv"] else []),
    ]
    try:
        with replaced(*rows):
            pretrain.main([word.replace("{output}", str(output)) for word in case["argv"]])
    finally:
        forget()
    return result


def start_groups(store: Any, rank: int, world_size: int) -> None:
    """The default process group; Megatron uses one that is there already."""
    if not cpu.is_enabled():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(
        "gloo" if cpu.is_enabled() else "nccl",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=300),
    )


def forget() -> None:
    """Put Megatron's global state and the process groups away."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
    from megatron.training.training import destroy_global_state

    destroy_global_state()
    MTPLossLoggingHelper.tracker = {}  # It has kept a process group.
    if dist.is_initialized():
        dist.destroy_process_group()
    # Models are cycles that hold process groups, and gloo has two threads polling for each of those.
    gc.collect()


# --- what is put between Megatron and the run --------------------------------------------------------


def observers(result: dict[str, Any], case: dict[str, Any], weights: Any) -> list[Replacement]:
    """Replacements that set the weights and the data, and fill `result`."""

    @wrapper
    def around_train(
        train: Callable[..., Any], forward_step: Any, model: Any, optimizer: Any, *rest: Any, **options: Any
    ) -> Any:
        if not case["load"] and not record.is_fsdp(model[0]):
            record.set_weights(model, weights)
            optimizer.reload_model_params()
        result["initial"] = record.shards(model)
        result["logits_before"] = record.logits(model)
        answer = train(forward_step, model, optimizer, *rest, **options)
        result["final"] = record.shards(model)
        result["logits_after"] = record.logits(model)
        return answer

    @wrapper
    def around_fsdp(
        init: Callable[..., Any],
        self: Any,
        config: Any,
        ddp_config: Any,
        module: Any,
        *rest: Any,
        **options: Any,
    ) -> None:
        # Afterwards a rank has parts of the parameters.
        record.set_weights([module], weights)
        init(self, config, ddp_config, module, *rest, **options)

    @wrapper
    def around_step(train_step: Callable[..., Any], *args: Any, **options: Any) -> Any:
        answer = train_step(*args, **options)
        # Other stages than the last have no loss.
        result["losses"] += [float(loss) for name, loss in answer[0].items() if name == "lm loss"]
        result["grad_norms"].append(float(answer[5]))
        return answer

    @wrapper
    def around_finalize(finalize: Callable[..., Any], model: Any, *args: Any, **options: Any) -> Any:
        answer = finalize(model, *args, **options)
        if "gradient" not in result:
            result["gradient"] = record.gradient_shards(model)
        return answer

    return [
        Replacement(FSDP, "FullyShardedDataParallel.__init__", around_fsdp),
        Replacement(TRAINING, "train", around_train),
        Replacement(TRAINING, "train_step", around_step),
        Replacement(TRAINING, "finalize_model_grads", around_finalize),
        Replacement(MOCK_DATA, "MockGPTLowLevelDataset.__getitem__", lambda _original: random_tokens),
        Replacement(MOCK_DATA, "MockGPTLowLevelDataset.size", lambda _original: 1000),
    ]


def unmarking(unmarked: dict[str, list[str]]) -> list[Replacement]:
    """Replacements of `mark_sequence_parallel`, as the norm and the embedding call it, that leave out
    the named parameters."""
    return [
        Replacement(f"megatron_dyt.mcore.{module}", "mark_sequence_parallel", _mark_all_but(names))
        for module, names in unmarked.items()
    ]


def _mark_all_but(names: list[str]) -> Callable[[Any], Any]:
    def mark(module: torch.nn.Module, sequence_parallel: bool) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if name not in names:
                parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    return lambda _original: mark


def _nothing(*_args: Any, **_options: Any) -> None:
    pass


@wrapper
def _without_bucket(mark_shared: Callable[..., None], scale: Any, is_copy: bool) -> None:
    mark_shared(scale, is_copy)
    del scale.scale.shared_embedding


@wrapper
def _count_of_all_ranks(
    roll_tensor: Callable[..., Any], *args: Any, cp_group: Any = None, **options: Any
) -> Any:
    rolled, total = roll_tensor(*args, cp_group=cp_group, **options)
    if cp_group is not None and cp_group.size() > 1:
        dist.all_reduce(total, group=cp_group)
        total = total / cp_group.size()
    return rolled, total


# Special cases that a run can do without, each by the replacement that takes it away.
EMBEDDING = "megatron_dyt.mcore.embedding"
PREDICTION = "megatron.core.transformer.multi_token_prediction"
ABSENCES = {
    # Megatron's own: the loss of multi-token prediction is a mean over each context parallel rank's tokens.
    "mean_per_rank": Replacement(PREDICTION, "roll_tensor", _count_of_all_ranks),
    "averaging": Replacement("megatron_dyt.mcore.norm", "mark_averaged", lambda _original: _nothing),
    "sum_of_copies": Replacement(EMBEDDING, "sum_copies", lambda _original: _nothing),
    "bucket": Replacement(EMBEDDING, "mark_shared", _without_bucket),
}


def random_tokens(dataset: Any, index: int) -> np.ndarray:
    """In place of the counting sequences of Megatron's mock data, which make all batches alike."""
    length = dataset.sequence_lengths[index]
    return np.random.default_rng(1000 + int(index)).integers(dataset.vocab_size, size=length)


if __name__ == "__main__":
    main(sys.argv[1])
