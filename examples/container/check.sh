#!/usr/bin/env bash
# Whether this machine's image has what training needs: prints the versions, opens Transformer Engine's library with all
# symbols bound, runs DyT's kernels against the reference and one Transformer Engine layer with DyT forward and backward,
# and a small plan's dry run. Needs one GPU.
set -euo pipefail

# A library binds a symbol when it is first called: without this, one that cuBLAS or cuDNN lacks ends a run days later.
# torch first, which loads libraries that the other needs.
LD_BIND_NOW=1 python3 -c 'import torch, transformer_engine.pytorch' ||
  { echo "check: error: Transformer Engine's library does not go with these CUDA libraries (see above, and docs/integration.md)." >&2; exit 1; }

python3 - <<'PYTHON'
import importlib.metadata
import os

import torch
import triton
from torch.nn.functional import silu

import megatron_dyt
from megatron_dyt.mcore.norm_sites import dyt_sites
from megatron_dyt.ops import dyt
from megatron_dyt.ops.reference import dyt_forward
from megatron_dyt.training import gpu_needs

megatron_dyt.register()
te = importlib.metadata.version("transformer-engine")
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}, TE {te}, {torch.cuda.get_device_name()}")
print("apex's fused gradients:", "without" if gpu_needs.fusion_flags() else "imported")

x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
alpha = torch.full((1,), 0.8, device="cuda", dtype=torch.bfloat16)
weight = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
difference = (dyt(x, alpha, weight, backend="triton").float() - dyt_forward(x, alpha, weight, None).float()).abs().max()
print(f"DyT kernel against the reference: largest difference {difference:.2g}")
assert difference <= 0.05, "the kernel is wrong on this machine"

os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": os.environ.get("MASTER_PORT", "29512")}
torch.distributed.init_process_group("nccl", rank=0, world_size=1)
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(1)
config = TransformerConfig(
    **{"num_layers": 1, "hidden_size": 1024, "num_attention_heads": 8, "ffn_hidden_size": 4096, "normalization": "DyT"},
    **{"gated_linear_unit": True, "activation_func": silu, "add_bias_linear": False, "bf16": True},
    **{"params_dtype": torch.bfloat16, "attention_dropout": 0.0, "hidden_dropout": 0.0},
)
layer = build_module(get_gpt_layer_with_transformer_engine_spec(), config=config).cuda()
sites = [name for name, _ in dyt_sites(layer)]
assert sites == ["input_layernorm", "pre_mlp_layernorm"], sites
hidden = torch.randn(256, 2, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
output = layer(hidden, attention_mask=None)[0]
output.float().square().mean().backward()
for name, parameter in layer.named_parameters():
    assert parameter.grad is not None, name
    assert parameter.grad.isfinite().all(), name
print(f"a Transformer Engine layer with DyT: forward and backward, {type(layer.self_attention.linear_qkv).__name__}")
torch.distributed.destroy_process_group()
PYTHON
python3 -m megatron_dyt plan --model 7b --nodes 64 --dry-run
