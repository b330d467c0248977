#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.24.0, which names the key-value cache of a LLaMA `cache` (up to 5.23 `past_key_values`): generate()
# of a model with prefix tuning or prompt tuning looks for the old name, finds no cache and takes each step for the first. The
# tuned prefix is put under a name that the model no longer reads, so the tokens are those of the model without it; a
# tuned prompt is put in front of each new token. No error, no warning; forward, and so training, is right. Greedy tokens
# of generate(), and of one forward for each token (seen with torch 2.13.0, 2026-11-30):
#
#   5.23.0 PREFIX_TUNING: generate [29, 29, 14, 6, 19, 34, 12, 24], forward [29, 29, 14, 6, 19, 34, 12, 24]
#   5.23.0 PROMPT_TUNING: generate [29, 41, 44, 60, 48, 57, 57, 41], forward [29, 41, 44, 60, 48, 57, 57, 41]
#   5.24.0 PREFIX_TUNING: generate [29, 38, 10, 31, 53, 16, 12, 4], forward [29, 29, 14, 6, 19, 34, 12, 24]
#   5.24.0 PROMPT_TUNING: generate [29, 41, 60, 38, 53, 3, 16, 44], forward [29, 41, 44, 60, 48, 57, 57, 41]
#   without either: [29, 38, 10, 31, 53, 16, 12, 4]
#
# Exits with 0 while that is so. Installs into a temporary folder; PYTHON chooses the interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5 accelerate==1.15.0 psutil packaging
"$folder/venv/bin/pip" install --quiet --no-deps peft==0.21.2
cat > "$folder/try.py" <<'END'
import sys
import warnings

import torch
import transformers
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
PROMPT = torch.tensor([[1, 5, 9, 3]])


@torch.no_grad()
def one_by_one(model):
    ids = PROMPT
    for _ in range(8):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, 4:].tolist()


seen = []
for kind in (PrefixTuningConfig, PromptTuningConfig):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         initializer_range=0.3, bos_token_id=None, eos_token_id=None)
    model = get_peft_model(LlamaForCausalLM(config), kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with model.disable_adapter():
        plain = one_by_one(model)
    expected = one_by_one(model)
    found = model.generate(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=8, do_sample=False,
                           pad_token_id=0)[0, 4:].tolist()
    name = model.peft_config["default"].peft_type.value
    print(f"{transformers.__version__} {name}: generate {found}, forward {expected}")
    seen.append({str(expected): "right", str(plain): "plain"}.get(str(found), "wrong"))
print("without either:", plain)
raise SystemExit(seen != sys.argv[1].split(","))
END
for each in 5.23.0:right,right 5.24.0:plain,wrong; do
    "$folder/venv/bin/pip" install --quiet --target "$folder/${each%:*}" "transformers==${each%:*}" numpy==2.3.5
    PYTHONPATH=$folder/${each%:*} "$folder/venv/bin/python" "$folder/try.py" "${each#*:}"
done
