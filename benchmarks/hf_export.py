"""Peak memory and speed of an export: a 7B-shaped DyT checkpoint in bf16 is made, then exported.

    python benchmarks/hf_export.py --scratch DIR [--layers 32]

Needs 27 GB in DIR for all 32 layers; what it writes is removed at the end. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

from megatron_dyt.checkpoints.torch_dist import LazyTensor, write_torch_dist
from megatron_dyt.hf.mapping import megatron_sizes
from megatron_dyt.hf.model import Model

# VmHWM is of the process after exec; getrusage's peak begins with the parent's.
CHILD = """
import json
import sys
import time
from pathlib import Path
import megatron_dyt.hf.export
from megatron_dyt import cli

def peak():
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9, 2)

before, start = peak(), time.monotonic()
cli.main.main(sys.argv[1:], standalone_mode=False)
seconds = round(time.monotonic() - start, 1)
print(json.dumps({"peak_gb": peak(), "after_imports_gb": before, "seconds": seconds}))
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


def make_checkpoint(root: Path, args: Namespace) -> None:
    tensors = {}
    for row, sizes in megatron_sizes(Model.from_megatron(args)).items():
        for name, size in sizes.items():
            layers, stacked = (args.num_layers, (1, *size)) if ".N." in row else (1, size)
            make = partial(torch.full, stacked, 0.01, dtype=torch.bfloat16)
            whole = (layers * stacked[0], *stacked[1:])
            tensors[row.replace(".N.", ".") + name] = LazyTensor(whole, torch.bfloat16, [make] * layers)
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
        words = ["export", "--load", str(root), "--output", str(output)]
        child = [sys.executable, "-W", "ignore", "-c", CHILD, *words]
        measured = json.loads(subprocess.check_output(child, text=True).splitlines()[-1])
        size = sum(path.stat().st_size for path in output.iterdir()) / 1e9
        facts = {"layers": options.layers, "export_gb": round(size, 2)}
        print(json.dumps(facts | measured | {"mb_per_second": round(1000 * size / measured["seconds"])}))
    finally:
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)


if __name__ == "__main__":
    main()
