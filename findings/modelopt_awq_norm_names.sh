#!/usr/bin/env bash
# NVIDIA ModelOpt: AWQ's scale of the channels (pre_quant_scale) is multiplied into the weight of the norm in front of the linear
# layers, but only where the norm's class has "LayerNorm" or "RMSNorm" in its name. The same class under another name
# is no norm to it: the export is written without a word, and each linear layer behind the norm keeps a pre_quant_scale of its own,
# which whoever loads it has to apply. hf_quant_config.json says the same of both ("pre_quant_scale": true).
# A LLaMA of one layer and its twin whose norms are a subclass of LlamaRMSNorm called Scaled (seen with
# transformers 5.14.1, torch 2.13.0, 2026-11-30):
#
#   0.47.0 LlamaRMSNorm: scales beside down_proj, o_proj
#   0.47.0 Scaled: scales beside down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj
#
# Exits with 0 while that is so. Installs into a temporary folder; PYTHON chooses the interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5 transformers==5.14.1 accelerate==1.15.0 nvidia-modelopt==0.47.0 \
    requests==2.32.5  # which it imports, and does not ask pip for
cat > "$folder/try.py" <<'END'
import sys
from pathlib import Path

import modelopt
import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class Scaled(LlamaRMSNorm):
    pass


def names_of_scales(norm, folder):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4)
    model = LlamaForCausalLM(config).eval()
    model.config.architectures = ["LlamaForCausalLM"]
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = norm
    ids = torch.randint(0, 256, (4, 32))
    model = mtq.quantize(model, mtq.INT4_AWQ_CFG, lambda each: each(ids))
    export_hf_checkpoint(model, export_dir=folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sorted(key.split(".")[-2] for key in file.keys() if key.endswith("pre_quant_scale"))


found = {norm: names_of_scales(norm, Path(sys.argv[1]) / norm.__name__) for norm in (LlamaRMSNorm, Scaled)}
for norm, names in found.items():
    print(f"{modelopt.__version__} {norm.__name__}: scales beside {', '.join(names)}")
few = ["down_proj", "o_proj"]
raise SystemExit(found != {LlamaRMSNorm: few, Scaled: sorted([*few, "gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"])})
END
"$folder/venv/bin/python" "$folder/try.py" "$folder" 2>&1 | { grep '^0\.' || true; }
