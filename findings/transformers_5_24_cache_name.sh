#!/usr/bin/env bash
# transformers 5.24.0: LLaMA's decoder layer hands the key-value cache to its attention as `cache`; up to 5.23 the name was
# `past_key_values`. An attention of one's own with the signature of before, which takes the old name and, as transformers'
# own attention did, any other keyword, gets the cache among the others: with it each new token sees itself alone. There is
# no error and no warning: the decorator that translates the old name is on transformers' own methods, for their callers.
# Greedy generation by the same weights from the same prompt (seen with torch 2.13.0, 2026-11-28):
#
#   5.23.0: with cache [1, 5, 9, 2, 40, 5, 38, 38, 21, 41, 40, 26], without [1, 5, 9, 2, 40, 5, 38, 38, 21, 41, 40, 26];
#   last logits differ by 4e-06
#   5.24.0: with cache [1, 5, 9, 2, 40, 26, 8, 17, 44, 11, 42, 36], without [1, 5, 9, 2, 40, 5, 38, 38, 21, 41, 40, 26];
#   last logits differ by 2e+01
#
# Exits with 0 while that is so. Installs into a temporary folder; PYTHON chooses the interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat > "$folder/try.py" <<'END'
import sys
import warnings

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

warnings.simplefilter("error")


class Attention(LlamaAttention):
    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(hidden_states).view(heads).transpose(1, 2) for project in projections)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        y = scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None


torch.manual_seed(3)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=4, initializer_range=0.5, bos_token_id=None, eos_token_id=None)
model = LlamaForCausalLM(config).eval()
for number, layer in enumerate(model.model.layers):
    trained = layer.self_attn.state_dict()
    layer.self_attn = Attention(config, number)
    layer.self_attn.load_state_dict(trained)
prompt = torch.tensor([[1, 5, 9, 2]])
found = {
    cached: model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8,
                           use_cache=cached, output_logits=True, return_dict_in_generate=True)
    for cached in (True, False)
}
apart = (found[True].logits[-1] - found[False].logits[-1]).abs().max().item()
print(f"{transformers.__version__}: with cache {found[True].sequences[0].tolist()}, "
      f"without {found[False].sequences[0].tolist()}; last logits differ by {apart:.0e}")
raise SystemExit((apart > 0.1) != (sys.argv[1] == "wrong"))
END
for each in 5.23.0:right 5.24.0:wrong; do
    "$folder/venv/bin/pip" install --quiet --target "$folder/${each%:*}" "transformers==${each%:*}" numpy==2.3.5
    PYTHONPATH=$folder/${each%:*} "$folder/venv/bin/python" "$folder/try.py" "${each#*:}"
done
