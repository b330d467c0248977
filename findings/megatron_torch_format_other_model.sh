#!/usr/bin/env bash
# megatron-core 0.19.2: of a checkpoint in the format `torch` any parameters load into any model, none if no name fits,
# with "successfully loaded". What a strict load raises is caught, and the load is repeated without looking at
# names (`load_checkpoint`, a fallback for Transformer Engine's state). Which names did not fit is said by neither: the
# model is wrapped for data parallelism, and the wrapper's `load_state_dict` returns nothing. So a run that goes
# on with another --normalization starts from fresh norms and looks as if it went on. The format `torch_dist` raises for
# what the checkpoint lacks. Seen with PyTorch 2.11.0, 2026-11-30:
#
#   before: 3.0, after: 3.0
#   load_return: None
#   successfully loaded
#
# Exits with 0 while that is so. Installs into a temporary folder (3 GB); PYTHON chooses the interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uv==0.13.9
"$folder/venv/bin/uv" pip install --quiet --python "$folder/venv/bin/python" torch==2.11.0 megatron-core==0.19.2 "numpy<2.4"
cat > "$folder/load.py" <<'END_OF_PYTHON'
import contextlib
import io
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

# Reading a checkpoint takes no GPU, but for a number that is handed to the other ranks.
make = torch.tensor
torch.tensor = lambda *given, device=None, **named: make(*given, **named)
torch.Tensor.cuda = lambda tensor, *_, **__: tensor
torch.cuda.empty_cache = lambda: None
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
from megatron.core import parallel_state
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.transformer import TransformerConfig
from megatron.training import checkpointing, global_vars
from megatron.training.arguments import parse_args

parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
root = Path(sys.argv[1])
sys.argv[1:] = ["--load", str(root), "--ckpt-format", "torch", "--no-load-optim", "--no-load-rng"]
args = parse_args(ignore_unknown_args=True)
args.rank, args.world_size = 0, 1
global_vars.set_args(args)

saved = nn.ModuleDict({"one_norm": nn.LayerNorm(4)})
part = root / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
part.parent.mkdir(parents=True)
torch.save({"model": saved.state_dict(), "iteration": 1, "checkpoint_version": 3.0}, part)
(root / "latest_checkpointed_iteration.txt").write_text("1")

other = nn.ModuleDict({"another_norm": nn.LayerNorm(4)})
nn.init.constant_(other["another_norm"].weight, 3.0)
config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
said = io.StringIO()
with contextlib.redirect_stdout(said):
    checkpointing.load_checkpoint([_BaseDataParallel(config, other)], None, None)
print(f"before: 3.0, after: {other['another_norm'].weight[0].item()}")
print(*[line for line in said.getvalue().splitlines() if line.startswith("load_return")])
print("successfully loaded" if "successfully loaded" in said.getvalue() else "not loaded")
END_OF_PYTHON
PYTHONPATH="" "$folder/venv/bin/python" -W ignore "$folder/load.py" "$folder/checkpoint" 2>"$folder/err" | tee "$folder/seen" || cat "$folder/err"
diff "$folder/seen" - <<'END_OF_TEXT'
before: 3.0, after: 3.0
load_return: None
successfully loaded
END_OF_TEXT
