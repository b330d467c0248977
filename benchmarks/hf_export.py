"""Peak memory and speed of an export and an import of a 7B-shaped DyT model in bf16.

    python benchmarks/hf_export.py --scratch DIR [--layers 32] [--tp 2] [--pp 2]

The checkpoint that is exported is one of TP x PP ranks; the export is imported. Needs 27 GB in DIR for all 32
layers; what it writes is removed at the end. Prints one JSON line.
"""

import argparse
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import cast

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_dyt.hf.mapping import EMBEDDING, FC1, FC2, FINAL_NORM, OUTPUT, PROJ, QKV, megatron_sizes
from megatron_dyt.hf.model import Model

# VmHWM is of the process after exec; getrusage's peak begins with the parent's.
CHILD = """
import json
import os
import sys
import time
from pathlib import Path
import megatron_dyt.hf.export
import megatron_dyt.hf.import_model
from megatron_dyt import cli

def peak():
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9, 2)

start, before = time.monotonic(), sum(os.times()[:2])
cli.main.main(sys.argv[1:], standalone_mode=False)
seconds, cpu = round(time.monotonic() - start, 1), round(sum(os.times()[:2]) - before, 1)
print(json.dumps({"peak_gb": peak(), "seconds": seconds, "cpu_seconds": cpu}))
"""


def llama_7b(layers: int) -> Namespace:
    """What Megatron stores of the paper's 7B."""
    return Namespace(
        **{"num_layers": layers, "hidden_size": 4096, "ffn_hidden_size": 11008, "num_attention_heads": 32},
        **{"group_query_attention": False, "kv_channels": 128, "padded_vocab_size": 32000},
        **{"max_position_embeddings": 4096, "untie_embeddings_and_output_weights": True},
        **{"add_bias_linear": False, "norm_epsilon": 1e-5, "rotary_base": 10000, "init_method_std": 0.02},
        **{"swiglu": True, "normalization": "DyT", "embedding_scale": "sqrt", "dyt_preset": "paper"},
        **{f"dyt_alpha_init_{role}": None for role in ("attn", "ffn", "final", "qk")},
        **{f"dyt_{name}": None for name in ("bias", "function", "weight_init", "backend")},
        **{"dyt_embedding_scale": None, "tokenizer_type": "NullTokenizer", "tokenizer_model": None},
    )


# The dimension that tensor parallel ranks divide, and in how many parts each of them stores what it has.
SPLIT = {EMBEDDING: (0, 1), QKV: (0, 1), PROJ: (1, 1), FC1: (0, 2), FC2: (1, 1), OUTPUT: (0, 1)}


def make_checkpoint(root: Path, args: Namespace, tp: int, pp: int) -> None:
    """As TP x PP ranks save it: a file of each, and each layer's tensors in chunks of a rank."""
    stored: dict[str, TensorStorageMetadata] = {}
    plans = [SavePlan([]) for _ in range(tp * pp)]
    dtype = TensorProperties(dtype=torch.bfloat16)
    for row, sizes in megatron_sizes(Model.from_megatron(args)).items():
        dimension, halves = SPLIT.get(row, (0, 0))
        for name, size in sizes.items():
            key, parts = row.replace(".N.", ".") + name, halves * tp or 1
            layers = args.num_layers if ".N." in row else 1
            whole = torch.Size((layers, *size) if ".N." in row else size)
            chunk = [1, *size] if ".N." in row else list(size)
            axis = dimension + len(chunk) - len(size)
            chunk[axis] //= parts
            chunks = []
            for layer, part in product(range(layers), range(parts)):
                offsets = [0] * len(chunk)
                offsets[0] = layer if ".N." in row else 0
                offsets[axis] += part * chunk[axis]
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(chunk)))
                index = MetadataIndex(key, chunks[-1].offsets, len(chunks) - 1)
                data = TensorWriteData(chunks[-1], dtype, whole)
                stage = layer * pp // layers if ".N." in row else (pp - 1) * (row in (FINAL_NORM, OUTPUT))
                item = WriteItem(index, WriteItemType.SHARD, tensor_data=data)
                plans[stage * tp + part % tp].items.append(item)
            stored[key] = TensorStorageMetadata(dtype, whole, chunks)
    write(root / "iter_0000001", plans, stored)
    torch.save({"args": args, "iteration": 1}, root / "iter_0000001" / "common.pt")
    (root / "iter_0000001" / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    (root / "latest_checkpointed_iteration.txt").write_text("1")


def write(directory: Path, plans: list[SavePlan], stored: dict[str, TensorStorageMetadata]) -> None:
    directory.mkdir(parents=True)
    writer = FileSystemWriter(directory, sync_files=False)
    writer.set_up_storage_writer(is_coordinator=True)
    plans = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
    results = [writer.write_data(plan, cast(SavePlanner, Constant())).wait() for plan in plans]
    writer.finish(Metadata(dict(stored)), results)


class Constant:
    """The call of a SavePlanner that writing needs."""

    def resolve_data(self, item: WriteItem) -> torch.Tensor:
        assert item.tensor_data is not None
        return torch.full(item.tensor_data.chunk.sizes, 0.01, dtype=torch.bfloat16)


def measured(words: list[str], output: Path) -> dict[str, float]:
    """A command's peak memory and time in a process of its own, and what it wrote per second."""
    child = [sys.executable, "-W", "ignore", "-c", CHILD, *words]
    found: dict[str, float] = json.loads(subprocess.check_output(child, text=True).splitlines()[-1])
    gb = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e9
    return found | {"gb": round(gb, 2), "mb_per_second": round(1000 * gb / found["seconds"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    options = parser.parse_args()
    root, output, back = (options.scratch / name for name in ("checkpoint", "export", "import"))
    try:
        make_checkpoint(root, llama_7b(options.layers), options.tp, options.pp)
        report = {"layers": options.layers, "tp": options.tp, "pp": options.pp}
        report["export"] = measured(["export", "--load", str(root), "--output", str(output)], output)
        shutil.rmtree(root)
        report["import"] = measured(["import", "--load", str(output), "--save", str(back)], back)
        print(json.dumps(report))
    finally:
        for path in (root, output, back):
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
