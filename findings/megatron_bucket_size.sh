#!/usr/bin/env bash
# megatron-core 0.19.2: the default checkpoint format of the distributed optimizer, dp_reshardable, "allows checkpoint
# resharding only in DP dimension" (distrib_optimizer.py). It stores gradient buckets as they are, a tensor each, and
# their default size is max(40,000,000, 1,000,000 * DP). So from 40 data parallel ranks on a run that goes on with
# another number of ranks has other buckets, and loading its optimizer ends in "Global shape mismatch for loaded ...
# and expected ...", unless --ddp-bucket-size is given the size of before. 0.16.1, 0.17.1 and 0.18.2 have the same line.
# The buckets of a model of six times 25,000,000 parameters (seen with PyTorch 2.11.0, 2026-11-28):
#
#   32 ranks: [50000000, 50000000, 50000000]
#   40 ranks: [50000000, 50000000, 50000000]
#   64 ranks: [75000000, 75000000]
#   128 ranks: [150000000]
#
# Exits with 0 while that is so. Installs into a temporary folder (3 GB); PYTHON chooses the interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uv==0.13.9
"$folder/venv/bin/uv" pip install --quiet --python "$folder/venv/bin/python" torch==2.11.0 megatron-core==0.19.2
cat > "$folder/buckets.py" <<'END'
import sys

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

ranks = int(sys.argv[1])
torch.cuda.current_device = lambda: torch.device("cpu")  # Laying out buckets takes no GPU.
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig

parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
settings = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
model = torch.nn.Sequential(*(torch.nn.Linear(5000, 5000, bias=False) for _ in range(6)))
wrapped = DistributedDataParallel(config, settings, model)
print(f"{ranks} ranks:", [bucket.numel_unpadded for buffer in wrapped.buffers for bucket in buffer.buckets])
END
for ranks in 32 40 64 128; do "$folder/venv/bin/python" -W ignore "$folder/buckets.py" "$ranks" 2>/dev/null; done | tee "$folder/seen"
diff "$folder/seen" - <<'END'
32 ranks: [50000000, 50000000, 50000000]
40 ranks: [50000000, 50000000, 50000000]
64 ranks: [75000000, 75000000]
128 ranks: [150000000]
END
