#!/usr/bin/env bash
# Whether this machine's image has what training needs: prints the versions, runs DyT's kernels against the
# reference, and a small plan's dry run. Needs one GPU.
set -euo pipefail

python3 - <<'PYTHON'
import apex
import torch
import transformer_engine.pytorch as te
import triton

import megatron_dyt
from megatron_dyt.ops import dyt
from megatron_dyt.ops.reference import dyt_forward

megatron_dyt.register()
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}, on {torch.cuda.get_device_name()}")
print(f"transformer_engine {te.__name__}, apex {apex.__name__}: imported")
x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
alpha = torch.full((1,), 0.8, device="cuda", dtype=torch.bfloat16)
weight = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
difference = (dyt(x, alpha, weight, backend="triton").float() - dyt_forward(x, alpha, weight, None).float()).abs().max()
print(f"DyT kernel against the reference: largest difference {difference:.2g}")
assert difference <= 0.05, "the kernel is wrong on this machine"
PYTHON
python3 -m megatron_dyt plan --model 7b --nodes 64 --dry-run
