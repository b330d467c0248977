#!/usr/bin/env bash
# megatron-core 0.19.2 with emerging-optimizers 0.3.0: --optimizer muon, added to a run of AdamW, makes the matrices' steps
# about four times as large. The mode that --muon-scale-mode has by default, spectral, is described as the one to which AdamW's
# learning rates carry over; that takes a factor of 0.2 (emerging-optimizers' docstring, arXiv 2502.16982), and Megatron's
# --muon-extra-scale-factor is 1. Below, the root mean square of a step in learning rates, for gradients of noise, betas of
# 0.9 and 0.95, momentum 0.9, no weight decay. A small LLaMA with RMSNorm loses 0.25 nats by it, each factor at its best
# rate (docs/muon.md). Seen with PyTorch 2.11.0, 2026-11-30:
#
#   Megatron's defaults: spectral, 1.0
#   64 x 192: Muon 1.0, AdamW 0.2
#   768 x 192: Muon 1.0, AdamW 0.2
#
# Exits with 0 while that is so. Installs into a temporary folder (3 GB); PYTHON chooses the interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uv==0.13.9
"$folder/venv/bin/uv" pip install --quiet --python "$folder/venv/bin/python" torch==2.11.0 megatron-core==0.19.2 \
    emerging-optimizers==0.3.0 "numpy<2.4"
cat > "$folder/step.py" <<'END_OF_PYTHON'
import sys

import torch
from emerging_optimizers.orthogonalized_optimizers import Muon
from megatron.training.arguments import parse_args

sys.argv[1:] = []
args = parse_args(ignore_unknown_args=True)
print(f"Megatron's defaults: {args.muon_scale_mode}, {args.muon_extra_scale_factor}")
muon = {"scale_mode": args.muon_scale_mode, "extra_scale_factor": args.muon_extra_scale_factor}


def step_size(rows, columns, make):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(rows, columns))
    optimizer = make([weight])
    for _ in range(60):
        before = weight.detach().clone()
        weight.grad = torch.randn(rows, columns)
        optimizer.step()
    return (weight.detach() - before).square().mean().sqrt().item()


for shape in ((64, 192), (768, 192)):
    ours = step_size(*shape, lambda it: Muon(it, lr=1.0, momentum=args.muon_momentum, weight_decay=0.0, **muon))
    adam = step_size(*shape, lambda it: torch.optim.AdamW(it, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0))
    print(f"{shape[0]} x {shape[1]}: Muon {ours:.1f}, AdamW {adam:.1f}")
END_OF_PYTHON
PYTHONPATH="" "$folder/venv/bin/python" -W ignore "$folder/step.py" 2>"$folder/err" | tee "$folder/seen" || cat "$folder/err"
diff "$folder/seen" - <<'END_OF_TEXT'
Megatron's defaults: spectral, 1.0
64 x 192: Muon 1.0, AdamW 0.2
768 x 192: Muon 1.0, AdamW 0.2
END_OF_TEXT
