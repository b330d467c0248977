#!/usr/bin/env bash
# transformers 5.24.0: Trainer leaves norms out of weight decay by class, for nn.LayerNorm alone, and otherwise by five patterns of
# names ("layernorm", "rmsnorm", a module that is called norm or ends in _norm, "bias"). TrainingArguments says of weight_decay
# "automatically excluded from bias and LayerNorm parameters". A norm of another class and name is decayed like
# a matrix, towards an output of zero, without a word: the last RMSNorm of Mamba, the norms of xLSTM's blocks, every
# BatchNorm of ResNet; and so are scales that stand in for norms (ConvNeXt's layer_scale_parameter). Vectors that are decayed
# (seen with torch 2.13.0, 2026-11-30):
#
#   5.24.0 Llama: none
#   5.24.0 Mamba: layers.mixer.D, norm_f.weight
#   5.24.0 xLSTM: blocks.norm_ffn.weight, blocks.norm_mlstm.weight
#   5.24.0 ResNet: embedder.embedder.normalization.weight, encoder.stages.layers.layer.normalization.weight,
#     encoder.stages.layers.shortcut.normalization.weight
#   5.24.0 ConvNext: encoder.stages.layers.layer_scale_parameter
#   one step with a learning rate of 0.1, weight decay of 0.5 and no gradient: norm_f.weight 1.0 -> 0.95
#
# Exits with 0 while that is so. Installs into a temporary folder; PYTHON chooses the interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5 transformers==5.24.0 accelerate==1.15.0
cat > "$folder/try.py" <<'END'
import sys
import warnings

import torch
import transformers
from transformers import AutoModel, Trainer, TrainingArguments

warnings.simplefilter("ignore")
EXPECTED = {
    "Llama": [],
    "Mamba": ["layers.mixer.D", "norm_f.weight"],
    "xLSTM": ["blocks.norm_ffn.weight", "blocks.norm_mlstm.weight"],
    "ResNet": [
        "embedder.embedder.normalization.weight",
        "encoder.stages.layers.layer.normalization.weight",
        "encoder.stages.layers.shortcut.normalization.weight",
    ],
    "ConvNext": ["encoder.stages.layers.layer_scale_parameter"],
}


def trainer(model):
    arguments = TrainingArguments(sys.argv[1], use_cpu=True, report_to=[], weight_decay=0.5, learning_rate=0.1)
    return Trainer(model, arguments)


found = {}
for name in EXPECTED:
    with torch.device("meta"):
        model = AutoModel.from_config(getattr(transformers, name + "Config")())
    vectors = {key for key, value in model.named_parameters() if value.dim() == 1}
    decayed = vectors.intersection(Trainer.get_decay_parameter_names(None, model))
    found[name] = sorted({".".join(part for part in key.split(".") if not part.isdigit()) for key in decayed})
    print(f"{transformers.__version__} {name}: {', '.join(found[name]) or 'none'}")

small = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
model = AutoModel.from_config(small)
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
before = model.norm_f.weight.mean().item()
trainer(model).create_optimizer().step()
after = model.norm_f.weight.mean().item()
print(f"one step with a learning rate of 0.1, weight decay of 0.5 and no gradient: norm_f.weight {before:.1f} -> {after:.2f}")
raise SystemExit(not (found == EXPECTED and before == 1 and abs(after - 0.95) < 1e-6))
END
"$folder/venv/bin/python" "$folder/try.py" "$folder/out" 2> "$folder/errors" || { cat "$folder/errors" >&2; exit 1; }
