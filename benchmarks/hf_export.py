"""Peak memory and time of an export: a 7B-shaped DyT checkpoint in bf16 is made, then exported.

    python benchmarks/hf_export.py --scratch DIR [--layers 32]

Needs 27 GB in DIR for all 32 layers; what it writes is removed at the end. Run from the repository's root;
prints the export's peak memory (before: after the imports alone) and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

from megatron_dyt.checkpoints.torch_dist import LazyTensor, write_torch_dist
from megatron_dyt.hf.mapping import LAYERS, megatron_shapes
from megatron_dyt.hf.shape import llama_shape

# VmHWM is of the process after exec; getrusage's peak begins with the parent's.
CHILD = """
import sys
sys.path.insert(0, "benchmarks")
from hf_export import peak_gb
from megatron_dyt.hf.export import main
print(f"peak before: {peak_gb()} GB")
main()
print(f"peak after: {peak_gb()} GB")
"""


def peak_gb() -> float:
    """This process's largest resident memory so far."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9, 2)


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


def make_checkpoint(root: Path, args: Namespace) -> None:
    tensors = {}
    for key, shape in megatron_shapes(llama_shape(args)).items():
        chunks = shape[0] if key.startswith(LAYERS) else 1
        size = (shape[0] // chunks, *shape[1:])
        make = partial(torch.full, size, 0.01, dtype=torch.bfloat16)
        tensors[key] = LazyTensor(shape, torch.bfloat16, [make] * chunks)
    write_torch_dist(root / "iter_0000001", tensors, {"args": args, "iteration": 1})
    (root / "latest_checkpointed_iteration.txt").write_text("1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    root, output = options.scratch / "checkpoint", options.scratch / "export"
    try:
        make_checkpoint(root, llama_7b(options.layers))
        start = time.monotonic()
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CHILD, "--load", str(root), "--output", str(output)],
            check=True,
        )
        report = {
            "layers": options.layers,
            "export_gb": round(sum(path.stat().st_size for path in output.iterdir()) / 1e9, 2),
            "seconds": round(time.monotonic() - start, 1),
            "writing_checkpoint_peak_gb": peak_gb(),
        }
        print(json.dumps(report))
    finally:
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)


if __name__ == "__main__":
    main()
